"""Convolutions with what rides along, as operation graphs of cuDNN: what is asked for, and in which wording.

cuDNN has an engine for some wordings of a formula and none for others that mean the same. What its planner accepts
for compute capability 9.0 (cuDNN 9.19 and 9.24, channels in multiples of 8, stride 1 and 2):

======================  ===============  ==============================================================
pattern                 dtypes           wording
======================  ===============  ==============================================================
fprop, dgrad, wgrad     bf16, fp16       the operation alone
fprop + bias ...        bf16, fp16       pointwise operations behind it
[BN+ReLU +] fprop       bf16, fp16       centred, or folded (a second engine)
fprop + stats           fp16             genstats: the precompiled engine NVIDIA trains with
fprop + stats           bf16, fp16       two reductions, of y and of y*y
BN+ReLU + fprop + stats fp16             folded with fp16 vectors, genstats
BN+ReLU + fprop + stats bf16, fp16       centred, two reductions
dgrad + ReLU            bf16, fp16       relu_backward
dgrad + ReLU + BN sums  bf16, fp16       relu_backward, two reductions (of dx and of dx*(act - mean)); stride 1 only
BN grad + dgrad         bf16, fp16       stride 1 and cuDNN 9.24 only
BN+ReLU + wgrad         fp16             folded with fp16 vectors
======================  ===============  ==============================================================

The dBN-weight operation of cuDNN's C++ interface is not part of the Python package; the two reductions take its place.
Nothing here imports cuDNN: the module and an empty graph come in as arguments.
"""

from __future__ import annotations

import dataclasses

#: "centred": (x - mean)*scale + bias in fp32, as our own kernels compute it. "folded": x*scale + (bias - mean*scale),
#: one operation fewer; the folded bias is rounded once in fp32, and both vectors once more where they are of the
#: activation's dtype. A mean much larger than the deviation then costs |mean|*scale*2^-24 (2^-11 in fp16) absolutely.
PROLOGUES = ("", "centred", "folded")

#: "genstats": cuDNN's own statistics operation. "reductions": two sums in the epilogue, which may be taken in another
#: order on every run (see ``GraphConfig.repeatable``).
SUMS = ("", "genstats", "reductions")

#: Plans of the planner's ranking that are worth a measurement: a convolution alone is what PyTorch calls already, and
#: a fused one takes seconds to compile.
RANKS_ALONE, RANKS_FUSED = 1, 2


