"""Evaluation blocks and stems as one kernel: whether there is one, whether it is right, and whether it is faster.

A forced backend serves what its kernels can. The automatic choice takes a kernel only after it gave the right values on
this very device and was faster, on inputs of this very size, than the separate convolutions; both are found out at the
first call, in milliseconds, and remembered. Whatever is turned down is served by separate convolutions.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastres import block_trials, dispatch
from fastres.backends import fragments
from fastres.backends.block_kernels import BottleneckShape
from fastres.backends.eval_kernels import BasicBlockShape, StemShape
from fastres.backends.reference import acc_dtype

#: What a kernel is asked for.
Shape = BottleneckShape | BasicBlockShape | StemShape

#: What `fastres doctor` asks about: the stem and blocks of stride 1 in the first two stages of ResNet-18 and 50.
TYPICAL = (
    StemShape(8, 224, 224),
    BasicBlockShape(8, 56, 56, 64),
    BasicBlockShape(8, 28, 28, 128),
    BottleneckShape(8, 56, 56, 64, 64, 256, True),
    BottleneckShape(8, 56, 56, 256, 64, 256, False),
    BottleneckShape(8, 28, 28, 512, 128, 512, False),
)

#: (device index, dtype, shape) -> why the separate convolutions serve, or "" where a kernel does, and which.
_verdicts: dict[tuple, tuple[str, object]] = {}
_lock = threading.RLock()  # timing a run of blocks may need verdicts on its blocks
_RUNS = 7


class Unit(NamedTuple):
    """What a convolution is, as far as a kernel must know."""

    name: str
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, name: str, conv) -> Unit:
        weight = tuple(conv.weight.shape)
        dilation = (1, 1) if weight[2:] == (1, 1) else tuple(conv.dilation)  # a pointwise one has nothing to spread
        return cls(name, weight, tuple(conv.stride), tuple(conv.padding), dilation, conv.groups)

    def differs(self, wanted: Unit) -> list[str]:
        """Each property that is not the wanted one: what was got, and what is expected."""
        return [
            f"{self.name} has {field} {_words(got)}, expected {_words(expected)}"
            for field, got, expected in zip(self._fields[1:], self[1:], wanted[1:], strict=True)
            if got != expected
        ]


def _words(value) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


@dataclasses.dataclass(frozen=True)
class Unserved:
    """A block or stem whose geometry no kernel has, on x of ``sizes``. ``units``: its convolutions in order, of a block
    the projection last; ``others``: what else is in the way, in words."""

    op: str
    sizes: tuple[int, ...]
    units: tuple[Unit, ...]
    projected: bool = False
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        main = self.units[: len(self.units) - self.projected]
        outputs = [str(unit.weight[0]) for unit in (main if self.op == "bottleneck" else main[-1:])]
        words = f"{self.op.replace('_', ' ')} {_words(self.sizes)} -> {' -> '.join(dict.fromkeys(outputs))}"
        for field in ("stride", "dilation", "groups"):
            largest = max(getattr(unit, field) for unit in main)
            if largest not in (1, (1, 1)):
                words += f", {field} {_words(largest)}"
        return words if self.op == "stem" else f"{words} with {'a projection' if self.projected else 'an identity'}"

    @property
    def reasons(self) -> list[str]:
        """Why no kernel serves it: what was got, and what is expected."""
        reasons = list(self.others)
        if self.op == "stem":
            wanted = [Unit("conv1", (StemShape.K, 3, 7, 7), (2, 2), (3, 3))]
        else:
            main = [unit.weight[0] for unit in self.units[: len(self.units) - self.projected]]
            wanted = [
                Unit("", weight, (1, 1), (weight[2] // 2,) * 2)
                for weight in _weights(self.sizes[1], main, self.projected)
            ]
            if len(main) not in (2, 3):
                reasons.append(f"has {len(main)} convolutions, expected two or three")
            if len(main) == 2 and self.projected:
                reasons.append("has a projection, expected the identity")
        # Where the number of convolutions is another one, nothing more is to be said of each.
        pairs = zip(self.units, wanted, strict=False)
        return reasons + [reason for unit, expected in pairs for reason in unit.differs(expected)]


def _weights(C: int, outputs: Sequence[int], projected: bool) -> list[tuple[int, ...]]:
    """The weights' shapes in a block from ``C`` channels that a kernel may serve, by its convolutions' outputs; of the
    projection, too. Empty for other numbers of convolutions than two and three."""
    if len(outputs) == 2:
        return [(C, C, 3, 3)] * 2
    if len(outputs) != 3:
        return []
    mid, K = outputs[0], outputs[2] if projected else C
    return [(mid, C, 1, 1), (mid, mid, 3, 3), (K, mid, 1, 1)] + [(K, C, 1, 1)] * projected


def shape_of(x: Tensor, convs, shortcut) -> BottleneckShape | BasicBlockShape | Unserved:
    """The block as a kernel would see it: 1x1, 3x3, 1x1 of stride 1, or 3x3, 3x3 of stride 1 with the identity.
    Everything else is :class:`Unserved`."""
    N, C, H, W = x.shape
    projected = shortcut is not None
    units = (*convs, shortcut) if projected else tuple(convs)
    outputs = [conv.weight.shape[0] for conv in convs]
    wanted = _weights(C, outputs, projected)
    if len(wanted) != len(units) or not all(map(_is, units, wanted)):
        names = [f"conv{i}" for i in range(1, len(convs) + 1)] + ["the projection"] * projected
        op = "basic_block" if len(convs) == 2 else "bottleneck"
        return Unserved(op, (N, C, H, W), tuple(map(Unit.of, names, units)), projected)
    if len(convs) == 2:
        return BasicBlockShape(N, H, W, C)
    return BottleneckShape(N, H, W, C, outputs[0], outputs[2], projected)


def stem_shape(x: Tensor, conv, kernel: int, stride: int, padding: int) -> StemShape | Unserved:
    """The stem as a kernel would see it; :class:`Unserved` where its geometry is not that of a ResNet; pooling as
    given."""
    others = []
    if (kernel, stride, padding) != (3, 2, 1):
        got = f"window {kernel}, stride {stride}, padding {padding}"
        others.append(f"max pooling has {got}, expected window 3, stride 2, padding 1")
    if x.shape[1] != 3:
        others.append(f"the input has {x.shape[1]} channels, expected 3")
    if max(x.stride()[1:]) >= 2**31:  # addresses inside an image take 32 bits
        others.append(f"the input has strides {_words(x.stride())}, expected those inside an image below 2**31")
    if others or not _is(conv, (StemShape.K, 3, 7, 7), 2):
        return Unserved("stem", tuple(x.shape), (Unit.of("conv1", conv),), False, tuple(others))
    return StemShape(x.shape[0], *x.shape[2:])


def _is(conv, weight: tuple[int, ...], stride: int = 1) -> bool:
    """Whether ``conv`` has a weight of this shape, this stride, half the kernel for padding, neither groups nor
    dilation."""
    given = (conv.weight.shape, conv.stride, conv.padding, conv.groups)
    fits = given == (weight, (stride,) * 2, (weight[2] // 2,) * 2, 1)
    return fits and (weight[2] == 1 or conv.dilation == (1, 1))


#: What `fastres doctor` tells of as never served: the blocks of stride 2 that begin ResNet-50's and 18's second stage.
TYPICALLY_UNSERVED = (
    Unserved(
        "bottleneck",
        (8, 256, 56, 56),
        (
            Unit("conv1", (128, 256, 1, 1), (1, 1), (0, 0)),
            Unit("conv2", (128, 128, 3, 3), (2, 2), (1, 1)),
            Unit("conv3", (512, 128, 1, 1), (1, 1), (0, 0)),
            Unit("the projection", (512, 256, 1, 1), (2, 2), (0, 0)),
        ),
        True,
    ),
    Unserved(
        "basic_block",
        (8, 64, 56, 56),
        (
            Unit("conv1", (128, 64, 3, 3), (2, 2), (1, 1)),
            Unit("conv2", (128, 128, 3, 3), (1, 1), (1, 1)),
            Unit("the projection", (128, 64, 1, 1), (2, 2), (0, 0)),
        ),
        True,
    ),
)


def packing(kernels, shape: Shape) -> Callable[..., Tensor]:
    """What packs the weights as ``kernels`` read them."""
    if isinstance(shape, BottleneckShape):
        return kernels.pack_bottleneck
    return fragments.basic_block if isinstance(shape, BasicBlockShape) else fragments.stem


def pack(units, packing: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """(weights, bias) as the kernel reads them, from folded units: of a stem one, of a basic block two, of a bottleneck
    three, and the projection's if there is one. ``packing``: of :func:`packing`."""
    weights = [unit.weight for unit in units]
    bias = [unit.bias.float() for unit in units]
    if len(bias) == 4:
        bias[2:] = [bias[2] + bias[3]]
    return packing(*weights), torch.cat(bias).contiguous()


