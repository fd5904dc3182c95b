"""What makes a module a fused one: mixins whose forward checks itself at every call and else steps aside.

A class puts the mixin before the module it serves, ``class FusedBottleneck(FusedBlock, Bottleneck)``, so that
``super().forward`` is the module's own. Options are plain attributes of the instance: deepcopy and pickle carry
them, the state_dict does not.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from fastres.dispatch import forced, has_kernel
from fastres.nn import fitness, folding
from fastres.nn.fitness import Pair
from fastres.nn.reading import read_conv_bn
from fastres.ops.basic_block import basic_block
from fastres.ops.bottleneck import bottleneck
from fastres.ops.conv_bn_act import conv_bn_act
from fastres.ops.params import compute_dtype
from fastres.ops.stem import stem

MEMORY = ("default", "low")
_BLOCKS = {"basic_block": basic_block, "bottleneck": bottleneck}


class Fused:
    """Options and bookkeeping of a fused module; attributes start with ``_fastres_``."""

    _fastres_op = ""  # the op that serves it
    _fastres_original: type | None = None  # the class that restore() returns it to; None: fused by birth
    _fastres_memory = "default"
    _fastres_fold = False
    _fastres_left: str | None = None  # why a call was last left to the module's own forward
    _fastres_separate: str | None = None  # why its last evaluation on a GPU was not one kernel

    @classmethod
    def _fastres_structure(cls, module: nn.Module) -> list[str]:
        """Every reason why the modules inside ``module`` cannot be served exactly, as they stand now."""
        raise NotImplementedError

    @classmethod
    def _fastres_pairs(cls, module: nn.Module) -> list[Pair]:
        """``(name, convolution, norm)`` inside ``module``, whose structure has been found to fit."""
        raise NotImplementedError

    def _fastres_note(self, reason: str) -> None:
        if self._fastres_left != reason and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            self._fastres_left = reason

    def _fastres_serves(self, x) -> list[Pair] | None:
        """The modules to compute this call with, or None if it is not for the op: then ``report`` gets the reason."""
        reason = fitness.why_not_call(x)
        if reason is None:
            reasons = self._fastres_structure(self)
            if not reasons:
                pairs = self._fastres_pairs(self)
                compute = compute_dtype(x)
                reason = fitness.why_not_tensors(x, pairs, compute)
                if reason is None and not (forced() or has_kernel(self._fastres_op, x.device.type, compute)):
                    reason = f"no kernel of fastres serves {compute} on {x.device.type} here (fastres doctor)"
                if reason is None:
                    return pairs
            else:
                reason = "; ".join(reasons)
        self._fastres_note(reason)
        return None

    def train(self, mode: bool = True):
        folding.drop(self)
        return super().train(mode)

    def __prepare_scriptable__(self):
        # TorchScript compiles a class's own forward and cannot follow a call-time choice.
        if self._fastres_original is not None:
            warnings.warn(
                "torch.jit.script: fused modules return to their own classes; call fastres.fuse again afterwards",
                stacklevel=2,
            )
            unfuse(self)
        return self


def unfuse(module: Fused) -> None:
    """``module`` as it was before it was fused: its class, and no attribute of ours."""
    folding.drop(module)
    module.__class__ = module._fastres_original
    for name in [n for n in module.__dict__ if n.startswith("_fastres_")]:
        del module.__dict__[name]


class FusedBlock(Fused):
    """A residual block: convolutions with their norms, one shared ReLU, an optional projection shortcut."""

    _fastres_names: tuple[tuple[str, str], ...] = ()
    _fastres_act = "relu"
    _fastres_shortcut = "downsample"

    @classmethod
    def _fastres_structure(cls, module: nn.Module) -> list[str]:
        reasons: list[str] = []
        children = module._modules
        for conv, norm in cls._fastres_names:
            fitness.check_conv(conv, children.get(conv), reasons)
            fitness.check_norm(norm, children.get(norm), reasons)
        fitness.check_act(cls._fastres_act, children.get(cls._fastres_act), reasons)
        fitness.check_shortcut(cls._fastres_shortcut, children.get(cls._fastres_shortcut), reasons)
        expected = 2 * len(cls._fastres_names) + 1 + (cls._fastres_shortcut in children)
        fitness.check_children(module, expected, reasons)
        return reasons

    @classmethod
    def _fastres_pairs(cls, module: nn.Module) -> list[Pair]:
        """The main branch, then the projection shortcut if there is one."""
        children = module._modules
        pairs = [(conv, children[conv], children[norm]) for conv, norm in cls._fastres_names]
        shortcut = children.get(cls._fastres_shortcut)
        if shortcut is not None:
            pairs.append((cls._fastres_shortcut, *shortcut._modules.values()))
        return pairs

    def forward(self, x: Tensor) -> Tensor:
        pairs = self._fastres_serves(x)
        if pairs is None:
            return super().forward(x)
        if len(pairs) == len(self._fastres_names) and compute_dtype(x) != x.dtype:
            self._fastres_note(
                f"under autocast an identity shortcut in {x.dtype} enters the sum unrounded, a fused op would round it"
            )
            return super().forward(x)
        convs = tuple([read_conv_bn(conv, norm) for _, conv, norm in pairs])
        length = len(self._fastres_names)
        shortcut = convs[length] if len(convs) > length else None
        if self._fastres_fold and folding.can_fold(convs):
            return folding.folded_block(self, x, convs[:length], shortcut)
        return _BLOCKS[self._fastres_op](x, convs[:length], shortcut, memory=self._fastres_memory)


class FusedStem(Fused):
    """A network whose first four layers are a convolution, its norm, a ReLU and a max pooling."""

    _fastres_op = "stem"

    @classmethod
    def _fastres_structure(cls, module: nn.Module) -> list[str]:
        reasons: list[str] = []
        fitness.check_conv("conv1", module._modules.get("conv1"), reasons)
        fitness.check_norm("bn1", module._modules.get("bn1"), reasons)
        fitness.check_act("relu", module._modules.get("relu"), reasons)
        fitness.check_pool("maxpool", module._modules.get("maxpool"), reasons)
        return reasons

    @classmethod
    def _fastres_pairs(cls, module: nn.Module) -> list[Pair]:
        return [("conv1", module._modules["conv1"], module._modules["bn1"])]

    def _fastres_stem(self, x: Tensor) -> Tensor | None:
        """Output of the first four layers, or None where this call has to run them one by one."""
        pairs = self._fastres_serves(x)
        if pairs is None:
            return None
        ((_, conv, norm),) = pairs
        params, pool = read_conv_bn(conv, norm), self._modules["maxpool"]
        if self._fastres_fold and folding.can_fold((params,)):
            return folding.folded_stem(self, x, params, pool.kernel_size, pool.stride, pool.padding)
        return stem(x, params, pool_kernel=pool.kernel_size, pool_stride=pool.stride, pool_padding=pool.padding)


class FusedConvBNAct(Fused):
    """A convolution, its norm and optionally a ReLU; ``_fastres_names`` are theirs (None: no activation module)."""

    _fastres_op = "conv_bn_act"
    _fastres_names: tuple[str, str, str | None] = ("conv", "bn", None)

    @classmethod
    def _fastres_structure(cls, module: nn.Module) -> list[str]:
        reasons: list[str] = []
        conv, norm, act = cls._fastres_names
        fitness.check_conv(conv, module._modules.get(conv), reasons)
        fitness.check_norm(norm, module._modules.get(norm), reasons)
        if act is not None:
            fitness.check_act(act, module._modules.get(act), reasons)
        fitness.check_children(module, 3 - (act is None), reasons)
        return reasons

    @classmethod
    def _fastres_pairs(cls, module: nn.Module) -> list[Pair]:
        conv, norm, _ = cls._fastres_names
        return [(conv, module._modules[conv], module._modules[norm])]

    def _fastres_run(self, x: Tensor, pairs: list[Pair], residual: Tensor | None, relu: bool) -> Tensor:
        ((_, conv, norm),) = pairs
        params = read_conv_bn(conv, norm)
        if self._fastres_fold and folding.can_fold((params,)):
            return folding.folded_conv(self, x, params, residual, relu)
        return conv_bn_act(x, params, residual=residual, relu=relu)

    def forward(self, x: Tensor) -> Tensor:
        pairs = self._fastres_serves(x)
        if pairs is None:
            return super().forward(x)
        return self._fastres_run(x, pairs, None, self._fastres_names[2] is not None)
