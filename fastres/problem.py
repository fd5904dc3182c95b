"""What a convolution is asked to do, as plain data: the key under which kernels are chosen, verified and tuned."""

from __future__ import annotations

from dataclasses import dataclass

#: stride, padding, dilation (height, width each), groups.
Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]

#: Work that may ride along, by kind; the arguments of ``backends/reference_conv.py`` they stand for.
HOOKS = {
    "fprop": ("prologue", "bias", "residual", "relu", "stats"),  # stat, bias, residual, relu, part
    "dgrad": ("pre", "bits", "add", "mask", "act", "reduce", "y"),  # pre, bits, add, mask, act + stat, part, y
    "wgrad": ("pre", "bits", "prologue"),  # pre, bits, stat
}


@dataclass(frozen=True)
class ConvProblem:
    """Sizes of one convolution: x [N, C, H, W], w [K, C/groups, R, S], y [N, K, P, Q]."""

    N: int
    H: int
    W: int
    C: int
    K: int
    R: int
    S: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def P(self) -> int:
        return (self.H + 2 * self.padding[0] - self.dilation[0] * (self.R - 1) - 1) // self.stride[0] + 1

    @property
    def Q(self) -> int:
        return (self.W + 2 * self.padding[1] - self.dilation[1] * (self.S - 1) - 1) // self.stride[1] + 1

    @property
    def geometry(self) -> Geometry:
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def flops(self) -> int:
        """Multiplications and additions of fprop, dgrad or wgrad (padding counted)."""
        return 2 * self.N * self.P * self.Q * self.K * (self.C // self.groups) * self.R * self.S

    @property
    def elements(self) -> tuple[int, int, int]:
        """Elements of x, w and y."""
        x = self.N * self.H * self.W * self.C
        return x, self.K * (self.C // self.groups) * self.R * self.S, self.N * self.P * self.Q * self.K

    def __str__(self) -> str:
        text = f"{self.N}x{self.C}x{self.H}x{self.W} -> {self.K}, {self.R}x{self.S}"
        for name, value, usual in (
            ("stride", self.stride, (1, 1)),
            ("padding", self.padding, (0, 0)),
            ("dilation", self.dilation, (1, 1)),
        ):
            if value != usual:
                text += f", {name} {value[0]}" if value[0] == value[1] else f", {name} {value[0]}x{value[1]}"
        return text + (f", groups {self.groups}" if self.groups > 1 else "")


@dataclass(frozen=True)
class ConvRequest:
    """One convolution with its hooks. ``kind``: fprop, dgrad or wgrad; ``hooks``: a sorted tuple from `HOOKS`;
    ``dtype``: "float32", "bfloat16" or "float16"; ``device``: index of the GPU, -1 for CPU tensors."""

    kind: str
    problem: ConvProblem
    dtype: str
    hooks: tuple[str, ...] = ()
    device: int = 0

    def __post_init__(self):
        if self.kind not in HOOKS:
            raise ValueError(f"kind: got {self.kind!r}, expected one of {', '.join(HOOKS)}")
        unknown = set(self.hooks) - set(HOOKS[self.kind])
        if unknown or tuple(sorted(self.hooks)) != self.hooks:
            raise ValueError(f"hooks: got {self.hooks}, expected a sorted tuple from {HOOKS[self.kind]}")

    def __str__(self) -> str:
        riding = f" + {', '.join(self.hooks)}" if self.hooks else ""
        return f"{self.kind}{riding} of {self.problem}, {self.dtype}"


@dataclass(frozen=True)
class OperandRequest:
    """Which operands of one convolution are formed while it loads them, instead of by passes that write them first.

    ``kind``: "forward", its fprop; "backward", its dgrad and its wgrad, which read one gradient. ``operands``: what is
    on offer, ("prologue",), ("pre",) or both, in the order in which they are taken up. ``hooks``: what rides along with
    the fprop or the dgrad anyway, and "bits" where a mask lies in front of "pre"; "y" is asked for by need.
    """

    kind: str
    problem: ConvProblem
    dtype: str
    operands: tuple[str, ...]
    hooks: tuple[str, ...] = ()
    device: int = 0

    @property
    def plans(self) -> list[tuple[str, ...]]:
        """What may be taken: nothing, the first operand, both. A second one without the first is left out: the pass
        that it would spare is there for the other one as well."""
        return [self.operands[:n] for n in range(len(self.operands) + 1)]

    def convolutions(self, taken: tuple[str, ...]) -> list[ConvRequest]:
        """The convolutions of a plan, as they are asked for."""

        def request(kind, hooks):
            return ConvRequest(kind, self.problem, self.dtype, tuple(sorted(hooks)), self.device)

        hooks = set(self.hooks) - {"bits"}
        if self.kind == "forward":
            return [request("fprop", hooks | set(taken))]
        pre = {"pre", *(set(self.hooks) & {"bits"})} if "pre" in taken else set()
        y = {"y"} if "prologue" in self.operands and "prologue" not in taken else set()
        return [request("dgrad", hooks | pre | y), request("wgrad", pre | (set(taken) & {"prologue"}))]

    def __str__(self) -> str:
        riding = f" + {', '.join(self.hooks)}" if self.hooks else ""
        return f"{self.kind}{riding} of {self.problem}, {self.dtype}, operands {', '.join(self.operands)}"


def problem_of(x_shape, w_shape, geometry: Geometry) -> ConvProblem:
    """The problem of x ``[N, C, H, W]`` and w ``[K, C/groups, R, S]``."""
    N, C, H, W = x_shape
    K, _, R, S = w_shape
    stride, padding, dilation, groups = geometry
    return ConvProblem(N, H, W, C, K, R, S, tuple(stride), tuple(padding), tuple(dilation), groups)


def arguments(kind: str, p: ConvProblem, hooks, parts: int, dtype: str, make) -> tuple[list, dict]:
    """What a launcher of ``triton_kernels/conv_*.py`` takes, in order and by name, its outputs among it.

    ``make(type, shape)`` stands for a tensor; types "float32", "uint8" and ``dtype``. ``parts``: tiles of ``part``.
    """
    hooks = set(hooks)
    x, y = make(dtype, (p.N, p.C, p.H, p.W)), make(dtype, (p.N, p.K, p.P, p.Q))
    w = make(dtype, (p.K, p.C // p.groups, p.R, p.S))
    bytes_c, bytes_k = -(-p.C // 8), -(-p.K // 8)

    def given(**tensors) -> dict:
        """By hook: (name, type, shape) of what it brings along."""
        return {
            name: make(type, shape)
            for hook, brought in tensors.items()
            if hook in hooks
            for name, type, shape in brought
        }

    if kind == "fprop":
        named = given(
            prologue=[("stat", "float32", (5, p.C))],
            bias=[("bias", "float32", (p.K,))],
            residual=[("residual", dtype, (p.N, p.K, p.P, p.Q))],
            stats=[("part", "float32", (3, parts, p.K))],
        )
        return [x, w, p.geometry, y], {**named, "relu": "relu" in hooks}
    gradient = [("pre", dtype, (p.N, p.K, p.P, p.Q)), ("pre_stat", "float32", (5, p.K)), ("coef", "float32", (3, p.K))]
    named = given(pre=gradient, bits=[("bits", "uint8", (p.N * p.P * p.Q, bytes_k))])
    like_x = (p.N, p.C, p.H, p.W)
    if kind == "wgrad":
        return [y, x, p.geometry, w], named | given(prologue=[("stat", "float32", (5, p.C))])
    named |= given(
        add=[("add", dtype, like_x)],
        mask=[("mask", "uint8", (p.N * p.H * p.W, bytes_c))],
        act=[("act", dtype, like_x), ("stat", "float32", (5, p.C))],
        reduce=[("part", "float32", (2, parts, p.C))],
        y=[("y", dtype, like_x)],
    )
    return [y, w, p.geometry, x], named
