"""Segments on the CPU backend's own kernels (``csrc/cpu/program.h``), where those are faster than oneDNN's.

A whole segment in one call: direct or Winograd convolutions as measured, weights packed once, bias, residual and ReLU
in the epilogue, intermediates in one arena.
"""

from __future__ import annotations

import math
import threading
from dataclasses import astuple
from time import perf_counter

import torch
from torch import Tensor

from fastres.backends import cpu, cpu_conv, cpu_matrix, cpu_winograd
from fastres.inference.cpu_program import ALL_AT_ONCE, Builder, Built, Turns
from fastres.inference.cpu_weights import MATRIX, Choice, Packed, flat, gather, matrix, paired, whole
from fastres.inference.executors import Kernel
from fastres.inference.plan import Linear, Node, Segment, Shape, Stem
from fastres.ops.bn import nhwc

name = "cpu"
#: Input shapes that a segment remembers the program of.
_PROGRAMS = 32
#: What part of the time turns must save.
_WORTH = 0.01
#: Images that the choice of kernels is measured on at most; its runs, more of them while it has taken no longer.
_IMAGES, _RUNS, _MORE, _SECONDS = 8, 4, 12, 2.0


def why_not(node: Node, device: torch.device, dtype: torch.dtype, precision: str) -> list[str]:
    if device.type != "cpu":
        return [f"the session is on {device}, the kernels are for the CPU"]
    if isinstance(node, Stem):
        return _stem(node, dtype, precision)
    convs = [(c.weight.shape, c.geometry) for c in node.convs()]
    return _convolutions(convs, dtype, precision) if convs else _beside_convolutions(dtype, precision)


def _beside_convolutions(dtype: torch.dtype, precision: str) -> list[str]:
    """Stems, pooling and classifiers have no contest of their own: they go with a usual convolution's direct sums, or
    where products of bfloat16 take it."""
    shape, geometry = torch.Size((64, 64, 3, 3)), ((1, 1), (1, 1), (1, 1), 1)
    if _narrow_wins(cpu.stand_in(shape, dtype), geometry, precision):
        return []
    return _convolutions([(shape, geometry)], dtype, "exact")


def _narrow_wins(w: torch.Tensor, geometry, precision: str) -> bool:
    """Whether products of bfloat16 on the matrix unit or by pairs beat PyTorch's convolution: where they are, they do
    (docs/perf-log.md)."""
    x = cpu.stand_in((1, w.shape[1], 16, 16), w.dtype)
    if paired(w.dtype) and min(w.shape[:2]) >= 32 and not cpu_conv.why_not(x, w, geometry):
        return True
    return bool(matrix(w.dtype, precision)) and cpu_matrix.wins(x, w, geometry)


def _convolutions(convs: list[tuple], dtype: torch.dtype, precision: str) -> list[str]:
    unserved: list[str] = []
    slower: list[str] = []
    fast = False
    for shape, geometry in convs:
        w = cpu.stand_in(shape, dtype)
        x = cpu.stand_in((1, w.shape[1] * geometry[3], 16, 16), dtype)
        unserved += cpu_conv.why_not(x, w, geometry, grouped=True)
        dense = cpu.stand_in((w.shape[0], x.shape[1], *w.shape[2:]), dtype)
        if not cpu_conv.wins("fprop", x, dense, (*geometry[:3], 1)):
            slower.append(f"{tuple(w.shape)} {str(dtype)[6:]}: oneDNN's convolution is the faster one")
        fast = fast or (precision != "exact" and cpu_winograd.wins(x, w, geometry))
        fast = fast or (geometry[3] == 1 and _narrow_wins(w, geometry, precision))
    return list(dict.fromkeys(unserved or ([] if fast else slower)))


def _stem(node: Stem, dtype: torch.dtype, precision: str) -> list[str]:
    w, (stride, _, dilation, groups) = node.conv.weight, node.conv.geometry
    if w.shape[1] != 3 or groups != 1 or stride[1] != 2 or dilation != (1, 1) or w.shape[2] > cpu_conv.STEM_ROWS:
        at_most = f"at most {cpu_conv.STEM_ROWS} rows of taps"
        return [f"a stem of {tuple(w.shape)} with stride {stride}: expected 3 channels, a stride of 2, {at_most}"]
    return _beside_convolutions(dtype, precision)


