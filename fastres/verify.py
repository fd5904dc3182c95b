"""A GPU kernel proves itself right before it serves.

Compilers and drivers of other machines are beyond our tests: on first use of a backend for an op, dtype and
channel count on a GPU, each launch function involved runs once on random data and is held against the
reference backend in float64. A miss switches the backend off for that request, with one warning.
CPU kernels are compiled at build time and tested as such; they are not checked again.
"""

from __future__ import annotations

import torch

from fastres.backends import reference

_ROWS = 1031  # prime: partial tiles in every kernel


class NotVerifiedYet(RuntimeError):
    """No verdict can be had now; a later call may have one."""


def failure(request, name: str, launch, functions: tuple[str, ...]) -> str:
    """Why ``launch`` must not serve ``request``, or an empty string. Raises NotVerifiedYet under graph capture."""
    if request.device.type != "cuda" or name == "reference":
        return ""
    if torch.cuda.is_current_stream_capturing():
        raise NotVerifiedYet("not verified yet and a CUDA graph is being captured (run one warm-up step first)")
    with torch.no_grad(), torch.random.fork_rng(devices=[request.device]):
        torch.manual_seed(0)
        for function in functions:
            wrong = check(function, launch, request.device, request.dtype, request.C or 64)
            if wrong:
                return wrong
    return ""


def check(function: str, launch, device, dtype: torch.dtype, C: int, M: int = _ROWS, T: int | None = None) -> str:
    """Run one launch function against the reference in float64; a sentence on the first miss, else empty."""
    try:
        if T is None and function.startswith("bn_one_pass"):
            T = launch.one_pass_tiles(torch.empty(0, dtype=dtype, device=device), M, C, 2)
            if not T:
                return f"{function} has no tiles for {M} x {C} elements"
        cases = _cases(function, device, dtype, C, M, T or launch.tiles(M, C))
        for label, args, outputs in cases:
            ours = {key: _poisoned(buffer) for key, buffer in outputs.items()}
            truth = {key: _poisoned(_wide(buffer)) for key, buffer in outputs.items()}
            getattr(launch, function)(**args, **ours)
            getattr(reference, function)(**{k: _wide(v) for k, v in args.items()}, **truth)
            for key, buffer in ours.items():
                wrong = _compare(buffer, truth[key], dtype, M)
                if wrong:
                    return f"{function} ({label}): output {key} {wrong}"
            wrong = _repeats(function, launch, args, ours)
            if wrong:
                return f"{function} ({label}): output {wrong}"
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{function} failed: {type(error).__name__}: {error}"
    return ""


def _repeats(function: str, launch, args: dict, ours: dict) -> str:
    """Whether the launch without checks gives the same bits, twice: Triton's first such launch is of another make."""
    trusted = getattr(launch, "trusted", launch)
    for _ in range(2 if trusted is not launch else 0):
        again = {key: _poisoned(buffer) for key, buffer in ours.items()}
        getattr(trusted, function)(**args, **again)
        for key, buffer in again.items():
            if not torch.equal(buffer, ours[key]):
                return f"{key} has other bits without argument checks"
    return ""


def _wide(value):
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if floating else value


def _poisoned(buffer: torch.Tensor) -> torch.Tensor:
    return torch.full_like(buffer, float("nan")) if buffer.is_floating_point() else torch.full_like(buffer, 0xA5)


