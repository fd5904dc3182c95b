"""The contestants of ``fastres bench``: eager channels_last, torch.compile and fastres, over the same weights."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

#: fp16 gradients of a mean loss underflow; every contestant scales by this much and back.
FP16_LOSS_SCALE = 1024.0
#: Small, so that the weights stay where they started and every timed step does the same arithmetic:
#: a converged loss would leave denormal gradients, which some processors multiply ten times slower.
LEARNING_RATE = 1e-5


@dataclass
class Engine:
    """One contestant: ``run`` is timed; ``first`` gives what is held against float64, before any update."""

    name: str
    run: Callable[[], object]
    first: Callable[[], dict[str, torch.Tensor]]
    details: dict = field(default_factory=dict)


def to_low(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return model.to(dtype, memory_format=torch.channels_last)


# ---- inference


def inference(name: str, model: nn.Module, x: torch.Tensor, dtype: torch.dtype, how: Callable | None = None) -> Engine:
    """``model`` in evaluation mode on ``x``, both in ``dtype``; ``how`` transforms the model last."""
    served = to_low(copy.deepcopy(model).eval(), dtype)
    return serving(name, how(served) if how else served, x, dtype)


def serving(name: str, served: Callable, x: torch.Tensor, dtype: torch.dtype) -> Engine:
    """What computes logits already, a model or a session, on ``x`` in ``dtype``."""
    batch = x.to(dtype, memory_format=torch.channels_last)

    def run():
        with torch.inference_mode():
            return served(batch)

    return Engine(name, run, lambda: {"logits": run()})


@contextlib.contextmanager
def frozen_weights():
    """Inductor may fold constants: the weights of an inference model do not change. Its strongest setting."""
    from torch._inductor import config

    with config.patch(freezing=True):
        yield


# ---- training


def training(
    name: str,
    model: nn.Module,
    x: torch.Tensor,
    labels: torch.Tensor,
    dtype: torch.dtype,
    how: Callable | None = None,
    forward: Callable[[nn.Module], Callable] | None = None,
) -> Engine:
    """One SGD step per run: forward under autocast (fp32 parameters), cross entropy, backward, update.

    ``how`` transforms the model, ``forward`` only the callable that computes the logits (torch.compile).
    """
    learner = copy.deepcopy(model).train().to(memory_format=torch.channels_last)
    learner = how(learner) if how else learner
    call = forward(learner) if forward else learner
    optimizer = torch.optim.SGD(learner.parameters(), LEARNING_RATE, momentum=0.9)
    scale = FP16_LOSS_SCALE if dtype == torch.float16 else 1.0
    autocast = dtype in (torch.bfloat16, torch.float16)

    def gradients():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, dtype if autocast else torch.bfloat16, enabled=autocast):
            logits = call(x)
            loss = F.cross_entropy(logits, labels)
        (loss * scale).backward()
        if scale != 1.0:
            torch._foreach_mul_([p.grad for p in learner.parameters() if p.grad is not None], 1 / scale)
        return logits, loss

    def run():
        gradients()
        optimizer.step()

    def first():
        logits, loss = gradients()
        grads = [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in learner.parameters()]
        return {"logits": logits.detach(), "loss": loss.detach(), "gradients": torch.cat([g.double() for g in grads])}

    def saved_bytes():
        """Unique storages kept for backward, parameters not counted."""
        own = {p.untyped_storage().data_ptr() for p in (*learner.parameters(), *learner.buffers(), x)}
        kept: dict[int, int] = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast(x.device.type, dtype if autocast else torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(call(x), labels)
        del loss
        return sum(kept.values())

    return Engine(name, run, first, {"saved_bytes": saved_bytes})


def captured(engine: Engine) -> Engine:
    """``engine`` as one CUDA graph: its run is replayed, without the host's time between two launches.

    The replay computes on the same buffers, so weights move on as they would have.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            engine.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine.run()
    return Engine(f"{engine.name}, CUDA graph", graph.replay, engine.first, {"graph": graph})


def truth(model: nn.Module, x: torch.Tensor, labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The unfused model in float64: logits and, with ``labels``, loss and gradients of one training step."""
    wide = copy.deepcopy(model).to(torch.float64, memory_format=torch.channels_last)
    batch = x.double()
    if labels is None:
        with torch.inference_mode():
            return {"logits": wide.eval()(batch)}
    if batch.device.type == "cuda":
        _checkpoint_blocks(wide)
    return training("float64", wide, batch, labels, torch.float64).first()


def _checkpoint_blocks(model: nn.Module) -> None:
    """Keep block inputs only: float64 activations of a large batch do not fit on the GPU otherwise.

    Running statistics are updated twice then; the truth does not look at them.
    """
    for stage in (getattr(model, f"layer{i}", ()) for i in range(1, 5)):
        for block in stage:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
