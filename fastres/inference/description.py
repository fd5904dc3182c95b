"""A model described as a plan: the walk over its modules, adapters for what is known, slots inside what is not."""

from __future__ import annotations

import sys

import torch
from torch import nn

from fastres.inference import adapters
from fastres.inference.plan import Block, ConvAct, Foreign, Plan, Segment, Slot, Stem
from fastres.nn import fitness
from fastres.nn.fused import FusedStem


def describe(model: nn.Module, dtype: torch.dtype) -> Plan:
    """The plan of ``model``, which is in evaluation mode and nobody else's: foreign parts are its own modules.

    dtype: of the folded weights, float32 or float64.
    """
    return _chain(adapters.expand("", model), dtype)


def _chain(atoms: list[adapters.Atom], dtype: torch.dtype) -> Plan:
    return _plan(adapters.gather(atoms, dtype), dtype)


def _plan(items: list, dtype: torch.dtype) -> Plan:
    """Of what :func:`adapters.gather` returns."""
    parts: list[Segment | Foreign] = []
    nodes: list = []
    for item in items:
        if not isinstance(item, tuple):
            nodes.append(item)
            continue
        if nodes:
            parts.append(Segment(tuple(nodes)))
            nodes = []
        atom, reasons = item
        parts.append(Foreign(atom.name, atom.module, tuple(reasons), tuple(_slots(atom.name, atom.module, dtype))))
    if nodes:
        parts.append(Segment(tuple(nodes)))
    return Plan(tuple(parts))


def _slots(path: str, module: nn.Module, dtype: torch.dtype) -> list[Slot]:
    """Known modules inside a foreign one, outermost first; the module itself may be one (a feature getter)."""
    own = _getter(path, module, dtype)
    if own is not None:
        return [own]
    found, seen = [], set()
    for name, child in module._modules.items():
        if child is None or id(child) in seen:
            continue
        seen.add(id(child))
        inner = f"{path}.{name}" if path else name
        slot = _whole(inner, child, dtype)
        found += [slot] if slot is not None else _slots(inner, child, dtype)
    return found


def _whole(path: str, module: nn.Module, dtype: torch.dtype) -> Slot | None:
    """``module`` as one slot if it is a block, or a container that calls its children in order and some of which are
    known and merge."""
    if isinstance(module, nn.Conv2d | nn.Linear) or not next(module.children(), None):
        return None  # a lone layer gains nothing, and its owner may use its weight in other ways
    untouched: list[str] = []
    fitness.check_untouched("", module, untouched)
    if untouched:
        return None
    atoms = adapters.expand(path, module)
    items = adapters.gather(atoms, dtype)
    nodes = [item for item in items if not isinstance(item, tuple)]
    if not any(isinstance(n, Stem | ConvAct | Block) for n in nodes):
        return None
    if len(nodes) < len(items) and (not adapters.in_order(module) or len(items) == len(atoms)):
        return None
    return Slot(path, (_plan(items, dtype),), (None,))


def _getter(path: str, module: nn.Module, dtype: torch.dtype) -> Slot | None:
    """torchvision's IntermediateLayerGetter: its children one after the other, some outputs returned by name."""
    kind = adapters.fused_class(module)
    if kind is None or not issubclass(kind, FusedStem) or "torchvision.models._utils" not in sys.modules:
        return None
    from torchvision.models._utils import IntermediateLayerGetter

    if not issubclass(kind, IntermediateLayerGetter):
        return None
    reasons: list[str] = []
    fitness.check_untouched("", module, reasons)
    if reasons:
        return None
    parts, taps, atoms = [], [], []
    for name, child in module._modules.items():
        atoms += adapters.expand(f"{path}.{name}" if path else name, child)
        if name in module.return_layers:
            parts.append(_chain(atoms, dtype))
            taps.append(module.return_layers[name])
            atoms = []
    if not any(True for part in parts for _ in part.nodes()):
        return None
    return Slot(path, tuple(parts), tuple(taps))
