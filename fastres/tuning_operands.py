"""Which operands a convolution forms while it loads them: whole plans against each other, timed as they will run.

A prologue saves the pass that writes an operand and costs its kernel time; a gradient has two readers, so that only
dgrad, wgrad and pass together can tell. What runs here is `fastres.riding`, the code that serves, with the convolutions
that won before.
"""

from __future__ import annotations

import statistics

from fastres import dispatch, riding, tuning_trial
from fastres.problem import ConvRequest, OperandRequest


class Step:
    """Data for the convolutions of ``request`` and the passes in front of them; random, of full size."""

    def __init__(self, request: OperandRequest):
        self.request, self.geometry = request, request.problem.geometry
        with tuning_trial.quiet(request):
            self._fill()

    def _fill(self) -> None:
        request, p = self.request, self.request.problem
        richest = request.convolutions(request.operands)[0]
        trial = tuning_trial.Trial(richest)
        self.device, hooks = trial.device, trial.hooks
        first, self.w = trial.main
        op = dispatch.Request("bottleneck", trial.device, trial.dtype, p.K)
        k = dispatch.choose(op, dispatch.forced())
        self.k = getattr(k, "trusted", k)
        # Passes write here: an operand written over itself would be another one the next time.
        self.x_room, self.y_room = (trial._new(shape) for shape in (trial.x_shape, trial.y_shape))
        if request.kind == "forward":
            self.x, self.stat = first, hooks["stat"]
            return
        self.dy = first
        if "act" in hooks:
            self.x, self.stat = hooks["act"], hooks["stat"]
            # Where the input lies there as a tensor, it is none that is still to be formed.
            self.h = None if "prologue" in request.operands else self.x_room.copy_(self.x)
        else:
            self.x, self.stat = trial._fill(trial.x_shape, 2), None
        self.pre, self.bits = hooks.get("pre"), hooks.get("bits")
        self.join = (hooks["add"], hooks.get("mask")) if "add" in hooks else None

    def run(self, taken: tuple[str, ...]) -> None:
        """The plan ``taken`` once, through the code that serves."""
        k, request = self.k, self.request
        if request.kind == "forward":
            h = riding.Activation(raw=self.x, stat=self.stat, room=self.x_room)
            riding.fprop(k, h, self.w, None, self.geometry, "stats" in request.hooks, taken=taken)
            return
        if self.pre is None:
            dy = riding.Gradient(self.dy)
        else:
            raw, stat, coef = self.pre
            dy = riding.Gradient(dy=self.dy, raw=raw, stat=stat, coef=coef, bits=self.bits, relu=self.bits is not None,
                                 room=self.y_room)  # fmt: skip
        h = riding.Activation(self.x) if self.stat is None else riding.Activation(self.h, self.x, self.stat)
        riding.backward(k, dy, h, self.w, self.geometry, (True, True, False), self.join, taken)


def microseconds(step: Step, taken: tuple[str, ...], runs: int = 15) -> float:
    """Median of ``runs`` runs of a plan with cold caches, allocations and all."""
    # The harness sits above this module; its stopwatch needs nothing of it.
    from fastres.bench.timing import device_times

    with tuning_trial.quiet(step.request):
        return statistics.median(device_times(lambda: step.run(taken), step.device, runs)) * 1e6


def needed(request: OperandRequest, taken: tuple[str, ...]) -> list[ConvRequest]:
    """The convolutions of a plan that form an operand: kernels of ours have to serve all of them."""
    return [c for c in request.convolutions(taken) if set(c.hooks) & set(taken)]
