"""Which models can be measured, their unfused baseline, and how fastres serves them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fastres.bench import plain


def names() -> tuple[str, ...]:
    """The models ``fastres bench`` and ``fastres report`` know."""
    return tuple(plain.CONFIGURATIONS)


def baseline(name: str, seed: int = 0) -> tuple[nn.Module, str]:
    """The unfused fp32 model and its origin: torchvision's where it imports, else plain torch.nn modules.

    Weights are random from ``seed``; BN weights and statistics are non-trivial, or folding errors stay hidden.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            import torchvision
        except (ImportError, RuntimeError):  # RuntimeError: torchvision built for another torch
            model, origin = plain.build(name), "plain torch.nn modules (torchvision does not import)"
        else:
            model = torchvision.models.get_model(name, weights=None)
            origin = f"torchvision {torchvision.__version__}"
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.1)
    return model, origin


def fused(train: bool, memory: str = "default") -> Callable[[nn.Module], nn.Module]:
    """What turns a baseline into its fastres twin, in place where the classes are known to ``fuse``.

    Inference folds BN into the convolutions once (``fold=True``): the weights do not change any more.
    """
    from fastres.fusion import fuse

    def convert(model: nn.Module) -> nn.Module:
        model = _known(model)
        return fuse(model, memory=memory) if train else fuse(model, fold=True)

    return convert


def session(model: nn.Module, x: torch.Tensor, dtype: torch.dtype):
    """The baseline as an inference session in ``dtype``, checked on ``x``; the baseline is left as it is."""
    from fastres.inference import optimize

    return optimize(_known(model), (x,), dtype)


def _known(model: nn.Module) -> nn.Module:
    """``model``, or for a plain one a twin of classes that ``fuse`` and ``optimize`` know."""
    if not isinstance(model, plain.PlainResNet):
        return model
    from fastres import models

    parameter = next(model.parameters())
    twin = getattr(models, model.configuration)()
    twin.load_state_dict(model.state_dict())
    return twin.to(parameter.device, parameter.dtype, memory_format=torch.channels_last).train(model.training)