def compute(kernels, shape: Shape, x: Tensor, packed: tuple[Tensor, Tensor]) -> Tensor:
    """What ``kernels`` make of ``x``, channels_last. ``packed``: of :func:`pack`."""

    def output(channels: int, height: int, width: int) -> Tensor:
        size = (shape.N, channels, height, width)
        return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    if isinstance(shape, StemShape):  # reads the image as it lies
        out = output(shape.K, shape.P, shape.Q)
        kernels.stem_eval(x, *packed, out)
        return out
    x = x.contiguous(memory_format=torch.channels_last)
    if x.data_ptr() % 16:
        x = x.clone(memory_format=torch.channels_last)
    if isinstance(shape, BasicBlockShape):
        out = output(shape.C, shape.H, shape.W)
        kernels.basic_block_eval(x, *packed, out)
    else:
        out = output(shape.K, shape.H, shape.W)
        kernels.bottleneck_eval(x, *packed, shape.mid, shape.projected, out)
    return out


def kernels_for(x: Tensor, shape, separate: Callable[[], Tensor], ours: Callable[..., Tensor],
                proof: Callable[..., str] | None = None):  # fmt: skip
    """The backend whose kernel serves the unit ``shape`` on ``x``, or None. ``ours(kernels)`` and ``separate()``
    compute it; the backend's ``why_not_<shape.op>`` says what hinders it, ``proof`` (default `check`) what is wrong
    with its values."""
    name = dispatch.forced() or ("cuda" if x.device.type == "cuda" else "")
    if not name or not x.numel():
        return None
    kernels, asked = dispatch.load(name), f"why_not_{shape.op}"
    key = (x.device.index, x.dtype, shape)
    if not hasattr(kernels, asked):
        if x.device.type == "cuda":
            _verdicts[key] = f"the backend {name} has no kernel for whole blocks", None
        return None
    if isinstance(shape, Unserved):
        if key not in _verdicts:
            _verdicts[key] = "; ".join(shape.reasons), None
        return None
    hindrances = {k: getattr(k, asked)(x.device, x.dtype, shape) for k in versions(kernels, shape)}
    candidates = [k for k, reasons in hindrances.items() if not reasons]
    if not candidates:
        _verdicts[key] = _why_none(hindrances), None
        return None
    if dispatch.forced():
        return candidates[0]
    verdict = _verdicts.get(key)
    if verdict is None:
        if torch.cuda.is_current_stream_capturing():
            return None  # no verdict can be had now; a later call may have one
        with _lock:
            verdict = _verdicts[key] = _verdict(candidates, x, shape, separate, ours, proof or check)
    return verdict[1]


