"""fuse and restore: blocks change their class, nothing else."""

from __future__ import annotations

import warnings

from torch import nn

from fastres.fusion import registry
from fastres.nn import folding
from fastres.nn.fused import MEMORY, Fused, unfuse
from fastres.nn.stage import FusedStage, place


def check_model(model) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")


def fuse(model: nn.Module, *, memory: str = "default", fold: bool = False) -> nn.Module:
    """Let the residual blocks inside ``model`` compute with fastres, in place, and return ``model``.

    A served module keeps its identity, parameters, buffers, hooks, attributes and state_dict; only its class becomes
    a subclass of the one it had, whose forward reads geometry and mode at every call. deepcopy, pickle, optimizers
    and checkpoints do not notice. What cannot be served exactly stays as it is; :func:`fastres.report` says why.
    A call that cannot be served (hooks added later, ``torch.func`` transforms, export, an unusual input) runs the
    module's own forward. Fusing again only changes the options.

    Args:
        model: a module with, anywhere inside, blocks of a client library (see ``fastres.fusion.registry.CLIENTS``).
        memory: ``"low"`` recomputes the last convolution of each block in backward: about half of eager's activation
            memory for two more convolutions of work a block.
        fold: in evaluation mode without grad, use weights into which the BN was folded (in float64, once). They are
            made anew when a parameter or buffer is replaced, moved or written to, and after ``.train()``. The one
            write that goes unnoticed is through ``.data`` (or NumPy) to a folded parameter: call ``.train()`` or
            ``.eval()`` after it. With ``fold=False`` there is no such condition. Each ``nn.Sequential`` of fused
            bottlenecks becomes a :class:`fastres.nn.FusedStage`.

    Raises: TypeError if ``model`` is not a module, ValueError for an unknown ``memory``. Warns if nothing was fused.
    """
    check_model(model)
    if memory not in MEMORY:
        raise ValueError(f"memory: got {memory!r}, expected one of {', '.join(map(repr, MEMORY))}")
    if not isinstance(fold, bool):
        raise TypeError(f"fold: got {type(fold).__name__}, expected a bool")
    known, paths = registry.adapters(), registry.owners(model)
    modules = list(model.modules())
    found = [(m, known[type(m)]) for m in modules if type(m) in known]
    for module, adapter in [(m, a) for m, a in found if not registry.why_not(a, m, paths)]:
        module.__class__ = adapter.fused
    for module in modules:
        if fold:
            place(module)
        elif type(module) is FusedStage:
            unfuse(module)
    fused = [m for m in modules if isinstance(m, Fused)]
    for module in fused:
        folding.drop(module)
        module._fastres_memory, module._fastres_fold = memory, fold
        module._fastres_left = module._fastres_separate = None
    if not fused:
        warnings.warn(
            f"fastres.fuse: nothing in {type(model).__name__} could be fused; print(fastres.report(model)) says why",
            stacklevel=2,
        )
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse`, in place: every module gets back the very class it had. Returns ``model``.

    Modules of ``fastres.nn`` and ``fastres.models`` were never re-classed; they only lose the options of ``fuse``.
    """
    check_model(model)
    for module in model.modules():
        if not isinstance(module, Fused):
            continue
        if type(module)._fastres_original is None:
            folding.drop(module)
            module._fastres_memory, module._fastres_fold = "default", False
            module._fastres_left = module._fastres_separate = None
        elif type(module) is FusedStage or type(module) is registry.fused_classes().get(type(module)._fastres_original):
            unfuse(module)
        else:
            warnings.warn(
                f"fastres.restore: {type(module).__name__} was made out of a fused class by someone else (FSDP does)"
                " and stays as it is",
                stacklevel=2,
            )
    return model
