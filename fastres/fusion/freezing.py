"""freeze_bn and unfreeze_bn: norms that keep their running statistics also under ``model.train()``."""

from __future__ import annotations

import warnings

from torch import nn

from fastres.fusion.swap import check_model
from fastres.nn.frozen import FrozenBatchNorm2d


def _affine(norm: nn.Module) -> list[nn.Parameter]:
    return [p for p in (norm.weight, norm.bias) if p is not None]


def freeze_bn(model: nn.Module, *, train_affine: bool = False) -> nn.Module:
    """Freeze the running statistics of every ``nn.BatchNorm2d`` inside ``model``, in place, and return ``model``.

    The norms (of exactly that class) become :class:`fastres.nn.FrozenBatchNorm2d`: they normalise with their running
    statistics, also after ``.train()``. state_dict, parameters and hooks stay. Their weight and bias stop requiring
    grad unless ``train_affine``. Fused blocks serve them; freeze before or after ``fuse``. Undo with
    :func:`unfreeze_bn`. Warns about norms without running statistics and of other classes, which stay as they are.
    """
    check_model(model)
    if not isinstance(train_affine, bool):
        raise TypeError(f"train_affine: got {type(train_affine).__name__}, expected a bool")
    left = []
    for path, norm in model.named_modules():
        if type(norm) is nn.BatchNorm2d and norm.running_mean is not None and norm.running_var is not None:
            norm.__class__ = FrozenBatchNorm2d
            norm._fastres_mode = norm.training
            norm._fastres_grad = [p.requires_grad for p in _affine(norm)]
            norm.training = False
        elif isinstance(norm, nn.modules.batchnorm._BatchNorm) and type(norm) is not FrozenBatchNorm2d:
            left.append(f"{path} ({type(norm).__name__})")
        if type(norm) is FrozenBatchNorm2d:
            before = norm.__dict__.get("_fastres_grad", [True, True])
            for parameter, grad in zip(_affine(norm), before, strict=False):
                parameter.requires_grad_(grad and train_affine)
    if left:
        warnings.warn(f"fastres.freeze_bn: not frozen, only nn.BatchNorm2d is: {', '.join(left)}", stacklevel=2)
    return model


def unfreeze_bn(model: nn.Module) -> nn.Module:
    """Undo :func:`freeze_bn`: class, training mode and ``requires_grad`` as they would be without it."""
    check_model(model)
    for norm in model.modules():
        if type(norm) is not FrozenBatchNorm2d or "_fastres_grad" not in norm.__dict__:
            continue
        for parameter, grad in zip(_affine(norm), norm._fastres_grad, strict=False):
            parameter.requires_grad_(grad)
        norm.__class__ = nn.BatchNorm2d
        norm.training = norm._fastres_mode
        del norm._fastres_mode, norm._fastres_grad
    return model
