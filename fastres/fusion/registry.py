"""Which classes of which client libraries can be fused: one file a library, keyed by exact class.

A file is imported only when its library is in ``sys.modules`` already: a model cannot hold a class of a library
that nobody imported. It defines ``ADAPTERS``, a list of :class:`Adapter`.
"""

from __future__ import annotations

import importlib
import sys
from collections import defaultdict
from dataclasses import dataclass

from torch import nn

from fastres.nn.fused import Fused

#: Client library -> the file that knows its classes.
CLIENTS = {
    "torchvision": "fastres.fusion.torchvision",
    "segmentation_models_pytorch": "fastres.fusion.segmentation_models_pytorch",
}

_loaded: dict[str, list[Adapter]] = {}


@dataclass(frozen=True)
class Adapter:
    """A client's class and the subclass (a :class:`fastres.nn.fused.Fused`) that an instance of it becomes."""

    original: type[nn.Module]
    fused: type[Fused]

    def __post_init__(self):
        if not (issubclass(self.fused, Fused) and issubclass(self.fused, self.original)):
            raise TypeError(f"fused: got {self.fused}, expected a subclass of Fused and {self.original}")
        if self.fused._fastres_original is not self.original:
            raise TypeError(f"fused: got _fastres_original {self.fused._fastres_original}, expected {self.original}")

    def why_not(self, module: nn.Module) -> list[str]:
        """Reasons why ``module``, of exactly ``original`` or ``fused``, cannot be served; empty: it can."""
        overridden = [n for n in ("forward", "_forward_impl", "__call__") if n in module.__dict__]
        return [f"{n} is overridden on the instance" for n in overridden] + self.fused._fastres_structure(module)


def adapters() -> dict[type, Adapter]:
    """Adapters of the client libraries that are imported, by their original class."""
    found: dict[type, Adapter] = {}
    for library, module in CLIENTS.items():
        if library not in sys.modules:
            continue
        if library not in _loaded:
            _loaded[library] = importlib.import_module(module).ADAPTERS
        for adapter in _loaded[library]:
            found[adapter.original] = adapter
    return found


def fused_classes() -> dict[type, type[Fused]]:
    """Original class -> fused class, of the client libraries that are imported."""
    return {original: adapter.fused for original, adapter in adapters().items()}


def owners(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every path under which a module hangs directly in another one: two or more mean that it is shared."""
    paths: dict[nn.Module, list[str]] = defaultdict(list)
    for prefix, parent in model.named_modules():
        for name, child in parent._modules.items():
            if child is not None:
                paths[child].append(f"{prefix}.{name}" if prefix else name)
    return paths


def why_not(adapter: Adapter, module: nn.Module, paths: dict[nn.Module, list[str]]) -> list[str]:
    """The adapter's reasons, and those that only the whole model shows: modules that others call as well."""
    reasons = adapter.why_not(module)
    if reasons:
        return reasons
    for name, *inner in adapter.fused._fastres_pairs(module):
        for child in inner:
            if len(paths[child]) > 1:
                reasons.append(f"{name}: its {type(child).__name__} is shared: {' and '.join(paths[child])}")
    return reasons
