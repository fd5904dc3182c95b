"""Steps of the BN family that ``batch_norm_act``, the block engine and ``stem`` share.

``k`` is the chosen backend's launch module; activations are dense NHWC, ``M = N*H*W`` rows of ``C`` channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastres import dispatch
from fastres.backends.reference import acc_dtype
from fastres.library import register
from fastres.ops.params import BN

CL = torch.channels_last


def launcher(op: str, x: Tensor, C: int | None, backend: str):
    """The launch functions that serve ``op`` on ``x``, without their checks where the backend offers that.

    What an op launches on is allocated by itself, or comes from outside and passes `given` or `saved` first.
    """
    k = dispatch.choose(dispatch.Request(op, x.device, x.dtype, C), backend)
    return getattr(k, "trusted", k)


def given(t: Tensor, what: str, like: Tensor, shape=None) -> Tensor:
    """``t`` in dense NHWC: the last check before its address is taken.

    Raises ValueError unless dtype and device are those of ``like`` and the shape is ``shape`` (None: that of ``like``).
    """
    expected = like.shape if shape is None else torch.Size(shape)
    if t.dtype != like.dtype or t.device != like.device or t.shape != expected:
        got = f"{t.dtype} {tuple(t.shape)} on {t.device}"
        raise ValueError(f"{what}: got {got}, expected {like.dtype} {tuple(expected)} on {like.device}")
    return nhwc(t)


def saved(t: Tensor, what: str, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor saved by the forward pass as it comes back, dense; ``[N, C, H, W]`` in NHWC.

    Compilers and saved-tensor hooks stand between the passes. Raises ValueError unless it is on the device of ``like``
    and in its dtype (or in ``dtype``).
    """
    if t.dtype != (dtype or like.dtype) or t.device != like.device:
        got = f"{t.dtype} on {t.device}"
        raise ValueError(f"{what}: got {got} in backward, expected {dtype or like.dtype} on {like.device}")
    return t.contiguous(memory_format=CL) if t.dim() == 4 else t.contiguous()


def nhwc(x: Tensor) -> Tensor:
    """``x`` itself where it is dense NHWC already, else a copy that is."""
    return x.contiguous(memory_format=CL)


def is_nhwc(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=CL)


