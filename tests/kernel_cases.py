"""Launch-level cases: every launch function, every variant of its arguments, checked against the reference in float64.

``fastres.verify`` knows the arguments and outputs of each launch function on random data; the cases here start from
those and add what a product need not check on every start: optional arguments left out, huge means, integers, odd
sizes, tiles without rows, misaligned storage, guard zones around outputs, aliases that launch.h allows.
"""

from __future__ import annotations

import functools
import math
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from fastres import dispatch, testing, verify
from fastres.backends import reference
from fastres.backends.reference import acc_dtype

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = {t: str(t).removeprefix("torch.") for t in DTYPES}
GUARD = 64  # elements on either side of an output; a cache line at least in every dtype


# ---- who can run the launch functions here


def request(dtype=torch.float32, op="batch_norm_act", C=64) -> dispatch.Request:
    return dispatch.Request(op, CPU, dtype, C)


@dataclass(frozen=True)
class Kernels:
    """One way to run the launch functions: a backend, with its instruction set or its fiber order."""

    backend: str
    isa: str = ""
    seed: int = -1

    def __str__(self) -> str:
        return "-".join([self.backend, *([self.isa] if self.isa else []), *([str(self.seed)] * (self.seed >= 0))])

    @property
    def launch(self):
        return dispatch.load(self.backend)

    def refuses(self, dtype: torch.dtype) -> list[str]:
        return refuses(self.backend, dtype)

    @property
    def slow(self) -> bool:
        """Simulated hardware: a thousandth of the speed, so fewer and smaller cases."""
        return self.backend in ("emulator", "triton")

    @contextmanager
    def active(self):
        if self.isa:
            before = self.launch.isa()
            self.launch.set_isa(self.isa)
            try:
                yield self.launch
            finally:
                self.launch.set_isa(before)
        elif self.seed >= 0:
            before, self.launch.seed = self.launch.seed, self.seed
            try:
                yield self.launch
            finally:
                self.launch.seed = before
        else:
            yield self.launch


