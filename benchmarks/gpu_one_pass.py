"""Batch normalisation in one cooperative launch (``gpu_stages.py``): the same bits as separate launches, and its time.

Each row times the launches of one BN over a ResNet-50 layer, all on one stream: separately (statistics or reduction,
finalisation, map) and in one, where the layer fits on chip.
"""

from __future__ import annotations

from collections.abc import Callable

import timing
import torch

from fastres import dispatch, verify

BATCHES = (1, 4, 16, 32, 64)


def calls(kernels, function: str, args: dict, outputs: dict, T: int, one: bool) -> Callable[[], None]:
    """The launches of one BN: ``one`` or several, with T tiles. Buffers are those given."""
    a = {"residual": None, "rstat": None, "y": None, "dres": None, "mask": None, **args, **outputs}
    x, M, C = a["x"], a["M"], a["C"]
    if one:
        return lambda: getattr(kernels, function)(**args, **outputs)
    if function == "bn_one_pass_fwd":

        def run():
            kernels.bn_stats(x, M, C, T, a["part"])
            kernels.bn_finalize(a["part"], T, C, a["weight"], a["bias"], a["eps"], a["stat"])
            kernels.bn_apply(x, M, C, a["stat"], a["residual"], a["rstat"], a["relu"], a["out"], a["mask"])

        return run

    def run():
        grad, stat, mask, relu = a["grad"], a["stat"], a["mask"], a["relu"]
        kernels.bn_bwd_reduce(grad, x, M, C, stat, None, None, mask, relu, T, a["part"], a["y"])
        kernels.bn_bwd_finalize(a["part"], 1, T, M, C, stat, a["batch_stats"], a["dweight"], a["dbias"], a["coef"])
        kernels.bn_bwd_apply(grad, x, M, C, stat, a["coef"], None, None, None, mask, relu, a["dx"], a["dres"])

    return run


def _unequal(kernels, function: str, args: dict, outputs: dict, T: int) -> str:
    """Output of the one launch that has other bits than the separate ones', or an empty string."""
    found = []
    for one in (True, False):
        made = {name: verify._poisoned(buffer) for name, buffer in outputs.items()}
        calls(kernels, function, args, made, T, one)()
        found.append(made)
    return next((n for n in outputs if not torch.equal(*(made[n].view(torch.uint8) for made in found))), "")


def right(emit, kernels, device, shapes) -> bool:
    """Every variant against float64, and bit for bit against the separate launches. ``shapes``: (C, M)."""
    good = True
    if not hasattr(kernels, "one_pass_tiles"):
        emit(kind="one pass", status="refused", why=f"{kernels.name} has no such kernels")
        return True
    for function in dispatch.ONE_PASS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for C, M in shapes:
                wrong = verify.check(function, kernels, device, dtype, C, M)
                T = kernels.one_pass_tiles(torch.empty(0, dtype=dtype, device=device), M, C, 2)
                for label, args, outputs in verify._cases(function, device, dtype, C, M, T) if not wrong else ():
                    name = _unequal(kernels, function, args, outputs, T)
                    wrong = wrong or (name and f"{label}: {name} differs from the separate launches")
                if wrong:
                    emit(kind="one pass", function=function, dtype=str(dtype), shape=[M, C], status="failed", why=wrong)
                good &= not wrong
        emit(kind="one pass", function=function, status="checked")
    return good


def run(emit, device, backend: str, rehearsal: bool) -> bool:
    kernels = dispatch.load(backend)
    good = right(emit, kernels, device, ((20, 67),) if rehearsal else ((1, 131), (7, 1031), (64, 3136), (2048, 392)))
    if not hasattr(kernels, "one_pass_tiles"):
        return good
    dtype, runs = (torch.float32, 2) if rehearsal else (torch.bfloat16, 30)
    for batch in (1,) if rehearsal else BATCHES:
        for C, M in ((16, 64),) if rehearsal else timing.resnet50_matrices(batch):
            for tensors, function in enumerate(dispatch.ONE_PASS, 1):
                reasons = kernels.why_not_one_pass(device, dtype, M, C, tensors)
                if reasons:
                    emit(kind="one pass", function=function, batch=batch, shape=[M, C], status="refused",
                         why="; ".join(reasons))  # fmt: skip
                    continue
                T, separate = kernels.one_pass_tiles(torch.empty(0, dtype=dtype), M, C, tensors), kernels.tiles(M, C)
                medians = {}
                for name, tiles, one in (("one launch", T, True), ("separate", separate, False)):
                    _, args, outputs = verify._cases(function, device, dtype, C, M, tiles)[1]
                    call = calls(kernels.trusted, function, args, outputs, tiles, one)
                    times = timing.device_times(call, device, runs)
                    medians[name] = sorted(times)[len(times) // 2] * 1e6
                emit(kind="one pass", function=function, batch=batch, dtype=str(dtype), shape=[M, C], tiles=T,
                     median_us=medians["one launch"], separate_us=medians["separate"],
                     speedup=medians["separate"] / medians["one launch"])  # fmt: skip
    return good