@dataclasses.dataclass(frozen=True)
class GraphConfig:
    """One wording of a request and one plan for it.

    prologue    how relu(bn(x)) is worded: one of `PROLOGUES`.
    vectors     dtype of its per-channel vectors: "float32", or "activation" for that of x.
    sums        how sums are gathered: one of `SUMS`.
    rank        place of the plan in the planner's ranking, from 0.
    repeatable  refuse, at its first call, a plan whose sums are not the same bits on every run.
    """

    prologue: str = ""
    vectors: str = "float32"
    sums: str = ""
    rank: int = 0
    repeatable: bool = True

    def __post_init__(self):
        for name, known in (
            ("prologue", PROLOGUES),
            ("vectors", ("float32", "activation")),
            ("sums", SUMS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(map(repr, known))}")
        if self.rank < 0:
            raise ValueError(f"rank: got {self.rank}, expected 0 or more")

    def __str__(self) -> str:
        words = [self.prologue, self.vectors if self.prologue == "folded" else "", self.sums]
        return " ".join(["graph", *filter(None, words), f"#{self.rank}"])


def why_not(request) -> list[str]:
    """What of a ``fastres.problem.ConvRequest`` cannot be said in a graph, whatever the machine."""
    p, hooks, reasons = request.problem, set(request.hooks), []
    if request.dtype not in ("bfloat16", "float16"):
        reasons.append(f"bfloat16 and float16 are served, not {request.dtype}")
    if p.groups != 1:
        reasons.append(f"groups are left to PyTorch's own call, got {p.groups}")
    if p.C % 8 or p.K % 8:
        reasons.append(f"channels must be multiples of 8, got {p.C} and {p.K}")
    if not all(p.elements) or min(p.P, p.Q) < 1:
        reasons.append("empty tensors are not served")
    if "stats" in hooks and hooks & {"residual", "relu"}:
        reasons.append("statistics are those of a convolution's output, not behind a residual or a ReLU")
    if "mask" in hooks:
        reasons.append("the mask of the joining gradient is packed in bits, cuDNN reads a byte an element")
    if "bits" in hooks:
        reasons.append("the mask in front of a BN's gradient is packed in bits, cuDNN reads a byte an element")
    if hooks & {"reduce", "y"} and "act" not in hooks:
        reasons.append("reduce and y need act")
    if request.kind == "dgrad" and hooks & {"reduce", "pre"} and tuple(p.stride) != (1, 1):
        # Sums: the planner of 9.19 and 9.24 accepts them, but none of its kernels compiles.
        reasons.append("in a strided dgrad cuDNN fuses neither sums nor the gradient of a BN")
    if request.kind == "wgrad" and "pre" in hooks:
        reasons.append("cuDNN fuses nothing into the dy operand of a wgrad")
    if request.kind == "wgrad" and "prologue" in hooks and request.dtype != "float16":
        reasons.append("cuDNN fuses BN and ReLU into a wgrad in float16 only")
    return reasons


def wordings(request) -> tuple[GraphConfig, ...]:
    """The wordings of a request that `why_not` lets pass, the likeliest winner first; each of rank 0."""
    hooks = set(request.hooks)
    if request.kind == "dgrad":
        return (GraphConfig(sums="reductions" if "reduce" in hooks else ""),)
    if request.kind == "wgrad":
        return (GraphConfig("folded", "activation") if "prologue" in hooks else GraphConfig(),)
    # Only the bare pattern has a precompiled engine.
    genstats = request.dtype == "float16" and "stats" in hooks and "bias" not in hooks
    rows = []
    if "prologue" in hooks:
        if genstats:
            rows.append(GraphConfig("folded", "activation", "genstats"))
        rows.append(GraphConfig("centred", sums="reductions" if "stats" in hooks else ""))
        rows.append(GraphConfig("folded", sums="reductions" if "stats" in hooks else ""))
    elif "stats" in hooks:
        rows += [GraphConfig(sums="genstats")] if genstats else []
        rows.append(GraphConfig(sums="reductions"))
    else:
        rows.append(GraphConfig())
    return tuple(rows)


class Drawing:
    """An operation graph being drawn. Tensors are named after the arguments of ``reference_conv.py``; ``uids`` maps the
    names of those that need an address to their ids in the graph."""

    def __init__(self, cudnn, graph, dtype: str):
        self._cudnn, self._graph = cudnn, graph
        kinds = cudnn.data_type
        self._types = {"float32": kinds.FLOAT, "bfloat16": kinds.BFLOAT16, "float16": kinds.HALF}
        self._io, self._acc = self._types[dtype], self._types["float32"]
        self.uids: dict[str, int] = {}

    def _uid(self, name: str) -> int:
        return self.uids.setdefault(name, len(self.uids) + 1)

    def activation(self, name: str, N: int, C: int, H: int, W: int):
        """A dense channels_last input of the activation dtype; weights are laid out alike."""
        return self._graph.tensor(
            name=name, dim=[N, C, H, W], stride=_dense(C, H, W), data_type=self._io, uid=self._uid(name)
        )

    def vector(self, name: str, C: int, narrow: bool = False):
        """A per-channel input in float32, or in the activation dtype if ``narrow``. Drawn once a name."""
        return self._graph.tensor(
            name=name,
            dim=[1, C, 1, 1],
            stride=[C, 1, C, C],
            data_type=self._io if narrow else self._acc,
            uid=self._uid(name),
        )

    def step(self, operation: str, narrow: bool = False, **operands):
        """A value that stays inside the kernel: in float32, or rounded to the activation dtype if ``narrow``."""
        return getattr(self._graph, operation)(**operands).set_data_type(self._io if narrow else self._acc)

    def output(self, name: str, t, C: int, H: int, W: int, N: int, dtype: str = ""):
        """Name ``t`` an output of the activation dtype or of ``dtype``."""
        t.set_output(True).set_data_type(self._types[dtype] if dtype else self._io).set_uid(self._uid(name))
        t.set_dim([N, C, H, W]).set_stride(_dense(C, H, W))
        return t

    def convolve(self, operation: str, problem, **operands):
        return getattr(self._graph, operation)(
            padding=list(problem.padding), stride=list(problem.stride), dilation=list(problem.dilation), **operands
        )

    def sums(self, values: dict, C: int) -> None:
        """Per-channel sums of ``{name of the output: tensor}``."""
        for name, t in values.items():
            total = self._graph.reduction(input=t, mode=self._cudnn.reduction_mode.ADD)
            self.output(name, total, C, 1, 1, 1, "float32")

    def genstats(self, t, C: int, names: tuple[str, str]) -> None:
        for name, total in zip(names, self._graph.genstats(input=t), strict=True):
            self.output(name, total, C, 1, 1, 1, "float32")


def _dense(C: int, H: int, W: int) -> list[int]:
    return [C * H * W, 1, C * W, C]


def draw(drawing: Drawing, request, config: GraphConfig, dw_dtype: str = "") -> None:
    """Draw ``request`` in the wording of ``config``. ``dw_dtype``: dtype of a wgrad's output, that of dy if empty."""
    hooks, p = frozenset(request.hooks), request.problem
    if request.kind == "fprop":
        _fprop(drawing, p, hooks, config)
    elif request.kind == "dgrad":
        _dgrad(drawing, p, hooks)
    else:
        _wgrad(drawing, p, hooks, config, dw_dtype)


def _fprop(d: Drawing, p, hooks: frozenset, config: GraphConfig) -> None:
    x, w = d.activation("x", p.N, p.C, p.H, p.W), d.activation("w", p.K, p.C, p.R, p.S)
    if "prologue" in hooks:
        x = _activated(d, x, p.C, config)
    y = d.convolve("conv_fprop", p, image=x, weight=w)
    if "bias" in hooks:
        y = d.step("add", a=y.set_data_type(d._acc), b=d.vector("bias", p.K))
    if "residual" in hooks:
        y = d.step("add", a=y.set_data_type(d._acc), b=d.activation("residual", p.N, p.K, p.P, p.Q))
    if "relu" in hooks:
        y = d.step("relu", input=y.set_data_type(d._acc))
    d.output("out", y, p.K, p.P, p.Q, p.N)
    if config.sums == "genstats":
        d.genstats(y, p.K, ("sum", "square_sum"))
    elif config.sums == "reductions":
        d.sums({"sum": y, "square_sum": d.step("mul", a=y, b=y)}, p.K)


def _activated(d: Drawing, x, C: int, config: GraphConfig):
    """relu(bn(x)), rounded to the activation dtype: the operand that enters the product, zero where padded."""
    narrow = config.vectors == "activation"
    if config.prologue == "centred":
        x = d.step("sub", a=x, b=d.vector("mean", C))
    x = d.step("scale", input=x, scale=d.vector("scale", C, narrow))
    x = d.step("bias", input=x, bias=d.vector("bias_bn", C, narrow))
    return d.step("relu", narrow=True, input=x)


def _dgrad(d: Drawing, p, hooks: frozenset) -> None:
    dy, w = d.activation("dy", p.N, p.K, p.P, p.Q), d.activation("w", p.K, p.C, p.R, p.S)
    if "pre" in hooks:
        centred = d.step("sub", a=d.activation("pre", p.N, p.K, p.P, p.Q), b=d.vector("pre_mean", p.K))
        slope = d.step("mul", a=centred, b=d.vector("coef1", p.K))
        dy = d.step("add", a=d.step("mul", a=dy, b=d.vector("coef0", p.K)), b=slope)
        dy = d.step("add", narrow=True, a=dy, b=d.vector("coef2", p.K))
    dx = d.convolve("conv_dgrad", p, loss=dy, filter=w)
    # Which of several input sizes belongs to a strided convolution cannot be inferred.
    dx.set_dim([p.N, p.C, p.H, p.W]).set_stride(_dense(p.C, p.H, p.W))
    if "add" in hooks:
        dx = d.step("add", a=dx.set_data_type(d._acc), b=d.activation("add", p.N, p.C, p.H, p.W))
    if "act" in hooks:
        centred = d.step("sub", a=d.activation("act", p.N, p.C, p.H, p.W), b=d.vector("mean", p.C))
        value = d.step("mul", a=centred, b=d.vector("scale", p.C))
        # The ReLU looks at the rounded value.
        value = d.step("add", narrow=True, a=value, b=d.vector("bias_bn", p.C))
        dx = d.step("relu_backward", loss=dx.set_data_type(d._acc), input=value)
        if "y" in hooks:
            d.output("y", d.step("relu", narrow=True, input=value), p.C, p.H, p.W, p.N)
    d.output("dx", dx, p.C, p.H, p.W, p.N)
    if "reduce" in hooks:
        d.sums({"sum": dx, "centred_sum": d.step("mul", a=dx, b=centred)}, p.C)


def _wgrad(d: Drawing, p, hooks: frozenset, config: GraphConfig, dw_dtype: str) -> None:
    dy, x = d.activation("dy", p.N, p.K, p.P, p.Q), d.activation("x", p.N, p.C, p.H, p.W)
    if "prologue" in hooks:
        x = _activated(d, x, p.C, config)
    dw = d.convolve("conv_wgrad", p, image=x, loss=dy)
    d.output("dw", dw, p.C, p.R, p.S, p.K, dw_dtype)
