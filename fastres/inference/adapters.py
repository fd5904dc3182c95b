"""Modules whose forward is a known chain, taken apart into atoms, and atoms put together into nodes.

What counts as known comes from :mod:`fastres.fusion`: a client library added there is known here as well. Everything
is read from modules in evaluation mode. A module that differs in any way (hooks, a forward of its own, other norms) is
no chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from fastres import models
from fastres import nn as fast
from fastres.fusion import registry
from fastres.inference.plan import Block, Conv, ConvAct, GlobalAvgPool, Linear, Node, Stem
from fastres.nn import fitness
from fastres.nn.fused import Fused, FusedBlock, FusedConvBNAct, FusedStem
from fastres.nn.reading import can_read, read_conv_bn
from fastres.ops.conv_bn_act import fold_conv_bn
from fastres.ops.params import DTYPES, ConvBN

#: Fused by birth: their own class says how they are built.
BORN = (fast.BasicBlock, fast.Bottleneck, fast.ConvBNAct2d, fast.Stem, models.ResNet)
_DROPS_OUT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
#: What decides how an ``nn.Sequential`` runs.
_CALLS = ("forward", "__iter__", "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__")
_STEM = ("conv1", "bn1", "relu", "maxpool")
_STAGES = ("layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True)
class Atom:
    """A module that a chain calls, and its path in the model."""

    name: str
    module: nn.Module


def fused_class(module: nn.Module) -> type[Fused] | None:
    """The fused class that knows how ``module``, of exactly a known class, is built."""
    kind = type(module)
    if kind in BORN:
        return kind
    known = registry.fused_classes()
    return kind if kind in known.values() else known.get(kind)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _structure(module: nn.Module, kind: type[Fused]) -> list[str]:
    reasons: list[str] = []
    fitness.check_untouched(type(module).__name__, module, reasons)
    if "_forward_impl" in module.__dict__:
        reasons.append("_forward_impl is overridden on the instance")
    return reasons + kind._fastres_structure(module)


def in_order(module: nn.Module) -> bool:
    """Whether ``module`` calls its children one after the other and nothing else: an ``nn.Sequential``, or one of a
    class that only says what is in it (torchvision's heads)."""
    kind, reasons = type(module), []
    if not isinstance(module, nn.Sequential):
        return False
    if kind is not fast.FusedStage and any(getattr(kind, n) is not getattr(nn.Sequential, n) for n in _CALLS):
        return False
    fitness.check_untouched("Sequential", module, reasons)
    return not reasons


def expand(path: str, module: nn.Module) -> list[Atom]:
    """``module`` as the atoms it calls one after the other; itself where it is not known to be a chain."""
    kind = fused_class(module)
    if in_order(module):
        return [a for name, child in module._modules.items() for a in expand(_join(path, name), child)]
    if kind is not None and issubclass(kind, FusedConvBNAct):
        if not _structure(module, kind):
            names = [n for n in kind._fastres_names if n is not None]
            atoms = [Atom(_join(path, n), module._modules[n]) for n in names]
            if kind is fast.ConvBNAct2d and module.act:
                atoms.append(Atom(_join(path, "act"), nn.ReLU()))
            return atoms
    elif kind is not None and issubclass(kind, FusedStem):
        return _network(path, module, kind)
    return [Atom(path, module)]


def _network(path: str, module: nn.Module, kind: type[Fused]) -> list[Atom]:
    children = module._modules
    reasons: list[str] = []
    fitness.check_untouched(type(module).__name__, module, reasons)
    if reasons or "_forward_impl" in module.__dict__:
        return [Atom(path, module)]
    if kind is fast.Stem:
        names: tuple[str, ...] = _STEM
    elif tuple(children) == (*_STEM, *_STAGES, "avgpool", "fc"):
        names = tuple(children)
    else:  # other children than those a ResNet calls: its forward may not be the one we know
        return [Atom(path, module)]
    atoms = [a for name in names for a in expand(_join(path, name), children[name])]
    if names[-1] == "fc":
        at = next(
            i for i, a in enumerate(atoms) if a.name == _join(path, "fc") or a.name.startswith(_join(path, "fc."))
        )
        atoms.insert(at, Atom(_join(path, "flatten"), nn.Flatten(1)))
    return atoms


# ---- atoms to nodes


def _wide(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.detach().to(dtype).contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.preserve_format)


def fold(conv: nn.Conv2d, norm: nn.Module | None, dtype: torch.dtype) -> Conv:
    """``conv`` with its evaluation ``norm`` folded in float64, rounded once to ``dtype``."""
    pad, spread = tuple(conv.padding), tuple(conv.dilation)
    if norm is None:
        weight = conv.weight.detach().double()
        bias = weight.new_zeros(weight.shape[0]) if conv.bias is None else conv.bias.detach().double()
    else:
        read: ConvBN = read_conv_bn(conv, norm)
        weight, bias = fold_conv_bn(read._replace(weight=read.weight.double()))
    return Conv(_wide(weight, dtype), _wide(bias, dtype), tuple(conv.stride), pad, spread, conv.groups)


def _is_norm(module: nn.Module) -> bool:
    """An evaluation norm that can be folded."""
    reasons: list[str] = []
    if not can_read(type(module)):
        return False
    fitness.check_norm("", module, reasons)
    # Without running statistics BN normalises with the batch's also in evaluation: nothing to fold.
    return not reasons and module._buffers.get("running_mean") is not None


def why_not_conv(module: nn.Module) -> list[str]:
    reasons: list[str] = []
    fitness.check_conv("convolution", module, reasons)
    if not reasons and module.weight.dtype not in DTYPES:
        reasons.append(f"its weight is {module.weight.dtype}")
    return reasons


def _untouched(module: nn.Module, *kinds: type) -> bool:
    reasons: list[str] = []
    fitness.check_untouched("", module, reasons)
    return type(module) in kinds and not reasons


def _is_pool(module: nn.Module) -> bool:
    reasons: list[str] = []
    fitness.check_pool("", module, reasons)
    return not reasons


def _is_global_pool(module: nn.Module) -> bool:
    return _untouched(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1), [1, 1])


