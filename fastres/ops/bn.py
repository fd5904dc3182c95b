"""Steps of the BN family that ``batch_norm_act``, the block engine and ``stem`` share.

``k`` is the chosen backend's launch module; activations are dense NHWC, ``M = N*H*W`` rows of ``C`` channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastres.backends.reference import acc_dtype
from fastres.library import register
from fastres.ops.params import BN

CL = torch.channels_last


def nhwc(x: Tensor) -> Tensor:
    """``x`` itself where it is dense NHWC already, else a copy that is."""
    return x.contiguous(memory_format=CL)


def is_nhwc(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=CL)


def as_given(out: Tensor, x: Tensor) -> Tensor:
    """``out`` in the layout ``x`` came in."""
    return out if is_nhwc(x) else out.contiguous()


def matrix(x: Tensor) -> tuple[int, int]:
    """(M, C) of ``[N, C, H, W]``."""
    return x.shape[0] * x.shape[2] * x.shape[3], x.shape[1]


def new(like: Tensor, shape, dtype=None) -> Tensor:
    """The one allocator of activations: dense NHWC, used by implementations and fakes alike."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=CL)


def new_mask(like: Tensor, M: int, C: int) -> Tensor:
    return torch.empty((M, (C + 7) // 8), dtype=torch.uint8, device=like.device)


def nothing(like: Tensor, dtype=None) -> Tensor:
    """Placeholder of an output that was not asked for."""
    return torch.empty(0, dtype=dtype or like.dtype, device=like.device)


def _vector(v: Tensor | None, acc: torch.dtype) -> Tensor | None:
    return None if v is None else v.detach().to(acc).contiguous()


def statistics(k, x: Tensor, weight, bias, mean, var, batch_stats: bool, eps: float) -> Tensor:
    """``stat [5, C]`` of launch.h, from the batch or from the given statistics."""
    M, C = matrix(x)
    acc = acc_dtype(x.dtype)
    stat = torch.empty((5, C), dtype=acc, device=x.device)
    weight, bias = _vector(weight, acc), _vector(bias, acc)
    if M == 0:
        return stat.zero_()  # an empty batch has no statistics; its gradients are zero
    if batch_stats:
        T = k.tiles(M, C)
        part = torch.empty((3, T, C), dtype=acc, device=x.device)
        k.bn_stats(x, M, C, T, part)
        k.bn_finalize(part, T, C, weight, bias, eps, stat)
    else:
        k.bn_fold(_vector(mean, acc), _vector(var, acc), weight, bias, eps, C, stat)
    return stat


def backward_coefficients(k, part, plane, T, M, C, stat, batch_stats, want_weight, want_bias):
    """(dweight, dbias, coef) of one BN from the reduced ``part``."""
    new_vector = stat.new_empty
    dweight = new_vector(C) if want_weight else None
    dbias = new_vector(C) if want_bias else None
    coef = new_vector((3, C))
    k.bn_bwd_finalize(part, plane, T, M, C, stat, batch_stats, dweight, dbias, coef)
    return dweight, dbias, coef


# ---- running statistics: their own op, so that the differentiable ops mutate nothing


def _update(running_mean, running_var, tracked, stat, count, momentum):
    # A forward inside a backward is the recomputation of a checkpoint: it was counted already.
    if torch._C._current_graph_task_id() != -1:
        return
    counters = iter(tracked)
    for mean, var, s, n, m in zip(running_mean, running_var, stat, count, momentum, strict=True):
        counter = next(counters) if m < 0 else None
        if n == 0:
            continue
        unbiased = n / max(n - 1, 1)
        if counter is None:
            mean.mul_(1 - m).add_(s[0], alpha=m)
            var.mul_(1 - m).add_(s[1], alpha=m * unbiased)
        else:
            factor = counter.to(s.dtype).reciprocal()
            mean.add_((s[0] - mean) * factor)
            var.add_((s[1] * unbiased - var) * factor)


def _count(tracked):
    if torch._C._current_graph_task_id() == -1:
        for counter in tracked:
            counter.add_(1)


_bn_update = register(
    "bn_update_(Tensor(a!)[] running_mean, Tensor(b!)[] running_var, Tensor[] tracked, Tensor[] stat, SymInt[] count,"
    " float[] momentum) -> ()",
    _update,
    lambda *args: None,
)
_bn_count = register("bn_count_(Tensor(a!)[] tracked) -> ()", _count, lambda *args: None)


def update_running(bns: list[BN], stats: list[Tensor], counts: list[int]) -> None:
    """Fold the batch statistics into the running ones, exactly once a step (also under checkpointing).

    Running variance takes the unbiased estimate, ``M/(M-1)`` times the biased one, as in ``nn.BatchNorm2d``.
    """
    live = [(b, s, n) for b, s, n in zip(bns, stats, counts, strict=True) if b.training]
    counters = [b.num_batches_tracked for b, _, _ in live if b.num_batches_tracked is not None]
    if counters:
        _bn_count(counters)
    live = [(b, s, n) for b, s, n in live if b.running_mean is not None]
    if not live:
        return
    with torch.no_grad():
        _bn_update(
            [b.running_mean for b, _, _ in live],
            [b.running_var for b, _, _ in live],
            [b.num_batches_tracked for b, _, _ in live if b.momentum is None],
            [s for _, s, _ in live],
            [n for _, _, n in live],
            [-1.0 if b.momentum is None else float(b.momentum) for b, _, _ in live],
        )
