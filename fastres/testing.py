"""Error budget, shapes and inputs: what the tests and the benchmarks agree on.

The budget: against float64, a result of ours may be twice as far off as PyTorch's own in the same dtype, plus a
floor, because PyTorch may be exact by luck. The floor is derived, not tuned:

* one ULP of the output dtype at the scale of the output: the final rounding, once for each side of the comparison;
* ``2 * sqrt(terms)`` ULPs of the accumulator at that scale for a sum of ``terms``: rounding errors of a sum are a
  random walk, and ours adds in another order than PyTorch.

A ReLU's mask is discontinuous: a pre-activation within rounding distance of zero may fall on either side. Outside
that band the masks agree bit for bit; inside, flips are a bounded and symmetric share (``mask_verdict``). Gradients
are compared on inputs kept clear of the band (``clear_of_zero``), where they are as continuous as anything else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastres.backends.reference import acc_dtype
from fastres.ops.params import BN, ConvBN

#: Ours may be this many times as far from float64 as PyTorch in the same dtype.
FACTOR = 2.0

#: Activations [N, C, H, W] of real ResNets at 224 x 224, one image: stem, then the last BN of each stage of
#: resnet18/34 and of resnet50/101/152.
RESNET_SHAPES = (
    (1, 64, 112, 112),
    (1, 64, 56, 56),
    (1, 256, 56, 56),
    (1, 512, 28, 28),
    (1, 1024, 14, 14),
    (1, 2048, 7, 7),
)

#: Shapes that no vector width divides: single channels, odd channels, single rows, prime row counts.
ODD_SHAPES = ((2, 1, 5, 7), (3, 3, 4, 5), (1, 7, 9, 3), (2, 8, 1, 1), (2, 20, 7, 7), (1, 64, 1, 5), (1, 100, 3, 11))

#: (channels, rows) of launch-level cases; each row count meets a channel count below, at and above a vector.
ODD_MATRICES = ((1, 1031), (3, 5), (7, 1031), (8, 0), (8, 1), (20, 259), (64, 5), (64, 300), (100, 37))

LAYOUTS = ("nhwc", "nchw", "permuted", "sliced", "misaligned")


@dataclass(frozen=True)
class Verdict:
    """Outcome of a comparison; true if it is within the budget.

    ``error`` and ``limit`` are in units of the output's scale, in the norm that came closest to its limit.
    """

    ok: bool
    error: float
    limit: float
    message: str

    def __bool__(self) -> bool:
        return self.ok


def within_budget(
    ours: Tensor,
    peer: Tensor | None,
    truth: Tensor,
    *,
    terms: float = 1,
    scale: float | None = None,
    norms: Sequence[str] = ("max", "rms"),
    what: str = "result",
) -> Verdict:
    """Whether ``error(ours) <= 2 * error(peer) + floor``, errors against ``truth``.

    Args:
        ours: any shape; its dtype sets the size of a rounding.
        peer: PyTorch's result in that dtype, or None for the floor alone.
        truth: the float64 result.
        terms: how many values an element of the result sums up.
        scale: size of the output in whose units errors are measured; by default ``max|truth|``. Give it where the
            truth cancels to nearly nothing.
        norms: "max" sees a single wrong element, "rms" a small error everywhere.
        what: name for the message.

    Raises: ValueError for shapes or dtypes that cannot be compared.
    """
    for name, t in (("peer", peer), ("truth", truth)):
        if t is not None and t.shape != ours.shape:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected that of {what}, {tuple(ours.shape)}")
    if truth.dtype != torch.float64:
        raise ValueError(f"truth: got dtype {truth.dtype}, expected torch.float64")
    if ours.numel() == 0:
        return Verdict(True, 0.0, 0.0, f"{what}: empty")
    want = truth.detach()
    # What the dtype cannot hold is infinite in every honest result.
    want = torch.where(want.to(ours.dtype).isinf(), want.sign() * math.inf, want)
    special = ~want.isfinite()
    got = ours.detach().double()
    wrong = special & ~((got == want) | (got.isnan() & want.isnan())) | (~special & ~got.isfinite())
    if wrong.any():
        return Verdict(False, math.inf, 0.0, f"{what}: {_listing(wrong, got, want, peer)}")
    zero = torch.zeros((), dtype=torch.float64, device=want.device)
    scale = max(scale_of(want) if scale is None else scale, torch.finfo(ours.dtype).tiny)
    error = torch.where(special, zero, (got - want).abs()) / scale
    theirs = None
    if peer is not None:
        theirs = torch.where(special, zero, (peer.detach().double() - want).abs()).nan_to_num(0.0, 0.0) / scale
    floor = torch.finfo(ours.dtype).eps + 2 * math.sqrt(terms) * torch.finfo(acc_dtype(ours.dtype)).eps
    found = []
    for norm in norms:
        e, p = _norm(error, norm), 0.0 if theirs is None else _norm(theirs, norm)
        found.append((e, FACTOR * p + floor, norm, p))
    e, limit, norm, p = max(found, key=lambda f: f[0] / f[1])
    text = (
        f"{what}: {norm} error {e:.3g}, limit {limit:.3g} (2 x PyTorch's {p:.3g} + floor {floor:.3g}), in units of "
        f"the scale {scale:.3g}"
    )
    if e <= limit:
        return Verdict(True, e, limit, text)
    beyond = error > limit if norm == "max" else error >= error.max()
    return Verdict(False, e, limit, f"{text}; {_listing(beyond, got, want, peer)}")


def scale_of(t: Tensor) -> float:
    """Largest finite magnitude in ``t``, 0 if there is none."""
    return t.detach().abs().nan_to_num(0.0, 0.0).max().item() if t.numel() else 0.0


def _norm(t: Tensor, norm: str) -> float:
    if norm == "max":
        return t.max().item()
    if norm == "rms":
        return t.square().mean().sqrt().item()
    raise ValueError(f"norms: got {norm!r}, expected 'max' or 'rms'")


def _listing(where: Tensor, got: Tensor, want: Tensor, peer: Tensor | None = None, most: int = 4) -> str:
    """Count, first indices and values of a mismatch."""
    rows = []
    for index in where.nonzero()[:most].tolist():
        at = tuple(index)
        beside = "" if peer is None else f" (PyTorch {peer[at].item():.9g})"
        rows.append(f"{list(at)} got {got[at].item():.9g}, expected {want[at].item():.9g}{beside}")
    return f"{int(where.sum())} of {where.numel()} elements wrong, first: " + "; ".join(rows)


def rounded_once(ours: Tensor, truth: Tensor, *, roundings: int = 16, scale: float | None = None, what="result"):
    """Whether every element is the truth computed in the accumulator type and then rounded to its dtype once.

    Tighter than the budget: half a ULP of the element itself plus ``roundings`` ULPs of the accumulator at the
    scale of the summands (``max(1, max|truth|)`` unless given). A truncating or doubly rounding kernel fails in
    bf16 and fp16. Returns a :class:`Verdict`.
    """
    if ours.numel() == 0:
        return Verdict(True, 0.0, 0.0, f"{what}: empty")
    if scale is None:
        scale = max(1.0, scale_of(truth))
    info = torch.finfo(ours.dtype)
    got = ours.detach().double()
    # ULP of an element: spacing of the dtype in its binade; fp16 has subnormals below `tiny`.
    exponent = torch.frexp(truth.abs().clamp_min(info.tiny).nan_to_num(1.0, 1.0))[1].double() - 1
    half_ulp = info.eps * torch.exp2(exponent) / 2
    slack = roundings * torch.finfo(acc_dtype(ours.dtype)).eps * scale
    error = (got - truth).abs()
    same = (got == truth.to(ours.dtype).double()) | (got.isnan() & truth.isnan())
    bad = ~(error <= half_ulp + slack) & ~same
    worst = error.nan_to_num(math.inf).masked_fill(same, 0.0).max().item() / scale
    limit = (half_ulp.max().item() + slack) / scale
    if not bad.any():
        return Verdict(True, worst, limit, f"{what}: within one rounding")
    return Verdict(False, worst, limit, f"{what}: beyond one rounding; {_listing(bad, got, truth)}")


def exactly(ours: Tensor, expected: Tensor, what: str = "result") -> Verdict:
    """Bit for bit the same values (NaN equals NaN); both of one shape and dtype."""
    if ours.shape != expected.shape or ours.dtype != expected.dtype:
        got, want = (f"{tuple(t.shape)} {t.dtype}" for t in (ours, expected))
        return Verdict(False, math.inf, 0.0, f"{what}: got {got}, expected {want}")
    different = ~((ours == expected) | ((ours != ours) & (expected != expected)))
    if not different.any():
        return Verdict(True, 0.0, 0.0, f"{what}: equal")
    return Verdict(False, math.inf, 0.0, f"{what}: not equal; {_listing(different, ours, expected)}")


def mask_verdict(passed: Tensor, pre: Tensor, band: Tensor | float, what: str = "mask") -> Verdict:
    """The ReLU rule: ``passed`` against the float64 pre-activation ``pre``, which is uncertain by ``band``.

    Outside the band every bit is right. Inside, at most 3/4 of the bits are flipped (a coin would flip half), and
    as many up as down within four standard deviations.
    """
    right = ~(pre <= 0)
    flipped = passed != right
    inside = pre.abs() <= band
    outside = flipped & ~inside
    if outside.any():
        return Verdict(False, math.inf, 0.0, f"{what}: {_listing(outside, passed.double(), pre)} (pre-activation)")
    up, down = int((flipped & passed).sum()), int((flipped & right).sum())
    n, flips = int(inside.sum()), up + down
    share = flips / max(n, 1)
    bound = 0.75 + 2 / math.sqrt(max(n, 1))
    symmetric = abs(up - down) <= 4 * math.sqrt(max(flips, 1))
    ok = share <= bound and symmetric
    return Verdict(ok, share, bound, f"{what}: {up} flips up and {down} down among {n} bits inside the band")


# ---- inputs


def generator(seed: int, device="cpu") -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def fill(shape: Sequence[int], dtype: torch.dtype, kind: str = "normal", seed: int = 0) -> Tensor:
    """Contiguous values of one kind.

    "normal": standard normal. "huge_mean": a mean of 4096 standard deviations (64 in 16 bits, whose 8 or 11 bits
    hold no more), where ``E[x^2] - E[x]^2`` loses everything. "integers": -4..4, exact in every dtype.
    """
    g = generator(seed)
    if kind == "integers":
        return torch.randint(-4, 5, tuple(shape), generator=g).to(dtype)
    x = torch.randn(tuple(shape), generator=g, dtype=torch.float64)
    if kind == "huge_mean":
        x = x + mean_of("huge_mean", dtype)
    elif kind != "normal":
        raise ValueError(f"kind: got {kind!r}, expected 'normal', 'huge_mean' or 'integers'")
    return x.to(dtype)


def mean_of(kind: str, dtype: torch.dtype) -> float:
    """Mean of :func:`fill` for that kind and dtype."""
    if kind != "huge_mean":
        return 0.0
    return 4096.0 if dtype in (torch.float32, torch.float64) else 64.0


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of a 4-D tensor in other storage: one of :data:`LAYOUTS`. Never shares memory with ``x``."""
    if layout == "nhwc":
        return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
    if layout == "nchw":
        return torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x)
    if layout == "permuted":  # dense, but neither NCHW nor NHWC
        inner = torch.empty_like(x.permute(3, 1, 0, 2), memory_format=torch.contiguous_format)
        return inner.permute(2, 1, 3, 0).copy_(x)
    if layout == "sliced":  # every other channel and an inner column range of a larger tensor
        N, C, H, W = x.shape
        return x.new_zeros(N, 2 * C, H, W + 2)[:, ::2, :, 1 : W + 1].copy_(x)
    if layout == "misaligned":  # channels_last, one element past any vector boundary
        return misaligned(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(map(repr, LAYOUTS))}")