def _flattens(module: nn.Module) -> bool:
    return _untouched(module, nn.Flatten) and module.start_dim == 1 and module.end_dim in (-1, 3)


def _block(name: str, module: nn.Module, kind: type[FusedBlock], dtype: torch.dtype) -> tuple[Block | None, list[str]]:
    reasons = _structure(module, kind)
    if reasons:
        return None, reasons
    pairs = kind._fastres_pairs(module)
    unfolded = [n for n, _, norm in pairs if not _is_norm(norm)]
    if unfolded:
        return None, [f"the norm after {n} has no running statistics to fold" for n in unfolded]
    convs = [fold(conv, norm, dtype) for _, conv, norm in pairs]
    depth = len(kind._fastres_names)
    return Block(name, tuple(convs[:depth]), convs[depth] if len(convs) > depth else None), []


def gather(atoms: list[Atom], dtype: torch.dtype) -> list[Node | tuple[Atom, list[str]]]:
    """Nodes in order; an atom that is none stays itself, with the reasons.

    ``conv [norm] [ReLU [max pooling]]``, blocks, global average pooling with its flattening, linear layers with a ReLU.
    Dropout and Identity do nothing in evaluation and vanish.
    """
    atoms = [a for a in atoms if not _untouched(a.module, *_DROPS_OUT)]
    found: list[Node | tuple[Atom, list[str]]] = []
    at = 0

    def following(test) -> nn.Module | None:
        """The next atom's module where it passes the test; it is consumed then."""
        nonlocal at
        nxt = next(islice(atoms, at, None), None)
        if nxt is None or not test(nxt.module):
            return None
        at += 1
        return nxt.module

    while at < len(atoms):
        name, module = atoms[at].name, atoms[at].module
        atom, kind = atoms[at], fused_class(atoms[at].module)
        at += 1
        if kind is not None and issubclass(kind, FusedBlock):
            block, reasons = _block(name, module, kind, dtype)
            found.append(block or (atom, reasons))
        elif isinstance(module, nn.Conv2d):
            reasons = why_not_conv(module)
            if reasons:
                found.append((atom, reasons))
                continue
            conv = fold(module, following(_is_norm), dtype)
            relu = following(lambda m: _untouched(m, nn.ReLU)) is not None
            pool = following(_is_pool) if relu else None
            if pool is None:
                found.append(ConvAct(name, conv, relu))
            else:
                found.append(Stem(name, conv, pool.kernel_size, pool.stride, pool.padding))
        elif _is_global_pool(module):
            found.append(GlobalAvgPool(name, following(_flattens) is not None))
        elif _untouched(module, nn.Linear) and module.weight.dtype in DTYPES and _flat(found):
            weight = _wide(module.weight, dtype)
            bias = weight.new_zeros(weight.shape[0]) if module.bias is None else _wide(module.bias, dtype)
            found.append(Linear(name, weight, bias, following(lambda m: _untouched(m, nn.ReLU)) is not None))
        else:
            found.append((atom, [f"{fitness.qualified(type(module))} is no node of a plan"]))
    return found


def _flat(before: list) -> bool:
    """Whether what comes before a linear layer is known to have two dimensions: it takes any number of them."""
    last = before[-1] if before else None
    return isinstance(last, Linear) or (isinstance(last, GlobalAvgPool) and last.flatten)
