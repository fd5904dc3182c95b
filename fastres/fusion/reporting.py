"""report(model): what is fused, by which op, and what is not and why, as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import nn

from fastres.fusion import registry
from fastres.fusion.swap import check_model
from fastres.nn.fitness import qualified
from fastres.nn.folding import is_folded
from fastres.nn.fused import Fused

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Row:
    """One place in a model.

    path: as in ``named_modules`` ("" is the model itself). kind: its class before fusing. op: the op that serves it, or
    None where PyTorch does. options: of ``fuse``, as far as they are not the defaults. reasons: why it was left alone.
    last_call: why a fused module left its last refused call to its own forward, if there was one. separate: why its
    last evaluation on a GPU, with weights folded, ran as separate convolutions; None if it was one kernel.
    """

    path: str
    kind: str
    op: str | None
    options: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    last_call: str | None = None
    separate: str | None = None

    @property
    def notes(self) -> str:
        notes = [", ".join(self.options)] if self.options else []
        notes += self.reasons
        if self.last_call:
            notes.append(f"a call was left to PyTorch: {self.last_call}")
        if self.separate:
            notes.append(f"evaluated by separate convolutions: {self.separate}")
        return "; ".join(notes)


@dataclass(frozen=True)
class Report:
    """Rows in the order of ``named_modules``; ``print`` it, or use ``rows``, ``fused``, ``left``, ``to_dict``."""

    model: str
    rows: tuple[Row, ...]

    @property
    def fused(self) -> tuple[Row, ...]:
        return tuple(r for r in self.rows if r.op)

    @property
    def left(self) -> tuple[Row, ...]:
        return tuple(r for r in self.rows if not r.op)

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        head = f"{self.model}: {len(self.fused)} of {len(self.rows)} places fused"
        if not self.rows:
            return f"{head} (no block of a known library and no convolution with a norm inside)"
        table = [("path", "class", "served by", "notes")]
        table += [(r.path or "(model)", r.kind, r.op or "PyTorch", r.notes) for r in self.rows]
        widths = [max(len(line[i]) for line in table) for i in range(3)]
        lines = ["  ".join([*map(str.ljust, line[:3], widths), line[3]]).rstrip() for line in table]
        lines.insert(1, "-" * len(lines[0]))
        return "\n".join([head, *lines])


def _options(module: Fused) -> tuple[str, ...]:
    options = []
    if module._fastres_memory != "default":
        options.append(f"memory={module._fastres_memory}")
    if module._fastres_fold:
        options.append("fold, weights folded" if is_folded(module) else "fold")
    return tuple(options)


def _unknown(module: nn.Module, known) -> str | None:
    """Why a module that holds convolutions and norms itself belongs to nobody; None if it holds none."""
    children = list(module._modules.values())
    if not any(isinstance(c, nn.modules.conv._ConvNd) for c in children):
        return None
    if not any(isinstance(c, _NORMS) for c in children):
        return None
    bases = [c for c in type(module).__mro__[1:] if c in known]
    if bases:
        return f"is a subclass of {qualified(bases[0])}, of which only the exact class is served"
    return "no adapter for this class"


def report(model: nn.Module) -> Report:
    """What :func:`fastres.fuse` did to ``model``, or would do: a row for each block, stem and convolution with norm.

    ``print(report(model))`` is a table. Before ``fuse`` the rows say what hinders it, or "not fused yet".
    """
    check_model(model)
    known, paths = registry.adapters(), registry.owners(model)
    rows, inside = [], set()
    for path, module in model.named_modules():
        if module in inside:
            continue
        kind = type(module)
        if isinstance(module, Fused):
            original = kind._fastres_original or kind
            reasons = tuple(registry.Adapter(original, kind).why_not(module)) if kind._fastres_original else ()
            reasons = reasons or tuple(kind._fastres_structure(module))
            op = None if reasons else kind._fastres_op
            noted = module._fastres_left, module._fastres_separate
            rows.append(Row(path, qualified(original), op, _options(module), reasons, *noted))
        elif kind in known:
            reasons = registry.why_not(known[kind], module, paths) or ["not fused yet: call fastres.fuse"]
            rows.append(Row(path, qualified(kind), None, (), tuple(reasons)))
        else:
            reason = _unknown(module, known)
            if reason is not None:
                rows.append(Row(path, qualified(kind), None, (), (reason,)))
            continue
        # A block's own shortcut is a convolution with a norm as well, and no place of its own.
        shortcut = getattr(module, "downsample", None)
        if isinstance(shortcut, nn.Module):
            inside.update(shortcut.modules())
    kind = type(model)
    return Report(qualified(getattr(kind, "_fastres_original", None) or kind), tuple(rows))