def _compare(ours: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype, M: int) -> str:
    if not ours.is_floating_point():
        # Masks and tap codes may flip where the rounded value sits on the decision: a bounded share only.
        share = (ours != truth).double().mean().item() if ours.numel() else 0.0
        # In 16 bit a pooling window may have two maxima that float64 tells apart: up to 4.6% of 2240 windows over 200
        # seeds, right CPU kernels in bfloat16. A wrong tap is wrong in most windows.
        allowed = 0.02 if dtype.itemsize > 2 else 0.1
        return f"differs in {share:.2%} of its bytes" if share > allowed else ""
    scale = truth.abs().max().item() if truth.numel() else 0.0
    # Activations: one rounding of dtype. Per-channel vectors: fp32 sums of M terms.
    eps = torch.finfo(ours.dtype).eps
    limit = (2 * eps + 2 * M**0.5 * torch.finfo(torch.float32).eps) * max(scale, 1e-6)
    error = (ours.double() - truth).abs()
    bad = ~(error <= limit)
    # A mask flip changes single elements by their own size; those are counted, not bounded.
    share = bad.double().mean().item() if bad.numel() else 0.0
    return f"is off by up to {error.max().item():.3g} of {scale:.3g} in {share:.2%}" if share > 0.005 else ""


def _cases(function: str, device, dtype, C: int, M: int, T: int):
    """(label, inputs by name, output buffers by name) of one launch function on random data."""

    def rand(*shape, kind=dtype):
        return torch.randn(*shape, device=device, dtype=torch.float32).to(kind)

    acc = reference.acc_dtype(dtype)

    def empty(*shape, kind=dtype):
        return torch.empty(*shape, device=device, dtype=kind)

    def bits(n=-(-C // 8)):
        mask = torch.randint(0, 256, (M, n), device=device, dtype=torch.uint8)
        if n == -(-C // 8) and C % 8:
            mask[:, -1] &= (1 << C % 8) - 1
        return mask

    def stat():
        s = rand(5, C, kind=acc)
        s[1] = s[1].square() + 0.5
        s[2] = (s[1] + 1e-5).rsqrt()
        return s

    coef, vec = rand(3, C, kind=acc), rand(C, kind=acc)
    if function == "add_relu_fwd":
        return [("", dict(x=rand(M, C), residual=rand(M, C), n=M * C),
                 dict(out=empty(M, C), mask=empty(-(-M * C // 8), kind=torch.uint8)))]  # fmt: skip
    if function == "add_relu_bwd":
        mask = torch.randint(0, 256, (-(-M * C // 8),), device=device, dtype=torch.uint8)
        return [("", dict(grad=rand(M, C), mask=mask, n=M * C), dict(dx=empty(M, C)))]
    if function == "bn_stats":
        x = rand(M, C) + 100
        return [("mean 100", dict(x=x, M=M, C=C, T=T), dict(part=empty(3, T, C, kind=acc)))]
    if function == "bn_finalize":
        part = empty(3, T, C, kind=acc)
        reference.bn_stats(rand(M, C) + 3, M, C, T, part)
        return [("", dict(part=part, T=T, C=C, weight=vec, bias=vec, eps=1e-5), dict(stat=empty(5, C, kind=acc)))]
    if function == "bn_fold":
        args = dict(running_mean=vec, running_var=vec.square() + 0.1, weight=vec, bias=vec, eps=1e-5, C=C)
        return [("", args, dict(stat=empty(5, C, kind=acc)))]
    if function == "bn_apply":
        out = dict(out=empty(M, C), mask=empty(M, -(-C // 8), kind=torch.uint8))
        base = dict(x=rand(M, C), M=M, C=C, stat=stat(), relu=True)
        return [
            ("plain", dict(base, residual=None, rstat=None), out),
            ("residual", dict(base, residual=rand(M, C), rstat=None), out),
            ("residual with its own BN", dict(base, residual=rand(M, C), rstat=stat()), out),
        ]
    if function == "bn_bwd_reduce":
        base = dict(grad=rand(M, C), x=rand(M, C), M=M, C=C, stat=stat(), relu=True, T=T)
        return [
            ("mask recomputed", dict(base, residual=None, rstat=None, mask=None),
             dict(part=empty(2, T, C, kind=acc), y=empty(M, C))),
            ("two BNs", dict(base, residual=rand(M, C), rstat=stat(), mask=bits(), y=None),
             dict(part=empty(3, T, C, kind=acc))),
        ]  # fmt: skip
    if function == "bn_bwd_finalize":
        args = dict(part=rand(3, T, C, kind=acc), plane=2, T=T, M=M, C=C, stat=stat(), batch_stats=True)
        return [("", args, dict(dweight=empty(C, kind=acc), dbias=empty(C, kind=acc), coef=empty(3, C, kind=acc)))]
    if function == "bn_bwd_apply":
        base = dict(grad=rand(M, C), x=rand(M, C), M=M, C=C, stat=stat(), coef=coef, relu=True)
        return [
            ("mask recomputed", dict(base, residual=None, rstat=None, rcoef=None, mask=None, dres=None),
             dict(dx=empty(M, C))),
            ("residual", dict(base, residual=None, rstat=None, rcoef=None, mask=bits()),
             dict(dx=empty(M, C), dres=empty(M, C))),
            ("two BNs", dict(base, residual=rand(M, C), rstat=stat(), rcoef=coef + 1, mask=bits()),
             dict(dx=empty(M, C), dres=empty(M, C))),
        ]  # fmt: skip
    if function == "bn_one_pass_fwd":
        made = dict(part=empty(3, T, C, kind=acc), stat=empty(5, C, kind=acc))
        out = dict(made, out=empty(M, C), mask=empty(M, -(-C // 8), kind=torch.uint8))
        base = dict(x=rand(M, C) + 10, M=M, C=C, weight=vec, bias=vec, eps=1e-5, relu=True, T=T)
        return [
            ("plain", dict(base, residual=None, rstat=None), out),
            ("residual", dict(base, residual=rand(M, C), rstat=None), out),
            ("residual with its own BN", dict(base, residual=rand(M, C), rstat=stat()), out),
        ]
    if function == "bn_one_pass_bwd":
        made = dict(part=empty(2, T, C, kind=acc), coef=empty(3, C, kind=acc), dx=empty(M, C))
        made |= dict(dweight=empty(C, kind=acc), dbias=empty(C, kind=acc))
        base = dict(grad=rand(M, C), x=rand(M, C), M=M, C=C, stat=stat(), relu=True, batch_stats=True, T=T)
        return [
            ("mask recomputed", dict(base, mask=None, dres=None), dict(made, y=empty(M, C))),
            ("residual", dict(base, mask=bits(), y=None), dict(made, dres=empty(M, C))),
        ]
    if function == "bias_act":
        return [("", dict(x=rand(M, C), M=M, C=C, bias=vec, residual=rand(M, C), relu=True), dict(out=empty(M, C)))]
    if function == "mask_add":
        return [("", dict(a=rand(M, C), grad=rand(M, C), mask=bits(), M=M, C=C), dict(out=empty(M, C)))]
    N, H, W, k, stride, pad = 2, 13, 15, 3, 2, 1
    P, Q = (H + 2 * pad - k) // stride + 1, (W + 2 * pad - k) // stride + 1
    pool = dict(P=P, Q=Q, k=k, stride=stride, pad=pad)
    image = dict(x=rand(N, H, W, C), N=N, H=H, W=W, C=C, stat=stat())
    if function == "stem_fwd":
        return [("", dict(image, **pool), dict(out=empty(N, P, Q, C), idx=empty(N, P, Q, C, kind=torch.uint8)))]
    idx = empty(N, P, Q, C, kind=torch.uint8)
    reference.stem_fwd(**image, **pool, out=empty(N, P, Q, C), idx=idx)
    base = dict(image, **pool, grad=rand(N, P, Q, C), idx=idx)
    if function == "stem_bwd_reduce":
        return [("", dict(base, T=T), dict(part=empty(2, T, C, kind=acc)))]
    if function == "stem_bwd_apply":
        return [("", dict(base, coef=coef), dict(dx=empty(N, H, W, C)))]
    raise AssertionError(f"no verification for {function}")