def _why_none(hindrances: dict) -> str:
    """The reasons of every version, each once."""
    found = []
    for kernels, reasons in hindrances.items():
        version = getattr(kernels, "version", "")
        found += [f"{version}: {reason}" if version else reason for reason in reasons]
    return "; ".join(dict.fromkeys(found))


def why_separate(x: Tensor, shape) -> str | None:
    """Why `kernels_for` just gave none for ``shape`` on ``x``; None off the GPU, where whole blocks have no kernel to
    miss."""
    verdict = _verdicts.get((x.device.index, x.dtype, shape))
    if verdict is not None:
        return verdict[0]
    if x.device.type == "cuda" and x.numel():
        return "its first call came while a CUDA graph was captured, when no kernel can be verified"
    return None


def versions(kernels, shape) -> list:
    """The backend and its versions for one architecture alone, which differ in bottlenecks only. A forced backend takes
    the first that serves."""
    special = getattr(kernels, "hopper", None) if isinstance(shape, BottleneckShape) else None
    return [kernels] if special is None else [kernels, special]


def forget() -> None:
    """Drop every verdict."""
    _verdicts.clear()


def verdicts() -> dict[str, str]:
    """What was decided in this process: block in words -> why separate convolutions serve it, or ""."""
    return {f"{shape}, {str(dtype).removeprefix('torch.')}": why for (_, dtype, shape), (why, _) in _verdicts.items()}