@functools.cache
def refuses(backend: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """Why a backend does not serve CPU tensors of ``dtype`` here, [] if it does."""
    return dispatch.load(backend).why_not(request(dtype))


def absent(backend: str) -> str:
    """Why a backend cannot run on CPU tensors here, or an empty string."""
    return "; ".join(refuses(backend))


def kernels(backends: list[str]) -> list[Kernels]:
    found = []
    for name in backends:
        if absent(name):
            continue
        if name == "cpu":
            found += [Kernels(name, isa=isa) for isa in dispatch.load(name).available_isas()]
        elif name == "emulator":
            found += [Kernels(name, seed=seed) for seed in (0, 1)]
        else:
            found.append(Kernels(name))
    return found


# ---- cases


@dataclass
class Case:
    """Arguments by name; ``outputs`` are buffers of the right shape and dtype (None: not asked for)."""

    function: str
    label: str
    args: dict
    outputs: dict
    rows: int
    alias: dict = field(default_factory=dict)  # output -> the input whose very buffer it is
    truth: dict = field(default_factory=dict)  # filled by truth()

    def __str__(self) -> str:
        return f"{self.function} ({self.label})"

    def variant(self, label: str, args: dict | None = None, outputs: dict | None = None, alias=None) -> Case:
        label = ", ".join(filter(None, (self.label, label)))
        args, outputs = {**self.args, **(args or {})}, {**self.outputs, **(outputs or {})}
        return Case(self.function, label, args, outputs, self.rows, alias or {})


def _variants(base: list[Case]) -> list[Case]:
    """The cases of ``verify`` plus the legal ways to leave arguments out or to alias."""
    f, first = base[0].function, base[0]
    found = list(base)
    if f == "add_relu_fwd":
        found.append(first.variant("no mask", outputs=dict(mask=None)))
        found.append(first.variant("x is the residual", args=dict(residual=first.args["x"])))
    elif f in ("bn_finalize", "bn_fold"):
        found.append(first.variant("no weight", dict(weight=None)))
        found.append(first.variant("no weight, no bias", dict(weight=None, bias=None)))
    elif f == "bn_apply":
        found += [case.variant("no mask", outputs=dict(mask=None)) for case in base]
        found += [case.variant("no ReLU", dict(relu=False), dict(mask=None)) for case in base]
        found.append(first.variant("out is x", outputs=dict(mask=None), alias=dict(out="x")))
        found.append(base[2].variant("out is x", alias=dict(out="x")))
    elif f == "bn_bwd_reduce":
        mask, two = base[1].args["mask"], base[1]
        found.append(first.variant("no y", outputs=dict(y=None)))
        found.append(first.variant("no ReLU", dict(relu=False), dict(y=None)))
        found.append(first.variant("mask given", dict(mask=mask), dict(y=None)))
        found.append(two.variant("no ReLU", dict(relu=False, mask=None)))
    elif f == "bn_bwd_finalize":
        found.append(first.variant("plane 1", dict(plane=1)))
        found.append(first.variant("given statistics", dict(batch_stats=False)))
        found.append(first.variant("coef alone", outputs=dict(dweight=None, dbias=None)))
    elif f == "bn_bwd_apply":
        recomputed, residual, two = base
        found.append(recomputed.variant("no ReLU", dict(relu=False)))
        found.append(recomputed.variant("dx is grad", alias=dict(dx="grad")))
        found.append(residual.variant("no dres", outputs=dict(dres=None)))
        found.append(residual.variant("dx is grad", alias=dict(dx="grad")))
        found.append(two.variant("no ReLU", dict(relu=False, mask=None)))
        found.append(two.variant("dx is grad", alias=dict(dx="grad")))
    elif f == "bias_act":
        found.append(first.variant("no bias", dict(bias=None)))
        found.append(first.variant("no residual, no ReLU", dict(residual=None, relu=False)))
        found.append(first.variant("out is x", alias=dict(out="x")))
    elif f == "mask_add":
        found.append(first.variant("out is a", alias=dict(out="a")))
    return found


#: kernel, stride, padding and image of the pooling cases: a ResNet's, one without overlap, one with a window larger
#: than its stride allows to skip, and an image smaller than the window plus its padding.
POOLS = ((3, 2, 1, (13, 15)), (2, 2, 0, (6, 7)), (5, 3, 2, (11, 8)), (3, 1, 1, (2, 1)))


def _pooled(base: list[Case], C: int, dtype) -> list[Case]:
    found = []
    for k, stride, pad, (H, W) in POOLS:
        for case in base:
            N, args = 2, dict(case.args, H=H, W=W, k=k, stride=stride, pad=pad)
            P, Q = (H + 2 * pad - k) // stride + 1, (W + 2 * pad - k) // stride + 1
            args.update(N=N, P=P, Q=Q, x=torch.empty(N, H, W, C, dtype=dtype))
            outputs, small = dict(case.outputs), torch.empty(N, P, Q, C, dtype=dtype)
            if "grad" in args:
                args.update(grad=small, idx=small.to(torch.uint8))
            if "dx" in outputs:
                outputs["dx"] = torch.empty_like(args["x"])
            if "out" in outputs:
                outputs.update(out=small, idx=small.to(torch.uint8))
            found.append(Case(case.function, f"{k}x{k} of {H}x{W}", args, outputs, N * P * Q))
    if base[0].function == "stem_fwd":
        found.append(found[0].variant("no taps", outputs=dict(idx=None)))
    return found


@functools.lru_cache(maxsize=32)  # the same cases go to every backend in turn
def cases(function: str, dtype, C: int, M: int, kind: str, T: int, seed: int = 0) -> list[Case]:
    """All variants of one launch function on values of ``kind`` (see ``testing.fill``) with ``T`` row tiles."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = [Case(function, label, a, o, M) for label, a, o in verify._cases(function, CPU, dtype, C, M, T)]
    found = _pooled(base, C, dtype) if function.startswith("stem") else _variants(base)
    return [_refilled(case, dtype, C, kind, seed) for case in found]


def _stat(C: int, acc, kind: str, mean: float, seed: int) -> torch.Tensor:
    """A stat of launch.h with the given mean; scales of both signs, none near zero."""
    g = testing.generator(seed)
    stat = torch.empty(5, C, dtype=torch.float64)
    if kind == "integers":  # powers of two, so that nothing rounds
        stat[0] = torch.randint(-2, 3, (C,), generator=g)
        stat[2] = 1
        stat[3] = torch.randint(0, 2, (C,), generator=g) * 3 - 1  # -1 or 2
        stat[4] = torch.randint(-2, 3, (C,), generator=g)
    else:
        stat[0] = mean + torch.randn(C, generator=g, dtype=torch.float64)
        stat[2] = 0.7 + torch.rand(C, generator=g, dtype=torch.float64)
        stat[3] = stat[2] * torch.where(torch.rand(C, generator=g) < 0.3, -1.0, 1.0)
        stat[4] = torch.randn(C, generator=g, dtype=torch.float64)
    stat[1] = stat[2] ** -2
    return stat.to(acc)


def _refilled(case: Case, dtype, C: int, kind: str, seed: int) -> Case:
    """The case with values of ``kind`` where ``verify`` put normal ones."""
    args, acc = dict(case.args), acc_dtype(dtype)
    means = {"x": testing.mean_of(kind, dtype), "residual": testing.mean_of(kind, dtype)}
    for i, name in enumerate(("x", "residual", "grad", "a")):
        t = args.get(name)
        if t is None:
            continue
        same = name == "residual" and t is case.args.get("x")
        fill = "normal" if kind == "huge_mean" and name not in means else kind
        args[name] = args["x"] if same else testing.fill(t.shape, dtype, fill, seed + 10 * i + 1)
    for i, (name, of) in enumerate((("stat", "x"), ("rstat", "residual"))):
        if args.get(name) is not None:
            args[name] = _stat(C, acc, kind, means[of], seed + 100 + i)
    if kind == "integers":
        for i, name in enumerate(("coef", "rcoef", "bias", "weight", "part", "running_mean")):
            if args.get(name) is not None and case.function not in ("bn_finalize", "bn_fold"):
                args[name] = testing.fill(args[name].shape, acc, "integers", seed + 200 + i).clamp_(-2, 2)
    if case.function == "bn_stats" and kind == "normal":
        args["x"] = (args["x"].double() + 100).to(dtype)
    if case.args.get("mask") is None and args.get("relu") and "stat" in args and kind != "integers":
        _keep_clear(args, dtype)
    if "idx" in args:
        args["idx"] = torch.empty_like(args["idx"])
        image = {k: v for k, v in args.items() if k in "x N H W C stat P Q k stride pad".split()}
        reference.stem_fwd(**image, out=torch.empty(args["idx"].shape, dtype=dtype), idx=args["idx"])
    return Case(case.function, case.label, args, case.outputs, case.rows, case.alias)


def _keep_clear(args: dict, dtype) -> None:
    """Move x where the recomputed ReLU would depend on the last bit of the accumulator."""
    for _ in range(4):
        near = pre_activation(args).abs() < 0.01
        args["x"] = torch.where(near.reshape(args["x"].shape), args["x"] + 4, args["x"])
    assert not (pre_activation(args).abs() < 0.01).any()


def pre_activation(args: dict) -> torch.Tensor:
    """``[M, C]`` in float64: what the ReLU of the case looks at."""
    C = args["C"]
    x = args["x"].double().reshape(-1, C)
    v = reference._normalise(x, args["stat"].double())
    r = args.get("residual")
    if r is None:
        return v
    r = r.double().reshape(-1, C)
    return v + (r if args.get("rstat") is None else reference._normalise(r, args["rstat"].double()))


# ---- running a case


def _wide(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _poison(t: torch.Tensor) -> torch.Tensor:
    return t.fill_(float("nan")) if t.is_floating_point() else t.fill_(0xA5)


def _bits(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1).view(torch.uint8) if t.numel() else t


def run(case: Case, launch, place=lambda t: t.clone()) -> dict[str, torch.Tensor]:
    """Launch on copies made by ``place``; outputs start poisoned inside guard zones.

    Asserts that inputs and guard zones are left alone. Returns the outputs by name.
    """
    inputs = {k: place(v) if isinstance(v, torch.Tensor) else v for k, v in case.args.items()}
    guarded, outputs = [], {}
    for name, like in case.outputs.items():
        if like is None:
            outputs[name] = None
        elif name in case.alias:
            outputs[name] = inputs[case.alias[name]]
        else:
            whole = _poison(like.new_empty(like.numel() + 2 * GUARD))
            outputs[name] = whole[GUARD : GUARD + like.numel()].view(like.shape)
            guarded.append((name, whole, like.numel()))
    getattr(launch, case.function)(**inputs, **outputs)
    for name, whole, n in guarded:
        for side in (whole[:GUARD], whole[GUARD + n :]):
            assert torch.equal(_bits(side), _bits(_poison(side.clone()))), f"{case}: wrote outside {name}"
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and name not in case.alias.values():
            assert torch.equal(_bits(value.contiguous()), _bits(case.args[name].contiguous())), f"{case}: wrote {name}"
    return {k: v for k, v in outputs.items() if v is not None}


def truth(case: Case) -> dict[str, torch.Tensor]:
    """The outputs in float64, by the reference backend."""
    if not case.truth:
        case.truth.update(_truth(case))
    return case.truth


def _truth(case: Case) -> dict[str, torch.Tensor]:
    args = {k: _wide(v) for k, v in case.args.items()}
    outputs = {k: None if v is None else _poison(_wide(v).clone()) for k, v in case.outputs.items()}
    getattr(reference, case.function)(**args, **outputs)
    return {k: v for k, v in outputs.items() if v is not None}


# ---- judging a case


def judge(case: Case, launch, ours: dict[str, torch.Tensor]) -> None:
    """Every output of the case within its rule; fails with the first indices and values."""
    expected = truth(case)
    peer = None
    for name, got in ours.items():
        want, what = expected[name], f"{case}: {name}"
        if name == "part":
            if peer is None:
                peer = run(case, reference)
            verdict = _judge_part(case, got, peer[name], want, what)
        elif name in ("stat", "coef", "dweight", "dbias"):
            # Computed in float64 and rounded: one ULP of fp32; in fp64 the sum over the tiles is the error.
            terms = case.args.get("T", 1)
            verdict = testing.rounded_once(got, want, roundings=4 + 4 * math.sqrt(terms), what=what)
            if got.dtype == torch.float32:
                error = (got.double() - want).abs()
                limit = 2 * torch.finfo(torch.float32).eps * want.abs() + 1e-12 * want.abs().amax()
                assert (error <= limit).all(), f"{what}: {testing._listing(error > limit, got.double(), want)}"
        elif name == "mask":
            verdict = _judge_mask(case, got, ours["out"], what)
        elif name == "idx":
            verdict = _judge_taps(case, got, ours["out"], what)
        else:
            verdict = testing.rounded_once(got, want, what=what)
        assert verdict, verdict.message


def _judge_part(case: Case, got, peer, want, what) -> testing.Verdict:
    """Per tile and channel sums of R rows; counts are exact."""
    rows = max(1, -(-case.rows // case.args["T"]))
    if case.function == "bn_stats":
        verdict = testing.exactly(got[0], want[0].to(got.dtype), f"{what}[count]")
        for plane, name in ((1, "mean"), (2, "M2")) if verdict else ():
            verdict = testing.within_budget(got[plane], peer[plane], want[plane], terms=rows, what=f"{what}[{name}]")
            if not verdict:
                break
        return verdict
    for plane, name in enumerate(("sum g", "sum g (x - mean)", "sum g (r - mean)")[: len(want)]):
        # The terms are of size one and may cancel in a sum of few channels.
        scale = max(1.0, want[plane].abs().max().item())
        verdict = testing.within_budget(
            got[plane], peer[plane], want[plane], terms=rows, scale=scale, what=f"{what}[{name}]"
        )
        if not verdict:
            break
    return verdict


def unpack(mask: torch.Tensor, M: int, C: int) -> torch.Tensor:
    """Bits of a mask ``[M, ceil(C/8)]`` as booleans ``[M, 8 * ceil(C/8)]``, the unused ones included."""
    bits = mask.reshape(M, -(-C // 8), 1) >> torch.arange(8, dtype=torch.uint8)
    return (bits & 1).bool().flatten(1)


def _judge_mask(case: Case, mask, out, what) -> testing.Verdict:
    if case.function == "add_relu_fwd":
        n = case.args["n"]
        pre = (case.args["x"].double() + case.args["residual"].double()).reshape(-1)
        passed = unpack(mask, 1, n)[0]
        assert not passed[n:].any(), f"{what}: unused bits are not 0"
        # The sign of a sum of two floats is exact in any precision.
        return testing.exactly(passed[:n], ~(pre <= 0), what)
    M, C = case.args["M"], case.args["C"]
    bits = unpack(mask, M, C)
    assert not bits[:, C:].any(), f"{what}: unused bits are not 0"
    passed = bits[:, :C]
    consistent = testing.exactly(passed, ~(out.reshape(M, C) <= 0), f"{what} against out")
    if not consistent:
        return consistent
    return testing.mask_verdict(passed, pre_activation(case.args), 16 * torch.finfo(acc_dtype(out.dtype)).eps, what)


def _judge_taps(case: Case, idx, out, what) -> testing.Verdict:
    """A tap wins whose value is the output; 255 exactly where the output is zero."""
    a = case.args
    closed = testing.exactly(idx == 255, out <= 0, f"{what} == 255 against out")
    if not closed:
        return closed
    v = pre_activation(a).reshape(a["N"], a["H"], a["W"], a["C"])
    windows = reference._windows(v, a["k"], a["stride"], a["pad"], float("-inf"))
    tap = torch.where(idx == 255, 0, idx).long()
    assert (tap < a["k"] ** 2).all(), f"{what}: no such tap"
    chosen = windows.gather(-1, tap[..., None])[..., 0].clamp_min(0)
    return testing.rounded_once(out, torch.where(idx == 255, 0.0, chosen), what=f"{what}: value of the winning tap")


def matrices(k: Kernels, function: str) -> list[tuple[int, int]]:
    """(C, M) of a launch test. Fewer for simulated hardware, and for pooling, which brings images of its own."""
    if function.startswith("stem"):
        return [(7, 0), (20, 0)] if k.slow else [(1, 0), (7, 0), (20, 0), (64, 0)]
    return [(1, 131), (7, 67), (8, 0), (20, 5), (100, 37)] if k.slow else list(testing.ODD_MATRICES)
