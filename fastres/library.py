"""Registration of torch operators: one helper, so that each op states its schema once.

``define`` + ``impl`` instead of ``torch.library.custom_op``: the same dispatcher entry at a fraction of
the call overhead. Autograd stays outside, in ``autograd.Function``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

_lib = torch.library.Library("fastres", "DEF")

#: Types in a list, and types of arguments: subclasses of Tensor are not among them.
_ELEMENTS = frozenset({torch.Tensor, nn.Parameter, type(None), bool, int, float})
_ARGUMENTS = _ELEMENTS | {list, str}
_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._is_torch_function_mode_enabled
_transforms = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._get_tracing_state


def register(schema: str, impl: Callable, fake: Callable, direct: Callable | None = None) -> Callable:
    """Define ``fastres::<schema>`` with one implementation for every device and its fake.

    Returns a callable of the schema's positional arguments: the operator ``torch.ops.fastres.<name>.default``, or,
    where nobody watches operators and all tensors are plain CPU or CUDA ones, ``impl`` itself: there the dispatcher
    would end up too, after every list of tensors has been to C++ and back. ``direct``: what is called there in the
    place of ``impl``, where an operator has to return more than its caller needs.
    """
    direct = direct or impl
    name = schema.partition("(")[0]
    _lib.define(schema)
    _lib.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastres::{name}", fake, lib=_lib)
    op = getattr(torch.ops.fastres, name).default

    def call(*args):
        return direct(*args) if not torch.compiler.is_compiling() and _unwatched() and _plain(args) else op(*args)

    call.op = op
    return call


def _unwatched() -> bool:
    """Whether no mode, transform or tracer of torch wants to see operators."""
    return not _modes() and not _function_modes() and _transforms() is None and _tracing() is None


def _plain(args) -> bool:
    """Whether every tensor, also in lists, is an ordinary one with memory behind it."""
    if not _ARGUMENTS.issuperset(map(type, args)) or (type(args[0]) is not list and args[0].is_meta):
        return False
    return all(_ELEMENTS.issuperset(map(type, value)) for value in args if type(value) is list)