def as_given(out: Tensor, x: Tensor) -> Tensor:
    """``out`` in the layout ``x`` came in."""
    return out if is_nhwc(x) else out.contiguous()


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``, which costs microseconds also where there is nothing to do."""
    return t if t.dtype is dtype else t.to(dtype)


def cast_all(tensors: list[Tensor | None], dtypes: list) -> list[Tensor | None]:
    """Each tensor in its dtype, strides kept; on a GPU all copies are one kernel."""
    out = list(tensors)
    todo = [i for i, (t, d) in enumerate(zip(tensors, dtypes, strict=True)) if t is not None and t.dtype is not d]
    for i in todo:
        out[i] = torch.empty_like(tensors[i], dtype=dtypes[i])
    if todo:
        torch._foreach_copy_([out[i] for i in todo], [tensors[i] for i in todo])
    return out


def matrix(x: Tensor) -> tuple[int, int]:
    """(M, C) of ``[N, C, H, W]``."""
    N, C, H, W = x.shape
    return N * H * W, C


def new_mask(like: Tensor, M: int, C: int) -> Tensor:
    return torch.empty((M, (C + 7) // 8), dtype=torch.uint8, device=like.device)


def nothing(like: Tensor, dtype=None) -> Tensor:
    """Placeholder of an output that was not asked for."""
    return like.new_empty(0) if dtype is None else torch.empty(0, dtype=dtype, device=like.device)


def given_vector(v: Tensor | None, what: str, C: int, like: Tensor) -> Tensor | None:
    """A per-channel vector from outside, contiguous and in the accumulator type of ``like``; raises ValueError."""
    if v is None:
        return None
    if v.shape != (C,) or v.get_device() != like.get_device():
        raise ValueError(f"{what}: got shape {tuple(v.shape)} on {v.device}, expected ({C},) on {like.device}")
    if v.requires_grad and torch.is_grad_enabled():
        v = v.detach()
    acc = acc_dtype(like.dtype)
    if v.dtype is not acc:
        v = v.to(acc)
    return v if v.is_contiguous() else v.contiguous()


def statistics(k, x: Tensor, weight, bias, mean, var, batch_stats: bool, eps: float, part=None) -> Tensor:
    """``stat [5, C]`` of launch.h, from the batch (``part [3, T, C]`` where it was gathered already) or from the given
    statistics."""
    M, C = matrix(x)
    acc = acc_dtype(x.dtype)
    stat = torch.empty((5, C), dtype=acc, device=x.device)
    weight, bias = given_vector(weight, "weight", C, stat), given_vector(bias, "bias", C, stat)
    if M == 0:
        return stat.zero_()  # an empty batch has no statistics; its gradients are zero
    if batch_stats:
        if part is None:
            T = k.tiles(M, C)
            part = torch.empty((3, T, C), dtype=acc, device=x.device)
            k.bn_stats(x, M, C, T, part)
        k.bn_finalize(part, part.shape[1], C, weight, bias, eps, stat)
    else:
        mean, var = given_vector(mean, "running_mean", C, stat), given_vector(var, "running_var", C, stat)
        k.bn_fold(mean, var, weight, bias, eps, C, stat)
    return stat


def backward_coefficients(k, part, plane, T, M, C, stat, batch_stats, want_weight, want_bias):
    """(dweight, dbias, coef) of one BN from the reduced ``part``."""
    new_vector = stat.new_empty
    dweight = new_vector(C) if want_weight else None
    dbias = new_vector(C) if want_bias else None
    coef = new_vector((3, C))
    k.bn_bwd_finalize(part, plane, T, M, C, stat, batch_stats, dweight, dbias, coef)
    return dweight, dbias, coef


def one_pass_tiles(k, op, x, batch_stats, planes, backend) -> int:
    """Tiles of the one launch that serves a BN over ``x`` (``planes`` 1: forward, 2: backward); 0 where none does."""
    return dispatch.one_pass_tiles(k, op, x, *matrix(x), planes, backend) if batch_stats else 0


def normalise(
    k, op, x, weight, bias, mean, var, batch_stats, eps, residual, rstat, relu, out, mask, backend, part=None
):
    """`statistics` of ``x``, then ``out`` and ``mask`` of launch.h's ``bn_apply``; in one launch where x fits on chip.

    Returns ``stat``. ``out`` may be x; ``rstat``: that of the residual's own BN, or None.
    """
    M, C = matrix(x)
    T = one_pass_tiles(k, op, x, batch_stats, 1, backend) if part is None else 0
    if not T:
        stat = statistics(k, x, weight, bias, mean, var, batch_stats, eps, part)
        k.bn_apply(x, M, C, stat, residual, rstat, relu, out, mask)
        return stat
    stat = torch.empty((5, C), dtype=acc_dtype(x.dtype), device=x.device)
    weight, bias = given_vector(weight, "weight", C, stat), given_vector(bias, "bias", C, stat)
    k.bn_one_pass_fwd(x, M, C, weight, bias, eps, residual, rstat, relu, T, stat.new_empty((3, T, C)), stat, out, mask)
    return stat


def backward_in_one(k, op, grad, x, stat, mask, relu, batch_stats, want_weight, want_bias, dx, dres, y, backend):
    """(dweight, dbias) of one BN with ``dx``, ``dres`` and ``y`` filled in one launch, or None where that cannot be.

    For statistics of the batch; the residual that ``dres`` belongs to has no BN of its own.
    """
    M, C = matrix(x)
    T = one_pass_tiles(k, op, x, batch_stats, 2, backend)
    if not T:
        return None
    dweight = stat.new_empty(C) if want_weight else None
    dbias = stat.new_empty(C) if want_bias else None
    part, coef = stat.new_empty((2, T, C)), stat.new_empty((3, C))
    k.bn_one_pass_bwd(grad, x, M, C, stat, mask, relu, batch_stats, T, part, dweight, dbias, coef, dx, dres, y)
    return dweight, dbias


# ---- running statistics: their own op, so that the differentiable ops mutate nothing


def _update(running_mean, running_var, counters, stat, count, momentum, counted):
    # A forward inside a backward is the recomputation of a checkpoint: it was counted already.
    if torch._C._current_graph_task_id() != -1:
        return
    if counters:
        _count(counters)
    # A module may serve twice in a block: its second update comes after the first.
    distinct = _distinct(running_mean)
    groups: dict[tuple, list[int]] = {}
    for i, (n, m) in enumerate(zip(count, momentum, strict=True)):
        if n > 0 and counted[i] < 0:
            groups.setdefault((m, n, -1 if distinct else i), []).append(i)
        elif n > 0:
            factor = _calls(counters, counted[i]).to(stat[i].dtype).reciprocal()
            mean, var = running_mean[i], running_var[i]
            mean.add_((stat[i][0] - mean) * factor)
            var.add_((stat[i][1] * (n / max(n - 1, 1)) - var) * factor)
    # One kernel for a block's vectors, not four for each BN.
    for (m, n, _), members in groups.items():
        means, variances = [running_mean[i] for i in members], [running_var[i] for i in members]
        torch._foreach_mul_(means + variances, 1 - m)
        torch._foreach_add_(means, [stat[i][0] for i in members], alpha=m)
        torch._foreach_add_(variances, [stat[i][1] for i in members], alpha=m * (n / max(n - 1, 1)))


def _distinct(tensors) -> bool:
    return len({t.data_ptr() for t in tensors}) == len(tensors)


def _calls(counters, at: int) -> Tensor:
    """The counter at ``at`` as that module's own call saw it: all are counted first, one module's twice if it serves
    twice."""
    counter, rest = counters[at], counters[at + 1 :]
    later = sum(c.data_ptr() == counter.data_ptr() for c in rest)
    return counter - later if later else counter


def _count(counters):
    if _distinct(counters):
        torch._foreach_add_(counters, 1)
    else:
        for counter in counters:
            counter.add_(1)


_bn_update = register(
    "bn_update_(Tensor(a!)[] running_mean, Tensor(b!)[] running_var, Tensor(c!)[] counters, Tensor[] stat,"
    " SymInt[] count, float[] momentum, int[] counted) -> ()",
    _update,
    lambda *args: None,
)


def update_running(bns: list[BN], stats: list[Tensor], counts: list[int]) -> None:
    """Fold the batch statistics into the running ones, exactly once a step (also under checkpointing).

    Running variance takes the unbiased estimate, ``M/(M-1)`` times the biased one, as in ``nn.BatchNorm2d``.
    """
    means, variances, counters, kept, sizes, momenta, counted = [], [], [], [], [], [], []
    for b, stat, n in zip(bns, stats, counts, strict=True):
        if not b.training:
            continue
        if b.running_mean is not None:
            means.append(b.running_mean)
            variances.append(b.running_var)
            kept.append(stat)
            sizes.append(n)
            # counted[i]: the counter a cumulative average weighs by; -1: momentum does.
            momenta.append(0.0 if b.momentum is None else float(b.momentum))
            counted.append(len(counters) if b.momentum is None else -1)
        if b.num_batches_tracked is not None:
            counters.append(b.num_batches_tracked)
    if means or counters:
        with torch.no_grad():
            _bn_update(means, variances, counters, kept, sizes, momenta, counted)
