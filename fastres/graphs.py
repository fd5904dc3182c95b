"""A training step as a CUDA graph: `graph_step`.

Launched from Python, a fused step waits for the host where the GPU is quick: hundreds of launches, each with its
allocations, and autograd in between. A captured step is replayed by one call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

#: Plain steps before the capture: cuDNN chooses, kernels are verified and compiled, optimizers make their state.
WARMUP = 3
#: Captures after which it is said that something changes too often.
PATIENCE = 4


class GraphStep:
    """What `graph_step` returns. ``captures``: how often the step was captured so far."""

    def __init__(self, step: Callable, optimizer: torch.optim.Optimizer | None):
        self._step, self._optimizer = step, optimizer
        self._warm = 0
        self._key: tuple | None = None
        self._inputs: list[Tensor] = []
        self._outputs: object = None
        self._graph = None
        self.captures = 0

    def __call__(self, *inputs: Tensor):
        for i, t in enumerate(inputs):
            if not isinstance(t, Tensor):
                raise TypeError(f"inputs[{i}]: got {type(t).__name__}, expected a tensor")
        if not inputs or not all(map(_on_gpu, inputs)):
            return self._step(*inputs)
        if self._warm < WARMUP:
            self._warm += 1
            return self._on_the_side(inputs)
        if self._graph is not None and _shapes(inputs) != _shapes(self._inputs):
            return self._step(*inputs)  # parameters and states are the same tensors in every way to run it
        key = _hyperparameters(self._optimizer)
        with torch.no_grad():
            for kept, t in zip(self._inputs, inputs, strict=False):
                kept.copy_(t)
        if self._graph is None or key != self._key:
            self._key = key
            self._capture(inputs)
        self._graph.replay()
        return self._outputs

    def _on_the_side(self, inputs):
        """A plain step on another stream than the default one, as capture demands of what comes before it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = self._step(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return outputs

    def _capture(self, inputs) -> None:
        if not self._inputs:
            self._inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
        self._graph = self._outputs = None  # its memory is the next one's
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._outputs = self._step(*self._inputs)
        self._graph = graph
        self.captures += 1
        if self.captures == PATIENCE:
            warnings.warn(
                "fastres.graph_step: the optimizer's hyperparameters changed again and each change captures the step "
                "anew; make what changes every few steps a tensor (lr=torch.tensor(...)) and update it in place",
                RuntimeWarning,
                stacklevel=4,
            )


def graph_step(step: Callable, optimizer: torch.optim.Optimizer | None = None) -> GraphStep:
    """``step`` for CUDA tensors as a CUDA graph; every call is exactly one step.

    The first calls run ``step`` as it is. The next captures it, without computing anything, and replays it from then
    on: the same kernels in the same order on the same parameters, without the host's time between two launches. CPU
    tensors, and inputs of another shape, dtype or stride than those captured (a last, smaller batch), run ``step`` as
    it is.

    Args:
        step: takes tensors alone and returns tensors (or None). Must contain all that belongs to a step, from
            ``optimizer.zero_grad()`` to ``optimizer.step()``, and nothing that waits for the GPU (``.item()``, printing
            a tensor, ``GradScaler``): PyTorch raises for that during capture. Whatever of it is Python happens at
            capture only. Adam and its kin need ``capturable=True``.
        optimizer: whose hyperparameters are numbers that a graph would keep (``lr``): when one changes, the next call
            captures the step anew. Without it, and if ``step`` reads other Python numbers that change, the graph goes
            on with the old ones.

    Returns: a callable of the same tensors. What it returns is overwritten by the next call.

    Raises: TypeError naming the argument.
    """
    if not callable(step):
        raise TypeError(f"step: got {type(step).__name__}, expected a callable of tensors")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}, expected a torch.optim.Optimizer or None")
    return GraphStep(step, optimizer)


def _on_gpu(t: Tensor) -> bool:
    return t.device.type == "cuda"


def _shapes(tensors) -> list[tuple]:
    return [(t.shape, t.dtype, t.stride(), t.device) for t in tensors]


def _hyperparameters(optimizer: torch.optim.Optimizer | None) -> tuple:
    """Whatever of the parameter groups is not a tensor: a graph keeps it. Of tensors, which ones they are."""
    groups = [] if optimizer is None else optimizer.param_groups
    return tuple(
        (name, id(value) if isinstance(value, Tensor) else str(value))
        for group in groups
        for name, value in group.items()
        if name != "params"
    )
