"""A stage of bottlenecks as one unit: its identity blocks may run as rotated units in evaluation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastres import block_geometry, dispatch
from fastres.nn import fitness, folding
from fastres.nn.fused import Fused, FusedBlock
from fastres.nn.reading import read_conv_bn
from fastres.ops.params import compute_dtype


class FusedStage(Fused, nn.Sequential):
    """An ``nn.Sequential`` of bottlenecks, ``[N, C, H, W]`` to ``[N, K, P, Q]``; state_dict and all else are its own.

    Made by ``fastres.fuse(model, fold=True)`` out of each ``nn.Sequential`` of two or more fused bottlenecks. In
    evaluation without grad on a GPU, two or more identity blocks in a row run as rotated units where that proved right
    and faster than block by block, which is measured at the first call of a shape. Everything else, and every call in
    training, runs the blocks one after the other. A block with hooks is always called as a module.
    """

    _fastres_op = "rotated_stage"
    _fastres_original = nn.Sequential

    @classmethod
    def _fastres_structure(cls, module: nn.Module) -> list[str]:
        others = [
            f"{name} is {fitness.qualified(type(m))}" for name, m in module._modules.items() if not _bottleneck(m)
        ]
        if others:
            return [f"{', '.join(others)}; expected fused bottlenecks alone"]
        if len(module._modules) < 2:
            return [f"holds {len(module._modules)} block, expected two or more"]
        return []

    @classmethod
    def _fastres_pairs(cls, module: nn.Module) -> list:
        return []  # its blocks have them

    def forward(self, input: Tensor) -> Tensor:
        if not self._fastres_fold or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(input)
        blocks, x = list(self._modules.values()), input
        while blocks:
            run = _run(blocks, x)
            out = folding.folded_run(run, x) if len(run) > 1 else None
            if out is None:  # not as rotated units
                for block in blocks[: max(1, len(run))]:
                    x = block(x)
            else:
                x = out
            blocks = blocks[max(1, len(run)) :]
        return x


def _bottleneck(block: nn.Module) -> bool:
    """Whether ``block`` computes as a fused bottleneck, no forward of someone else's before it."""
    return (
        isinstance(block, FusedBlock)
        and block._fastres_op == "bottleneck"
        and type(block).forward is FusedBlock.forward
    )


def _run(blocks: list[nn.Module], x: Tensor) -> list[folding.Member]:
    """The blocks from the first on that ``x`` can pass as one run: identity blocks of one shape, ready to be folded."""
    run: list[folding.Member] = []
    if fitness.why_not_call(x) or not (dispatch.forced() or x.device.type == "cuda") or compute_dtype(x) != x.dtype:
        return run
    for block in blocks:
        reasons: list[str] = []
        if not _bottleneck(block) or not block._fastres_fold:
            return run
        fitness.check_untouched("block", block, reasons)
        pairs = None if reasons else block._fastres_serves(x)
        if pairs is None or len(pairs) != 3:
            return run
        convs = tuple([read_conv_bn(conv, norm) for _, conv, norm in pairs])
        if not folding.can_fold(convs):
            return run
        shape = block_geometry.shape_of(x, convs, None)
        if isinstance(shape, block_geometry.Unserved) or (run and shape != run[0].shape):
            return run
        run.append(folding.Member(block, convs, shape))
    return run


def place(module: nn.Module) -> None:
    """Make ``module`` a stage if it is exactly an ``nn.Sequential`` of two or more fused bottlenecks."""
    if type(module) is nn.Sequential and "forward" not in module.__dict__ and not FusedStage._fastres_structure(module):
        module.__class__ = FusedStage