def precision(device: torch.device, dtype: torch.dtype, asked: str) -> str:
    """Sums in float32, always; fast algorithms unless "exact" is asked for; "high" where there is a matrix unit."""
    return asked if asked == "exact" or matrix(dtype, asked) else "highest"


def peak(device: torch.device, dtype: torch.dtype, threads: int, precision: str) -> float | None:
    """Of the matrix unit, where its kernels serve; else the report takes the rate of ``torch.mm``."""
    kinds = matrix(dtype, precision)
    return cpu_matrix.peak(threads) / -kinds[0] if kinds and cpu_matrix.unit() == "instructions" else None


class CpuSegment:
    """A segment, with a program for each input shape that came by."""

    def __init__(self, segment: Segment, dtype: torch.dtype, precision: str):
        self.segment, self.dtype, self.precision = segment, dtype, precision
        self.weights = [_weights(node) for node in segment.nodes]
        self._programs: dict[tuple, Built] = {}
        #: (instruction set, threads, about how many elements of input) -> convolution -> its kernel.
        self._choices: dict[tuple, dict[Packed, Choice]] = {}
        self._turns: dict[tuple, Turns] = {}
        self._lock = threading.Lock()

    def _built(self, shape: Shape) -> Built:
        key = shape, cpu.isa(), torch.get_num_threads()
        found = self._programs.get(key)
        if found is None:
            with self._lock:
                found = self._programs.get(key)
                if found is None:
                    pick = self._chosen(shape, *key[1:]).__getitem__
                    turns = self._turns.get(self._size(shape, *key[1:]), ALL_AT_ONCE)
                    if turns.nodes and (shape[0] <= turns.images or shape[0] % turns.images):
                        turns = ALL_AT_ONCE
                    found = self._build(shape, pick, turns)
                    if gather(self._packed(), key[1]):
                        found = self._build(shape, pick, turns)
                    while len(self._programs) >= _PROGRAMS:
                        self._programs.pop(next(iter(self._programs)))
                    self._programs[key] = found
        return found

    def _build(self, shape: Shape, pick, turns: Turns = ALL_AT_ONCE) -> Built:
        return Builder(shape, self.dtype, cpu.isa(), pick).build(self.segment, self.weights, turns)

    @staticmethod
    def _size(shape: Shape, isa: str, threads: int) -> tuple:
        return isa, threads, torch.Size(shape).numel().bit_length()

    def _chosen(self, shape: Shape, isa: str, threads: int) -> dict[Packed, Choice]:
        """The fastest kernel of every convolution at inputs about as large as ``shape``. Measured once, in whole runs:
        what a kernel finds in the caches, its weights not among it, decides as much as its arithmetic."""
        key = self._size(shape, isa, threads)
        if key not in self._choices:
            kinds = {p: p.kinds(self.dtype, self.precision) for p in self._packed()}
            measured = min(shape[0], _IMAGES), *shape[1:]
            if any(len(of_conv) > 1 for of_conv in kinds.values()) and torch.Size(shape).numel():
                self._choices[key] = self._measured(measured, kinds)
            else:
                self._choices[key] = {p: Choice(of_conv[0]) for p, of_conv in kinds.items()}
            if torch.Size(shape).numel():
                self._turns[key] = self._best_turns(measured, self._choices[key].__getitem__)
            for p in kinds:
                p.keep(isa, {chosen[p].out for (of, *_), chosen in self._choices.items() if of == isa}, self.dtype)
        return self._choices[key]

    def _packed(self) -> list[Packed]:
        return [p for of_node in self.weights for p in of_node]

    def _measured(self, shape: Shape, kinds: dict[Packed, tuple[int, ...]]) -> dict[Packed, Choice]:
        units = {p: unit for of, node in zip(self.weights, self.segment.nodes, strict=True)
                 for unit in whole(node, self.dtype, self.precision) for p in of}  # fmt: skip
        # One network for each kernel, where it can serve, and one of whole blocks.
        networks = {kind: lambda p, kind=kind: Choice(kind if kind in kinds[p] else kinds[p][0])
                    for kind in sorted(set().union(*kinds.values()))}  # fmt: skip
        if units:
            networks["whole"] = lambda p: Choice(units[p], whole=True) if p in units else Choice(kinds[p][0])
        built = {kind: self._build(shape, pick) for kind, pick in networks.items()}
        x = cpu.random(shape).to(self.dtype)
        x = nhwc(x) if x.dim() == 4 else x
        y = next(iter(built.values())).outputs.take()
        # Of a convolution and its kernel, or of a node as a whole.
        seconds: dict[tuple, float] = {}
        start = perf_counter()
        for run in range(_MORE):
            if run >= _RUNS and perf_counter() - start > _SECONDS:
                break
            for kind, b in built.items():
                times = b.program.timed(x.data_ptr(), y.data_ptr(), torch.get_num_threads())
                for node, conv, time in zip(b.nodes, b.convs, times, strict=True):
                    of = (node, kind) if conv is None else (conv, kind)
                    if run:  # the first run warms up
                        seconds[of] = min(time, seconds.get(of, time))
        found, least = {}, {}
        for conv, of_conv in kinds.items():
            best = min(of_conv, key=lambda kind: seconds.get((conv, kind), math.inf))
            found[conv] = Choice(best, conv.error(best) if Choice(best).algorithm else 0.0)
            least[conv] = seconds.get((conv, best), 0.0)
        for at, of_node in enumerate(self.weights):
            if of_node and of_node[0] in units and seconds[at, "whole"] < sum(least[p] for p in of_node):
                found |= {p: Choice(units[p], whole=True) for p in of_node}
        return found

    def _best_turns(self, shape: Shape, pick) -> Turns:
        """Early stages have large activations and few weights: image by image they may stay in the caches."""
        x = cpu.random(shape).to(self.dtype)
        x = nhwc(x) if x.dim() == 4 else x

        def seconds(*built: Built) -> list[list[float]]:
            """Of each network's nodes, the least of some runs, in turns: what else the machine does meets all alike."""
            y = built[0].outputs.take()
            runs = [[] for _ in built]
            for _ in range(_RUNS):
                for b, of_network in zip(built, runs, strict=True):
                    of_network.append([0.0] * len(self.segment.nodes))
                    steps = b.program.timed(x.data_ptr(), y.data_ptr(), torch.get_num_threads())
                    for node, time in zip(b.nodes, steps, strict=True):
                        of_network[-1][node] += time
            return [[min(times) for times in zip(*of_network[1:], strict=True)] for of_network in runs]

        divisors = [images for images in (1, 2, 4) if images < shape[0] and shape[0] % images == 0]
        if not divisors:
            return ALL_AT_ONCE
        at_once = self._build(shape, pick)
        whole, *parts = seconds(at_once, *(self._build((images, *shape[1:]), pick) for images in divisors))
        found = []
        for images, part in zip(divisors, parts, strict=True):
            gain, gains = 0.0, []
            for all_images, time in zip(whole, part, strict=True):
                gain += all_images - time * (shape[0] // images)
                gains.append(gain)
            if max(gains) > 0:
                found.append(Turns(gains.index(max(gains)) + 1, images))
        # What follows the turns finds its input elsewhere: only the whole tells.
        best, least = ALL_AT_ONCE, (1 - _WORTH)
        if found:
            whole, *split = (sum(s) for s in seconds(at_once, *(self._build(shape, pick, turns) for turns in found)))
            for turns, time in zip(found, split, strict=True):
                if time < least * whole:
                    best, least = turns, time / whole
        return best

    def choices(self) -> list[dict]:
        """``size``: of the input, see ``_chosen``; ``kernels``: the fields of `Choice` of each node's convolutions."""
        with self._lock:
            measured = [(key, dict(chosen)) for key, chosen in self._choices.items() if key[-1]]
        if not any(len(p.kinds(self.dtype, self.precision)) > 1 for p in self._packed()):
            return []
        return [
            {
                "isa": isa,
                "threads": threads,
                "size": size,
                "kernels": [[astuple(chosen[p]) for p in of_node] for of_node in self.weights],
                "turns": astuple(self._turns.get((isa, threads, size), ALL_AT_ONCE)),
            }
            for (isa, threads, size), chosen in measured
        ]

    def choose(self, choices: list[dict]) -> list[str]:
        left = []
        for stored in choices:
            key = str(stored["isa"]), int(stored["threads"]), int(stored["size"])
            found = [[_choice(*fields) for fields in of_node] for of_node in stored["kernels"]]
            turns = Turns(*map(int, stored["turns"]))
            reason = self._why_not_chosen(key[0], found, turns)
            if reason:
                left.append(f"the kernels chosen for {key[0]} with {key[1]} threads are not taken over: {reason}")
                continue
            with self._lock:
                pairs = zip(self.weights, found, strict=True)
                self._choices[key] = {p: c for nodes in pairs for p, c in zip(*nodes, strict=True)}
                self._turns[key] = turns
        return left

    def _why_not_chosen(self, isa: str, found: list[list[Choice]], turns: Turns) -> str:
        if isa not in cpu.available_isas():
            return f"this machine runs {', '.join(cpu.available_isas())}"
        if [len(of_node) for of_node in found] != [len(of_node) for of_node in self.weights]:
            return "they are those of other nodes"
        if not 0 <= turns.nodes <= len(found) or (turns.nodes and turns.images < 1):
            return f"got {turns} for {len(found)} nodes"
        for node, packed, chosen in zip(self.segment.nodes, self.weights, found, strict=True):
            for p, choice in zip(packed, chosen, strict=True):
                kinds = whole(node, self.dtype, self.precision) if choice.whole else p.kinds(self.dtype, self.precision)
                if choice.out not in kinds:
                    return f"{choice} does not serve {node.name} here"
        return ""

    def _start(self, x: Tensor) -> tuple[Built, Tensor, Tensor]:
        x = nhwc(x) if x.dim() == 4 else x.contiguous()
        built = self._built(tuple(x.shape))
        return built, x, built.outputs.take()

    def run(self, x: Tensor) -> Tensor:
        built, x, y = self._start(x)
        if x.numel():
            built.program.run(x.data_ptr(), y.data_ptr(), torch.get_num_threads())
        return y

    def timed(self, x: Tensor) -> tuple[Tensor, list[float]]:
        built, x, y = self._start(x)
        seconds = [0.0] * len(self.segment.nodes)
        if x.numel():
            steps = built.program.timed(x.data_ptr(), y.data_ptr(), torch.get_num_threads())
            for node, time in zip(built.nodes, steps, strict=True):
                seconds[node] += time
        return y, seconds

    def kernels(self, shape: Shape) -> list[Kernel]:
        found = []
        built = self._built(tuple(shape))
        for at, (node, choices) in enumerate(zip(self.segment.nodes, built.choices, strict=True)):
            names = [str(c) for c in choices]
            kernel = ", ".join(f"{names.count(n)} x {n}" if names.count(n) > 1 else n for n in dict.fromkeys(names))
            algorithms = dict.fromkeys(c.algorithm for c in choices if c.algorithm)
            errors = {a: max(c.error for c in choices if c.algorithm == a) for a in algorithms}
            notes = [f"{a}'s error {error:.1e} a layer" for a, error in errors.items()]
            fitted = built.fitted[at]
            notes += [f"{fitted} x no taps on padding alone"] if fitted else []
            notes += [f"{built.turns.images} of the images at a time"] if at < built.turns.nodes else []
            if node.op == "stem":
                kernel = f"{kernel} + pool in L1"
            tile = {"avx512": "14x32", "avx2": "6x16"}.get(cpu.isa(), "")
            tile = "32x32" if any(c.out in MATRIX for c in choices) else tile
            found.append(Kernel(kernel or "mean", cpu.isa(), tile if choices else "", "; ".join(notes)))
        return found

    def memory(self, shape: Shape) -> int:
        held = sum(p.bytes() for p in self._packed())
        return held + self._built(tuple(shape)).program.arena_bytes


def _choice(out: int, error: float, of_whole: bool) -> Choice:
    return Choice(out, float(error), bool(of_whole))


def _weights(node: Node) -> list[Packed]:
    if isinstance(node, Linear):
        return [Packed(flat(node), pixels=False)]
    return [Packed(c, isinstance(node, Stem)) for c in node.convs()]


def prepare(segment: Segment, device: torch.device, dtype: torch.dtype, precision: str) -> CpuSegment:
    return CpuSegment(segment, dtype, precision)