def _verdict(candidates, x: Tensor, shape, separate, ours, proof) -> tuple[str, object]:
    """(why separate convolutions serve or "", the fastest candidate that is right or None)."""
    faults, times = [], {}
    for kernels in candidates:
        try:
            wrong = proof(kernels, x.device, x.dtype, shape)
        except (RuntimeError, ValueError) as error:
            wrong = f"failed: {type(error).__name__}: {error}"
        if wrong:
            version = getattr(kernels, "version", "")
            what = f"the one-kernel {shape} in {str(x.dtype).removeprefix('torch.')}{f', {version},' * bool(version)}"
            warnings.warn(f"fastres: {what} is switched off on {x.device}: {wrong}", RuntimeWarning, stacklevel=6)
            faults.append(wrong)
        else:
            times[kernels] = microseconds(lambda k=kernels: ours(k))
    if not times:
        return "; ".join(faults), None
    best = min(times, key=times.get)
    theirs = microseconds(separate)
    if times[best] < theirs:
        return "", best
    return f"separate convolutions take {theirs:.0f} us, one kernel {times[best]:.0f} us", None


def microseconds(run: Callable[[], object]) -> float:
    """Median time of ``run`` on the current CUDA stream."""
    run()
    times = []
    for _ in range(_RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


# ---- the check: integers, on which sums of any order are exact, then normal values against float64


def check(kernels, device, dtype: torch.dtype, shape: Shape) -> str:
    """What is wrong with the kernel for ``shape``, or "". At most two images, of the given size."""
    small = dataclasses.replace(shape, N=min(shape.N, 2))
    with torch.no_grad():
        for whole in (True, False):
            launch, truth, terms = block_trials.trial(small, device, dtype, whole)
            out, again = (
                torch.full(truth.shape, math.nan, dtype=dtype, device=device).to(memory_format=torch.channels_last)
                for _ in range(2)
            )
            for buffer in (out, again):
                launch(kernels, buffer)
            wrong = fault(out, again, truth, whole, terms)
            if wrong:
                return wrong
    return ""


def fault(out: Tensor, again: Tensor, truth: Tensor, whole: bool, terms: int, roundings: int = 4) -> str:
    """What is wrong with ``out`` and ``again``, two runs on the same data, held against float64, or "". On integers
    (``whole``) every bit counts; else so many roundings and a sum of so many terms are allowed for."""
    if not torch.equal(out, again):
        return "the output differs from run to run"
    if whole:
        wrong = out != truth.to(out.dtype)
        return f"differs on integers in {wrong.double().mean().item():.2%} of the output" if wrong.any() else ""
    # A rounding inside may fall the other way.
    eps, fine = torch.finfo(out.dtype).eps, torch.finfo(acc_dtype(out.dtype)).eps
    limit = (roundings * eps + 2 * math.sqrt(terms) * fine) * truth.abs().max()
    error = (out.double() - truth).abs()
    if bool((error <= limit).all()):
        return ""
    return f"is off by up to {error.max().item():.3g} of {truth.abs().max().item():.3g}"
