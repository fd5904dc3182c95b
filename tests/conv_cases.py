"""Cases for convolution kernels: problems, hooks and tiles, their inputs, and the rules their outputs are held to.

A case calls one function of ``fastres/backends/reference_conv.py`` and, with the same arguments, a kernel of ours.
Inputs lie between NaN, outputs start as NaN between guard zones, so that a read or a write out of place shows.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from fastres import testing
from fastres.backends import reference, reference_conv, triton_conv
from fastres.backends.reference import acc_dtype
from fastres.problem import ConvProblem

GUARD = 64  # elements on either side of a buffer
NAN = float("nan")

#: Small images with what trips a convolution: odd sizes, strides, ragged tiles and channels, groups, empty classes.
PROBLEMS = {
    "3x3": ConvProblem(2, 7, 9, 20, 24, 3, 3, padding=(1, 1)),
    "3x3 whole blocks": ConvProblem(3, 6, 5, 32, 16, 3, 3, padding=(1, 1)),
    "3x3 no padding": ConvProblem(1, 6, 5, 16, 16, 3, 3),
    "1x1": ConvProblem(2, 5, 7, 16, 48, 1, 1),
    "1x1 padded": ConvProblem(1, 5, 4, 16, 16, 1, 1, padding=(1, 1)),
    "3x3 stride 2 odd": ConvProblem(2, 9, 7, 16, 24, 3, 3, (2, 2), (1, 1)),
    "3x3 stride 2 even": ConvProblem(2, 8, 6, 24, 16, 3, 3, (2, 2), (1, 1)),
    "1x1 stride 2": ConvProblem(2, 7, 6, 16, 40, 1, 1, (2, 2)),
    "dilation 2": ConvProblem(1, 9, 8, 16, 16, 3, 3, padding=(2, 2), dilation=(2, 2)),
    "groups 2": ConvProblem(1, 6, 5, 24, 40, 3, 3, padding=(1, 1), groups=2),
    "depthwise": ConvProblem(1, 5, 6, 5, 5, 3, 3, (2, 2), (1, 1), groups=5),
    "stem": ConvProblem(1, 13, 12, 3, 20, 7, 7, (2, 2), (3, 3)),
    "mixed axes": ConvProblem(1, 8, 9, 6, 9, 3, 2, (2, 1), (1, 2), (1, 2), groups=3),
    "stride 3": ConvProblem(1, 8, 7, 8, 8, 2, 2, (3, 3)),
    "stride 4, dilation 2": ConvProblem(1, 11, 9, 8, 8, 3, 3, (4, 2), (2, 2), (2, 3)),
    "odd channels": ConvProblem(1, 4, 5, 7, 9, 3, 3, padding=(1, 1)),
}

#: What may ride along; the last of each kind is everything that can.
HOOKS = {
    "fprop": (
        (),
        ("stats",),
        ("bias", "stats"),
        ("bias", "relu", "residual"),
        ("prologue",),
        ("prologue", "stats"),
        ("bias", "prologue", "relu", "residual"),
    ),
    "dgrad": (
        (),
        ("add",),
        ("add", "mask"),
        ("act",),
        ("act", "reduce"),
        ("act", "reduce", "y"),
        ("pre",),
        ("bits", "pre"),
        ("act", "pre", "reduce"),
        ("act", "add", "bits", "mask", "pre", "reduce", "y"),
    ),
    "wgrad": ((), ("pre",), ("prologue",), ("pre", "prologue"), ("bits", "pre", "prologue")),
}


def channels_last(shape, dtype) -> torch.Tensor:
    """Poisoned [N, C, H, W] in NHWC, NaN on either side."""
    N, C, H, W = shape
    n = N * C * H * W
    whole = torch.full((n + 2 * GUARD,), NAN, dtype=dtype)
    return whole[GUARD : GUARD + n].view(N, H, W, C).permute(0, 3, 1, 2)


def placed(values: torch.Tensor) -> torch.Tensor:
    return channels_last(values.shape, values.dtype).copy_(values)


def guards_hold(t: torch.Tensor) -> bool:
    whole = t.new_empty(0).set_(t.untyped_storage(), 0, (t.numel() + 2 * GUARD,))
    return bool(whole[:GUARD].isnan().all() and whole[-GUARD:].isnan().all())


def stat(C: int, kind: str, seed: int) -> torch.Tensor:
    """A float32 stat of ``csrc/launch.h``; relu(bn(0)) is not 0 in every other channel at least."""
    g = testing.generator(seed)
    found = torch.empty(5, C)
    if kind == "integers":
        found[0] = torch.randint(-2, 3, (C,), generator=g)
        found[3] = torch.randint(0, 2, (C,), generator=g) * 3 - 1  # -1 or 2
        found[4] = torch.randint(-2, 3, (C,), generator=g)
    else:
        found[0] = torch.randn(C, generator=g)
        found[3] = (0.7 + torch.rand(C, generator=g)) * torch.where(torch.rand(C, generator=g) < 0.3, -1.0, 1.0)
        found[4] = torch.randn(C, generator=g)
    found[4, ::2] = 2 + found[0, ::2] * found[3, ::2]
    found[1], found[2] = 1, 1
    return found


@dataclass
class Case:
    """One call: ``args`` as `reference_conv` takes them, ``outputs`` by name, all CPU tensors."""

    kind: str
    name: str
    problem: ConvProblem
    hooks: tuple[str, ...]
    dtype: torch.dtype
    args: dict
    shapes: dict

    def __str__(self) -> str:
        riding = f" + {', '.join(self.hooks)}" if self.hooks else ""
        return f"{self.kind}{riding} of {self.name} ({self.problem}), {str(self.dtype).removeprefix('torch.')}"


def case(
    kind: str, name: str, hooks=(), dtype=torch.float32, values: str = "normal", seed: int = 0, problems=PROBLEMS
) -> Case:
    """Inputs of ``values`` ("normal", "integers", see `testing.fill`; "huge_mean": a bias does it)."""
    p = problems[name]
    fill = "integers" if values == "integers" else "normal"
    seeds = iter(range(100 * seed, 100 * seed + 100))

    def activation(*shape, scale=1.0):
        t = testing.fill(shape, dtype, fill, next(seeds))
        return placed(t if fill == "integers" else (t * scale).to(dtype))

    x_shape, y_shape = (p.N, p.C, p.H, p.W), (p.N, p.K, p.P, p.Q)
    w_shape = (p.K, p.C // p.groups, p.R, p.S)
    args: dict = {"geometry": p.geometry}
    if kind != "wgrad":
        fan = p.R * p.S * (p.C if kind == "fprop" else p.K) // p.groups
        args["w"] = activation(*w_shape, scale=1 / math.sqrt(fan))
    if kind == "fprop":
        args["x"] = activation(*x_shape)
        shapes = {"out": y_shape}
        if "prologue" in hooks:
            args["stat"] = stat(p.C, fill, next(seeds))
        if "bias" in hooks:
            args["bias"] = testing.fill((p.K,), torch.float32, fill, next(seeds))
            if values == "huge_mean":
                args["bias"] += testing.mean_of("huge_mean", dtype)
        if "residual" in hooks:
            args["residual"] = activation(*y_shape)
        args["relu"] = "relu" in hooks
    else:
        args["dy"] = activation(*y_shape)
        if "pre" in hooks:
            coef = testing.fill((3, p.K), torch.float32, fill, next(seeds)).clamp_(-2, 2)
            args["pre"] = activation(*y_shape), stat(p.K, fill, next(seeds)), coef
        if "bits" in hooks:
            args["bits"] = _mask(p.N * p.P * p.Q, p.K, next(seeds))
    if kind == "dgrad":
        shapes = {"dx": x_shape}
        if "add" in hooks:
            args["add"] = activation(*x_shape)
        if "mask" in hooks:
            args["mask"] = _mask(p.N * p.H * p.W, p.C, next(seeds))
        if "act" in hooks:
            args["stat"] = stat(p.C, fill, next(seeds))
            args["act"] = _clear_of_zero(activation(*x_shape), args["stat"], fill)
        if "y" in hooks:
            shapes["y"] = x_shape
    if kind == "wgrad":
        args["x"] = activation(*x_shape)
        shapes = {"dw": w_shape}
        if "prologue" in hooks:
            args["stat"] = stat(p.C, fill, next(seeds))
    return Case(kind, name, p, tuple(hooks), dtype, args, shapes)


def _mask(M: int, C: int, seed: int) -> torch.Tensor:
    passed = torch.rand(M, C, generator=testing.generator(seed)) < 0.5
    mask = torch.empty(M, -(-C // 8), dtype=torch.uint8)
    reference._pack(passed, mask)
    return mask


def _clear_of_zero(a: torch.Tensor, s: torch.Tensor, fill: str) -> torch.Tensor:
    """Moves values whose ReLU would hang on the last bit of the accumulator. Integers never do."""
    for _ in range(0 if fill == "integers" else 4):
        pre = reference._normalise(a.permute(0, 2, 3, 1).double(), s.double()).permute(0, 3, 1, 2)
        a.copy_(torch.where(pre.abs() < 0.01, a + 4, a))
    return a


# ---- which kernels


def configs(c: Case, all_tiles: bool = False) -> list:
    """Tiles of every kernel of ours that can serve the case, so that tiles and channels are ragged; ``all_tiles`` adds
    whole ones."""
    Config = triton_conv.configs().ConvConfig
    kind, p, hooks = c.kind, c.problem, set(c.hooks)
    plain = tuple(p.stride) == (1, 1) and p.groups == 1
    pointwise = plain and (p.R, p.S) == (1, 1) and tuple(p.padding) == (0, 0)
    if kind == "wgrad":
        found = [Config("wgrad_gather", 64, 32, 16, 4, 3)]
        if all_tiles:
            found.append(Config("wgrad_gather", 32, 16, 32, 4, 2))
        descriptors = plain and not (p.C * c.dtype.itemsize % 16 or p.K * c.dtype.itemsize % 16)
        if descriptors:
            found.append(Config("wgrad_patch", 64, 32, 32, 4, 3, (4, 4, 4)))
        if descriptors and all_tiles:
            found.append(Config("wgrad_patch", 32, 16, 16, 4, 3, (1, 4, 8)))
        if descriptors and pointwise:
            found.append(Config("wgrad_patch", 32, 32, 16, 4, 3))
    else:
        found = [Config("gather", 64, 32, 16, 4, 3)]
        if all_tiles:
            found.append(Config("gather", 32, 16, 32, 8, 2))
        cin, cout = (p.C, p.K) if kind == "fprop" else (p.K, p.C)
        descriptors = plain and cin % 16 == 0 and not hooks & {"prologue", "pre"}
        if descriptors and "mask" not in hooks:
            found.append(Config("patch", 32, 32, 16, 4, 3, (2, 4, 4)))
            if pointwise:
                found.append(Config("patch", 32, 16, 16, 4, 3, (32, 1, 1)))
        if descriptors and pointwise and cout % 16 == 0:
            found.append(Config("rows", 32, 16, 16, 4, 3))
    if p.groups == 1 and p.C <= 8 and p.dilation[1] == 1 and p.R <= 8:
        if (kind == "fprop" and not hooks & {"prologue", "residual"}) or (kind == "wgrad" and not hooks):
            found.append(Config("narrow", 32, 16, 64, 4, 3))
    return found


def run(c: Case, config, dw_dtype: torch.dtype | None = None, module=None) -> dict[str, torch.Tensor]:
    """Outputs of a kernel, ``part`` among them where the hooks ask for it. Asserts that nothing else was written.

    ``module``: of the launchers that know ``config``, with their ``parts``; None: Triton's."""
    module = module or triton_conv.kernels(config)
    outputs = {name: channels_last(shape, c.dtype) for name, shape in c.shapes.items()}
    if dw_dtype is not None:
        outputs["dw"] = channels_last(c.shapes["dw"], dw_dtype)
    if set(c.hooks) & {"stats", "reduce"}:
        T = module.parts(c.kind, c.problem, config)
        planes, C = (3, c.problem.K) if c.kind == "fprop" else (2, c.problem.C)
        outputs["part"] = torch.full((planes * T * C + 2 * GUARD,), NAN)[GUARD:-GUARD].view(planes, T, C)
    before = {k: v.clone() for k, v in c.args.items() if isinstance(v, torch.Tensor)}
    args = dict(c.args)
    if "pre" in args:
        args |= zip(("pre", "pre_stat", "coef"), args["pre"], strict=True)
    getattr(module, f"conv_{c.kind}")(**args, **outputs, config=config)
    for name, t in outputs.items():
        assert guards_hold(t), f"{c}, {config}: wrote outside of {name}"
        assert not t.isnan().any(), f"{c}, {config}: {int(t.isnan().sum())} of {t.numel()} values of {name} missing"
    for name, t in before.items():
        assert torch.equal(t, c.args[name]), f"{c}, {config}: wrote to {name}"
    return outputs


