"""The launch signature in plain PyTorch: the oracle of every kernel and the backend of last resort.

Each function has the name and the argument order of ``csrc/launch.h`` without the leading dtype and
the trailing context (a tensor knows both). Outputs are filled, nothing is returned. Activations are
dense NHWC: either a ``[N, C, H, W]`` tensor in ``channels_last`` or anything whose storage is ``M*C``
dense elements in that order. Works on any device and dtype; float64 gives the truth.
"""

from __future__ import annotations

import torch

name = "reference"


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """Accumulator type of an activation dtype: float64 for float64, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows(t: torch.Tensor, M: int, C: int) -> torch.Tensor:
    """A dense NHWC tensor of any rank as its ``[M, C]`` matrix, sharing storage."""
    return t.as_strided((M, C), (C, 1))


def why_not(request) -> list[str]:
    return []


def tiles(M: int, C: int) -> int:
    return max(1, min(64, -(-M // 512)))


def _bounds(M: int, T: int):
    R = -(-M // T) if M else 0
    return [(min(t * R, M), min((t + 1) * R, M)) for t in range(T)]


def _unpack(mask: torch.Tensor, M: int, C: int) -> torch.Tensor:
    nbytes = -(-C // 8)
    bits = (mask.reshape(M, nbytes, 1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    return bits.reshape(M, nbytes * 8)[:, :C].bool()


def _pack(passed: torch.Tensor, mask: torch.Tensor) -> None:
    M, C = passed.shape
    nbytes = -(-C // 8)
    padded = torch.zeros(M, nbytes * 8, dtype=torch.uint8, device=mask.device)
    padded[:, :C] = passed
    weights = (1 << torch.arange(8, device=mask.device)).to(torch.uint8)
    mask.reshape(M, nbytes).copy_((padded.reshape(M, nbytes, 8) * weights).sum(2, dtype=torch.uint8))


def _normalise(x, stat):
    return (x.to(stat.dtype) - stat[0]) * stat[3] + stat[4]


def _passed(v: torch.Tensor) -> torch.Tensor:
    return ~(v <= 0)


def _masked(grad, x, stat, mask, relu, M, C):
    """The gradient behind the ReLU, in the accumulator type."""
    g = rows(grad, M, C).to(stat.dtype)
    if not relu:
        return g
    if mask is not None:
        passed = _unpack(mask, M, C)
    else:
        passed = _passed(_normalise(rows(x, M, C), stat).to(x.dtype))
    return torch.where(passed, g, torch.zeros((), dtype=g.dtype, device=g.device))


# ---- add_relu


def add_relu_fwd(x, residual, n, out, mask):
    acc = acc_dtype(x.dtype)
    v = (rows(x, n, 1).to(acc) + rows(residual, n, 1).to(acc)).to(x.dtype)
    rows(out, n, 1).copy_(torch.relu(v))
    if mask is not None:
        flat = torch.zeros(mask.numel() * 8, dtype=torch.bool, device=x.device)
        flat[:n] = _passed(v)[:, 0]
        _pack(flat.reshape(-1, 8), mask)


def add_relu_bwd(grad, mask, n, dx):
    passed = _unpack(mask, mask.numel(), 8).reshape(-1)[:n, None]
    rows(dx, n, 1).copy_(torch.where(passed, rows(grad, n, 1), torch.zeros((), dtype=grad.dtype, device=grad.device)))


# ---- batch_norm_act


def bn_stats(x, M, C, T, part):
    xs = rows(x, M, C).to(part.dtype)
    for t, (lo, hi) in enumerate(_bounds(M, T)):
        n = hi - lo
        part[0, t] = n
        if n == 0:
            part[1:, t] = 0
            continue
        mean = xs[lo:hi].mean(0)
        part[1, t] = mean
        part[2, t] = (xs[lo:hi] - mean).square().sum(0)


def bn_finalize(part, T, C, weight, bias, eps, stat):
    n, mean, m2 = part.double().unbind(0)
    total = n.sum(0)
    mu = (n * mean).sum(0) / total
    var = (m2 + n * (mean - mu).square()).sum(0) / total
    _fill_stat(mu, var, weight, bias, eps, stat)


def bn_fold(running_mean, running_var, weight, bias, eps, C, stat):
    _fill_stat(running_mean.double(), running_var.double(), weight, bias, eps, stat)


def _fill_stat(mean, var, weight, bias, eps, stat):
    invstd = (var + eps).rsqrt()
    stat[0], stat[1], stat[2] = mean, var, invstd
    stat[3] = invstd if weight is None else weight.double() * invstd
    stat[4] = 0 if bias is None else bias


def bn_apply(x, M, C, stat, residual, rstat, relu, out, mask):
    v = _normalise(rows(x, M, C), stat)
    if residual is not None:
        r = rows(residual, M, C)
        v = v + (r.to(v.dtype) if rstat is None else _normalise(r, rstat))
    v = v.to(out.dtype)
    rows(out, M, C).copy_(torch.relu(v) if relu else v)
    if mask is not None:
        _pack(_passed(v), mask)


def bn_bwd_reduce(grad, x, M, C, stat, residual, rstat, mask, relu, T, part, y):
    g = _masked(grad, x, stat, mask, relu, M, C)
    planes = [g, g * (rows(x, M, C).to(stat.dtype) - stat[0])]
    if rstat is not None:
        planes.append(g * (rows(residual, M, C).to(stat.dtype) - rstat[0]))
    for t, (lo, hi) in enumerate(_bounds(M, T)):
        for p, plane in enumerate(planes):
            part[p, t] = plane[lo:hi].sum(0)
    if y is not None:
        v = _normalise(rows(x, M, C), stat).to(y.dtype)
        rows(y, M, C).copy_(torch.relu(v) if relu else v)


def bn_bwd_finalize(part, plane, T, M, C, stat, batch_stats, dweight, dbias, coef):
    sum_g, sum_gx = part[0].double().sum(0), part[plane].double().sum(0)
    invstd, scale = stat[2].double(), stat[3].double()
    if dweight is not None:
        dweight.copy_(sum_gx * invstd)
    if dbias is not None:
        dbias.copy_(sum_g)
    coef[0] = scale
    coef[1] = -scale * invstd.square() * sum_gx / M if batch_stats else 0
    coef[2] = -scale * sum_g / M if batch_stats else 0


def bn_bwd_apply(grad, x, M, C, stat, coef, residual, rstat, rcoef, mask, relu, dx, dres):
    g = _masked(grad, x, stat, mask, relu, M, C)
    rows(dx, M, C).copy_(coef[0] * g + coef[1] * (rows(x, M, C).to(g.dtype) - stat[0]) + coef[2])
    if dres is not None:
        r = g
        if rcoef is not None:
            r = rcoef[0] * g + rcoef[1] * (rows(residual, M, C).to(g.dtype) - rstat[0]) + rcoef[2]
        rows(dres, M, C).copy_(r)


# ---- batch_norm_act in one launch (csrc/cuda/launch_cuda.h)


def bn_one_pass_fwd(x, M, C, weight, bias, eps, residual, rstat, relu, T, part, stat, out, mask):
    bn_stats(x, M, C, T, part)
    bn_finalize(part, T, C, weight, bias, eps, stat)
    bn_apply(x, M, C, stat, residual, rstat, relu, out, mask)


def bn_one_pass_bwd(grad, x, M, C, stat, mask, relu, batch_stats, T, part, dweight, dbias, coef, dx, dres, y):
    bn_bwd_reduce(grad, x, M, C, stat, None, None, mask, relu, T, part, y)
    bn_bwd_finalize(part, 1, T, M, C, stat, batch_stats, dweight, dbias, coef)
    bn_bwd_apply(grad, x, M, C, stat, coef, None, None, None, mask, relu, dx, dres)


# ---- conv_bn_act


def bias_act(x, M, C, bias, residual, relu, out):
    acc = acc_dtype(x.dtype)
    v = rows(x, M, C).to(acc)
    if bias is not None:
        v = v + bias
    if residual is not None:
        v = v + rows(residual, M, C).to(acc)
    rows(out, M, C).copy_(torch.relu(v) if relu else v)


# ---- bottleneck, basic_block


def mask_add(a, grad, mask, M, C, out):
    acc = acc_dtype(a.dtype)
    g = rows(grad, M, C).to(acc)
    g = torch.where(_unpack(mask, M, C), g, torch.zeros((), dtype=acc, device=g.device))
    rows(out, M, C).copy_(rows(a, M, C).to(acc) + g)


# ---- stem


def _windows(t, k, stride, pad, fill):
    """``[N, H, W, C]`` -> ``[N, P, Q, C, k*k]``, padded with ``fill``."""
    padded = torch.nn.functional.pad(t, (0, 0, pad, pad, pad, pad), value=fill)
    u = padded.unfold(1, k, stride).unfold(2, k, stride)
    return u.reshape(*u.shape[:4], k * k)


def stem_fwd(x, N, H, W, C, stat, P, Q, k, stride, pad, out, idx):
    v = _normalise(rows(x, N * H * W, C), stat).to(x.dtype).reshape(N, H, W, C)
    w = _windows(v, k, stride, pad, float("-inf"))
    # torch.argmax does not promise the first maximum, so the order is spelt out; amax is NaN where the window has one.
    top = w.amax(-1, keepdim=True)
    wins = (w == top) | w.isnan()
    first = torch.where(wins, torch.arange(k * k, device=x.device), k * k).amin(-1)
    value = w.gather(-1, first[..., None])[..., 0]
    rows(out, N * P * Q, C).copy_(torch.relu(value).reshape(-1, C))
    if idx is not None:
        code = torch.where(_passed(value), first, 255)
        rows(idx, N * P * Q, C).copy_(code.reshape(-1, C))


def _scatter(grad, idx, N, H, W, C, P, Q, k, stride, pad, acc):
    """The pooled gradient carried back to the pixels it came from, ``[N*H*W, C]``."""
    g = rows(grad, N * P * Q, C).to(acc).reshape(N, P, Q, C)
    code = rows(idx, N * P * Q, C).reshape(N, P, Q, C).long()
    full = torch.zeros(N, H + 2 * pad + k, W + 2 * pad + k, C, dtype=acc, device=g.device)
    for tap in range(k * k):
        r, s = divmod(tap, k)
        part = torch.where(code == tap, g, torch.zeros((), dtype=acc, device=g.device))
        full[:, r : r + P * stride : stride, s : s + Q * stride : stride] += part
    return full[:, pad : pad + H, pad : pad + W].reshape(N * H * W, C)


def stem_bwd_reduce(grad, idx, x, N, H, W, C, stat, P, Q, k, stride, pad, T, part):
    M = N * P * Q
    g = rows(grad, M, C).to(stat.dtype).reshape(N, P, Q, C)
    code = rows(idx, M, C).reshape(N, P, Q, C).long()
    g = torch.where(code == 255, torch.zeros((), dtype=g.dtype, device=g.device), g)
    w = _windows(rows(x, N * H * W, C).reshape(N, H, W, C).to(stat.dtype), k, stride, pad, 0.0)
    chosen = w.gather(-1, torch.where(code == 255, 0, code)[..., None])[..., 0]
    gx = torch.where(code == 255, torch.zeros((), dtype=g.dtype, device=g.device), g * (chosen - stat[0]))
    for t, (lo, hi) in enumerate(_bounds(M, T)):
        part[0, t] = g.reshape(M, C)[lo:hi].sum(0)
        part[1, t] = gx.reshape(M, C)[lo:hi].sum(0)


def stem_bwd_apply(grad, idx, x, N, H, W, C, stat, coef, P, Q, k, stride, pad, dx):
    g = _scatter(grad, idx, N, H, W, C, P, Q, k, stride, pad, stat.dtype)
    xs = rows(x, N * H * W, C).to(g.dtype)
    rows(dx, N * H * W, C).copy_(coef[0] * g + coef[1] * (xs - stat[0]) + coef[2])
