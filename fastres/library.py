"""Registration of torch operators: one helper, so that each op states its schema once.

``define`` + ``impl`` instead of ``torch.library.custom_op``: the same dispatcher entry at a fraction of
the call overhead. Autograd stays outside, in ``autograd.Function``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_lib = torch.library.Library("fastres", "DEF")


def register(schema: str, impl: Callable, fake: Callable) -> Callable:
    """Define ``fastres::<schema>`` with one implementation for every device and its fake.

    Returns the callable ``torch.ops.fastres.<name>.default``.
    """
    name = schema.partition("(")[0]
    _lib.define(schema)
    _lib.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastres::{name}", fake, lib=_lib)
    return getattr(torch.ops.fastres, name).default