# ---- what is right


def expected(c: Case, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The outputs (without ``part``) by the reference, in float64 or in ``dtype``."""
    dtype = dtype or torch.float64

    def cast(v):
        if isinstance(v, tuple) and v and isinstance(v[0], torch.Tensor):
            return tuple(cast(t) for t in v)
        if not isinstance(v, torch.Tensor) or not v.is_floating_point():
            return v
        return v.to(dtype if v.dim() == 4 else acc_dtype(dtype))

    outputs = {name: torch.full(shape, NAN, dtype=dtype).to(memory_format=torch.channels_last)
               for name, shape in c.shapes.items()}  # fmt: skip
    args = {k: v if k == "geometry" else cast(v) for k, v in c.args.items()}
    getattr(reference_conv, f"conv_{c.kind}")(**args, **outputs)
    return outputs


def terms(c: Case) -> int:
    p = c.problem
    if c.kind == "wgrad":
        return p.N * p.P * p.Q
    return p.R * p.S * (p.C if c.kind == "fprop" else p.K) // p.groups


def judge(c: Case, config, ours: dict[str, torch.Tensor], truth=None, peer=None) -> None:
    """Every output within the error budget, ``part`` against the very output it belongs to."""
    truth = truth or expected(c)
    peer = peer or expected(c, c.dtype)
    for name in c.shapes:
        # The product of two rounded operands: a summand is as far off as they are.
        verdict = testing.within_budget(ours[name], peer[name].to(ours[name].dtype), truth[name], terms=terms(c),
                                        scale=max(1.0, testing.scale_of(truth[name])),
                                        what=f"{c}, {config}: {name}")  # fmt: skip
        assert verdict, verdict.message
    if "part" in ours:
        judge_part(c, config, ours)


def judge_part(c: Case, config, ours: dict[str, torch.Tensor]) -> None:
    part, what = ours["part"].double(), f"{c}, {config}: part"
    eps = torch.finfo(torch.float32).eps
    values = ours["out" if c.kind == "fprop" else "dx"].double().permute(0, 2, 3, 1).flatten(0, 2)
    rows = values.shape[0]
    if c.kind == "fprop":
        n, mean, m2 = part
        assert (n >= 1).all() and (n.sum(0) == rows).all(), f"{what}: counts {n.sum(0).tolist()}, expected {rows}"
        total = (n * mean).sum(0) / rows
        want = values.mean(0)
        assert ((total - want).abs() <= 4 * eps * values.abs().amax(0)).all(), f"{what}: mean {total}, expected {want}"
        spread = (m2 + n * (mean - total).square()).sum(0)
        want = (values - want).square().sum(0)
        # The mean of a tile is rounded to float32, which moves its rows together.
        floor = 16 * eps * want + rows * (4 * eps * values.abs().amax(0)).square()
        floor = floor + 8 * eps * values.abs().amax(0) * want.sqrt() * math.sqrt(rows)
        assert ((spread - want).abs() <= floor).all(), f"{what}: M2 {spread}, expected {want}"
        return
    act, mean = c.args["act"].double(), c.args["stat"][0].double()
    centred = act.permute(0, 2, 3, 1).flatten(0, 2) - mean
    for plane, addends, name in ((0, values, "sum g"), (1, values * centred, "sum g (act - mean)")):
        got, want = part[plane].sum(0), addends.sum(0)
        bad = (got - want).abs() > 8 * eps * (addends.abs().sum(0) + (values * mean).abs().sum(0) * plane)
        assert not bad.any(), f"{what}: {name} {got}, expected {want}"


def same(c: Case, config, ours: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Bit for bit, for the outputs that ``want`` has."""
    for name, t in want.items():
        verdict = testing.exactly(ours[name], t.to(ours[name].dtype), f"{c}, {config}: {name}")
        assert verdict, verdict.message


def with_args(c: Case, **args) -> Case:
    return dataclasses.replace(c, args={**c.args, **args})