def misaligned(x: Tensor) -> Tensor:
    """A contiguous copy whose address is a multiple of its element size and of nothing larger."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


def make_bn(
    C: int,
    *,
    training: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    affine: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    requires_grad: bool = True,
    mean: float = 0.0,
) -> BN:
    """A BN with all its vectors, weights of both signs away from zero."""
    g = generator(seed)

    def rand():
        return torch.randn(C, generator=g, dtype=torch.float64)

    weight = (0.5 + torch.rand(C, generator=g, dtype=torch.float64)) * torch.where(rand() < -0.5, -1.0, 1.0)
    bias, running_mean, running_var = 0.5 * rand(), 0.5 * rand() + mean, rand().square() + 0.5
    return BN(
        weight.to(dtype).requires_grad_(requires_grad) if affine else None,
        bias.to(dtype).requires_grad_(requires_grad) if affine else None,
        running_mean.to(dtype),
        running_var.to(dtype),
        training,
        momentum,
        eps,
        torch.tensor(3),
    )


def make_conv(
    C: int,
    K: int,
    size: int = 3,
    *,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = False,
    training: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    momentum: float | None = 0.1,
    requires_grad: bool = True,
) -> ConvBN:
    """A convolution of He-initialised weights with its BN; "same" padding unless given; BN parameters in fp32
    (fp64 for float64)."""
    g = generator(seed + 1000)
    fan = C // groups * size * size
    weight = torch.randn(K, C // groups, size, size, generator=g, dtype=torch.float64) * math.sqrt(2 / fan)
    shift = torch.randn(K, generator=g, dtype=torch.float64).to(dtype).requires_grad_(requires_grad) if bias else None
    padding = dilation * (size // 2) if padding is None else padding
    bn = make_bn(
        K, training=training, dtype=acc_dtype(dtype), seed=seed, momentum=momentum, requires_grad=requires_grad
    )
    weight = weight.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_(requires_grad)
    return ConvBN(weight, shift, (stride, stride), (padding, padding), (dilation, dilation), groups, bn)


def clear_of_zero(pre: Tensor, bias: Tensor, reach: float = 0.5) -> float:
    """Shift ``bias`` in place so that, channel by channel, zero falls into a wide gap of ``pre``.

    ``pre``: the float64 pre-activation ``[N, C, H, W]`` that ``bias`` entered with factor one. The widest gap
    between neighbouring values within ``reach`` of zero is taken. Returns the smallest distance left between a
    value and zero.
    """
    v = pre.detach().transpose(0, 1).flatten(1).sort(dim=1).values
    if v.shape[1] == 0:
        return math.inf
    edges = torch.cat([v[:, :1] - 2 * reach, v, v[:, -1:] + 2 * reach], dim=1)
    middle, gap = (edges[:, 1:] + edges[:, :-1]) / 2, edges.diff(dim=1)
    gap = torch.where(middle.abs() <= 2 * reach, gap, -1.0)
    shift = middle.gather(1, gap.argmax(dim=1, keepdim=True))[:, 0]
    with torch.no_grad():
        before = bias.double()
        bias.sub_(shift.to(bias.dtype))
        moved = bias.double() - before
    return (v + moved[:, None]).abs().min().item()


def block_configurations() -> Iterator[tuple[str, dict]]:
    """Geometries of residual blocks that occur in the wild: (name, width, stride, dilation, groups, shortcut)."""
    yield "identity", dict(C=16, width=8, K=16, stride=1, dilation=1, groups=1, projection=False)
    yield "projection", dict(C=12, width=8, K=20, stride=1, dilation=1, groups=1, projection=True)
    yield "strided", dict(C=8, width=8, K=16, stride=2, dilation=1, groups=1, projection=True)
    yield "dilated", dict(C=16, width=8, K=16, stride=1, dilation=2, groups=1, projection=False)
    yield "grouped", dict(C=16, width=16, K=16, stride=1, dilation=1, groups=4, projection=False)
    yield "biased", dict(C=7, width=5, K=7, stride=1, dilation=1, groups=1, projection=False, bias=True)
