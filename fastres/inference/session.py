"""InferenceSession: a model's plan, ready to be called."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastres.inference.checking import Verdict
from fastres.inference.plan import Plan, Shape
from fastres.inference.serving import Runner, Target, served_precision
from fastres.ops.bn import as_given, is_nhwc


@dataclass(frozen=True, eq=False)
class Sample:
    """One image of the example and the unfused model's output for it: what a loaded session is checked with."""

    x: Tensor
    truth: Tensor


class InferenceSession:
    """A snapshot of a model for inference: callable like the model, made by :func:`fastres.optimize` or
    :func:`fastres.load`.

    Call it with one tensor of the example's rank: any batch and image size, any layout, in the session's dtype or the
    example's. It computes in ``dtype`` what ``model.eval()`` computes and returns what the model returns, floating
    point tensors in ``dtype``, feature maps in the layout of the input. Nothing is recorded for autograd, autocast has
    no effect, the input is left as it is. Threads are ``torch.get_num_threads()``; several Python threads may call one
    session at the same time. Later changes of the model do not reach the session.

    Attributes:
        plan: what is computed, as data. device, dtype, precision: where and in what.
        verdict: of the check against the unfused model. notes: everything that was not as asked for.
    """

    def __init__(
        self,
        plan: Plan,
        runner: Runner,
        target: Target,
        *,
        accepts: tuple[torch.dtype, ...],
        example: Shape,
        verdict: Verdict | None,
        sample: Sample | None,
        notes: tuple[str, ...],
        title: str,
    ):
        self.plan, self.runner, self.target = plan, runner, target
        self.accepts, self.example, self.verdict, self.sample = accepts, example, verdict, sample
        self._notes, self.title = notes, title
        self._measured: dict[tuple, object] = {}

    device = property(lambda self: self.target.device)
    dtype = property(lambda self: self.target.dtype)
    precision = property(lambda self: self.target.precision)

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self._notes, *served_precision(self.runner, self.target))

    def __call__(self, x: Tensor):
        """The model's output for ``x``, ``[N, C, H, W]``.

        Raises: TypeError / ValueError for what is no such tensor: dtype, device, rank, channels, an image too small
        for a layer; ValueError where ``x`` requires grad while grad is on.
        """
        self._check(x)
        # A kernel leaves nothing of Python in the caches: contexts that change nothing would take 0.05 ms here.
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            with torch.no_grad(), self._no_autocast():
                y = self.runner(x.to(self.dtype))
        else:
            y = self.runner(x if x.dtype == self.dtype else x.to(self.dtype))
        if x.dim() != 4 or (isinstance(y, Tensor) and y.dim() != 4) or is_nhwc(x):
            return y
        return pytree.tree_map(lambda t: as_given(t, x) if isinstance(t, Tensor) and t.dim() == 4 else t, y)

    def _no_autocast(self):
        if torch.is_autocast_enabled(self.device.type):
            return torch.autocast(self.device.type, enabled=False)
        return contextlib.nullcontext()

    def _check(self, x) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: got {type(x).__name__}, expected a torch.Tensor")
        if x.layout is not torch.strided:
            raise ValueError(f"x: got layout {x.layout}, expected a strided tensor")
        if x.dtype not in self.accepts:
            raise TypeError(f"x: got dtype {x.dtype}, expected {' or '.join(map(str, self.accepts))}")
        if x.device != self.device:
            raise ValueError(f"x: got device {x.device}, expected {self.device}")
        if x.dim() != len(self.example):
            expected = "[N, C, H, W]" if len(self.example) == 4 else f"{len(self.example)} dimensions"
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected {expected}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "x: got a tensor that requires grad, but a session records no gradients: call it under "
                "torch.no_grad() or torch.inference_mode(), or pass x.detach()"
            )

    def report(self, shape: Shape | None = None, *, measure: bool = True):
        """Who computes what, node by node: kernel, instruction set, tile, work, estimated and measured time.

        shape: of the input, default the example's. measure: time the nodes on random pixels if :meth:`profile` has
        not done so for this shape (half a second). Returns a :class:`fastres.inference.Report` to ``print``.
        """
        from fastres.inference import reporting

        return reporting.report(self, self._shape(shape), 0.5 if measure else None)

    def profile(self, png: str | os.PathLike | None = None, *, shape: Shape | None = None, seconds: float = 2.0):
        """Time every node on random pixels for about ``seconds``; draw a bar chart into ``png`` (needs matplotlib).

        Returns the :class:`fastres.inference.Report` with these times. Nodes are timed one by one in whole passes, so
        they find the caches as in use.
        """
        from fastres.inference import reporting

        if not seconds > 0:
            raise ValueError(f"seconds: got {seconds}, expected a positive number")
        found = reporting.report(self, self._shape(shape), seconds, again=True)
        if png is not None:
            from fastres.inference import chart

            chart.profile_chart(found, Path(png))
        return found

    def _shape(self, shape: Shape | None) -> Shape:
        shape = self.example if shape is None else tuple(shape)
        if len(shape) != len(self.example) or not all(type(v) is int and v > 0 for v in shape):
            raise ValueError(f"shape: got {shape!r}, expected {len(self.example)} positive integers")
        return shape

    def save(self, path: str | os.PathLike) -> Path:
        """Write the session to one file, safetensors with a hash over everything; :func:`fastres.load` reads it.

        Raises ValueError if a part of the model is a foreign torch module, which no data format can carry.
        """
        from fastres.inference import storage

        return storage.write(self, Path(path))

    def __repr__(self) -> str:
        nodes, foreign = len(list(self.plan.nodes())), len(list(self.plan.foreign()))
        where = f"{str(self.dtype)[6:]} on {self.device}, precision {self.precision}"
        return f"InferenceSession({self.title}: {nodes} nodes, {foreign} torch modules, {where})"
