"""Public-level comparison: an op of ours against its plain PyTorch counterpart in the same dtype and in float64.

Arguments are pytrees of tensors (``fastres.BN`` and ``fastres.ConvBN`` are named tuples, hence pytrees). Whatever
requires grad is differentiated; whatever does not (running statistics, counters, frozen weights) is compared after
the step, so that an unwanted write shows as well as a missing one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.utils import _pytree as pytree

import fastres
from fastres import testing
from fastres.ops import engine


@dataclass
class Outcome:
    out: Tensor
    grads: dict[str, Tensor]
    rest: dict[str, Tensor]  # what does not require grad, after the step


def _leaf(t, wide: bool):
    """A fresh leaf with the values, strides and requires_grad of ``t``."""
    if not isinstance(t, Tensor):
        return t
    dtype = torch.float64 if wide and t.is_floating_point() else t.dtype
    extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    offset = t.data_ptr() % 64 // t.element_size()
    copy = torch.zeros(extent + offset, dtype=dtype).as_strided(t.shape, t.stride(), offset)
    return copy.copy_(t.detach()).requires_grad_(t.requires_grad)


def outcome(fn: Callable, args: dict, *, grad: Tensor | None = None, wide: bool = False, **options) -> Outcome:
    """Call ``fn`` on fresh copies of ``args`` (in float64 if ``wide``) and, given ``grad``, go backward."""
    leaves = pytree.tree_map(lambda t: _leaf(t, wide), args)
    out = fn(**leaves, **options)
    named = {pytree.keystr(path): t for path, t in pytree.tree_flatten_with_path(leaves)[0] if isinstance(t, Tensor)}
    grads = {}
    if grad is not None:
        out.backward(grad.to(out.dtype))
        grads = {name: t.grad for name, t in named.items() if t.requires_grad}
        missing = [name for name, g in grads.items() if g is None]
        assert not missing, f"no gradient for {', '.join(missing)}"
    return Outcome(out.detach(), grads, {name: t for name, t in named.items() if not t.requires_grad})


def compare(
    ours: Callable,
    reference: Callable,
    args: dict,
    *,
    backward: bool = True,
    norms=("max", "rms"),
    terms: float = 1,
    grad: Tensor | None = None,
    options: dict | None = None,
    reference_options: dict | None = None,
) -> Outcome:
    """Output, every gradient and every buffer within the error budget, in the dtype and layout PyTorch gives.

    ``terms``: values summed up by an element of the result (channels times taps of a convolution, rows of a
    reduction). ``grad``: the incoming gradient, by default standard normal in NCHW storage.
    """
    options = options or {}
    reference_options = options if reference_options is None else reference_options
    with torch.no_grad():
        out = outcome(reference, args, **reference_options).out
    out_dtype = out.dtype
    if backward and grad is None:
        grad = testing.fill(out.shape, out_dtype, "normal", seed=77)
    grad = grad if backward else None
    if out_dtype == torch.float64:
        # PyTorch's float64 is the truth for want of a better one, and as far from exact as ours: the floor carries
        # both, times the conditioning of the problem (a mean of thousands of deviations, gradients that cancel).
        terms = terms * 4096
    truth = outcome(reference, args, grad=grad, wide=True, **reference_options)
    peer = outcome(reference, args, grad=grad, **reference_options)
    got = outcome(ours, args, grad=grad, **options)
    assert got.out.dtype == peer.out.dtype
    pairs = [("output", got.out, peer.out, truth.out)]
    for what in ("grads", "rest"):
        a, b, c = (getattr(o, what) for o in (got, peer, truth))
        assert a.keys() == b.keys() == c.keys()
        pairs += [(f"{what}{name}", a[name], b[name], c[name]) for name in a]
    for what, a, b, c in pairs:
        assert a.dtype == b.dtype, f"{what}: got {a.dtype}, expected {b.dtype}"
        if not a.is_floating_point():
            verdict = testing.exactly(a, b, what)
        else:
            # Before a BN with batch statistics the bias of a convolution has no effect: its gradient is all
            # cancellation, of the terms that its weight's gradient sums.
            beside = truth.grads.get(what.removeprefix("grads").replace(".bias", ".weight"))
            scale = max(testing.scale_of(t) for t in (c, beside) if t is not None)
            verdict = testing.within_budget(a, b, c, terms=terms, norms=norms, scale=scale, what=what)
        assert verdict, verdict.message
    return got


# ---- promises every public op makes; `fn(**args)` is the op, `args` as for compare()


def _same(a: Outcome, b: Outcome, what: str) -> None:
    pairs = {"output": (a.out, b.out)}
    for group in ("grads", "rest"):
        pairs.update({f"{group}{n}": (t, getattr(b, group)[n]) for n, t in getattr(a, group).items()})
    for name, (ours, expected) in pairs.items():
        verdict = testing.exactly(ours, expected, f"{name} {what}")
        assert verdict, verdict.message


def _incoming(fn, args, seed=5) -> Tensor:
    with torch.no_grad():
        out = outcome(fn, args).out
    return testing.fill(out.shape, out.dtype, "normal", seed)


def check_repeats(fn, args) -> None:
    """Twice the same bits, also under deterministic mode (where PyTorch fills fresh memory with NaN)."""
    grad = _incoming(fn, args)
    first = outcome(fn, args, grad=grad)
    _same(outcome(fn, args, grad=grad), first, "of a second run")
    torch.use_deterministic_algorithms(True)
    try:
        _same(outcome(fn, args, grad=grad), first, "in deterministic mode")
    finally:
        torch.use_deterministic_algorithms(False)


def check_threads(fn, args) -> None:
    grad, before = _incoming(fn, args), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(outcome(fn, args, grad=grad))
    finally:
        torch.set_num_threads(before)
    _same(found[1], found[0], "with 2 threads")


def check_compile(fn, args, backend: str) -> None:
    """Forward and backward in one graph each (``fullgraph``), to the same bits as without compiling."""
    torch._dynamo.reset()
    grad = _incoming(fn, args)
    compiled = torch.compile(lambda **a: fn(**a), fullgraph=True, backend=backend)
    _same(outcome(compiled, args, grad=grad), outcome(fn, args, grad=grad), f"compiled by {backend}")
    with torch.no_grad():
        _same(outcome(compiled, args), outcome(fn, args), f"compiled by {backend} without grad")


def check_compile_dynamic(fn, channels: int) -> None:
    """One graph serves every batch size; ``fn(x)`` takes ``[N, channels, 7, 5]``."""
    torch._dynamo.reset()
    compiles = []

    def counting(graph, inputs):
        compiles.append(graph)
        return aot_eager(graph, inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    compiled = torch.compile(fn, fullgraph=True, backend=counting)
    for batch in (2, 3, 5):
        x = testing.lay_out(testing.fill((batch, channels, 7, 5), torch.float32, seed=batch), "nhwc").requires_grad_()
        torch._dynamo.mark_dynamic(x, 0)
        out = compiled(x)
        out.sum().backward()
        ours, x.grad = x.grad, None
        expected = fn(x)
        expected.sum().backward()
        assert torch.equal(out, expected) and torch.equal(ours, x.grad)
    assert len(compiles) == 1, f"compiled {len(compiles)} times for three batch sizes"


def check_checkpoint(fn, args) -> None:
    """Activation checkpointing: the same gradients, and running statistics that moved once."""
    grad = _incoming(fn, args)
    plain = outcome(fn, args, grad=grad)
    for reentrant in (False, True):

        def recomputed(x, reentrant=reentrant, **rest):
            # Parameters and buffers belong to a module and do not go through the checkpoint's arguments.
            return torch.utils.checkpoint.checkpoint(lambda x: fn(x, **rest), x, use_reentrant=reentrant)

        _same(outcome(recomputed, args, grad=grad), plain, f"checkpointed (use_reentrant={reentrant})")


def check_double_backward(fn, args) -> None:
    leaves = pytree.tree_map(lambda t: _leaf(t, False), args)
    x = next(t for t in pytree.tree_leaves(leaves) if isinstance(t, Tensor) and t.requires_grad)
    (g,) = torch.autograd.grad(fn(**leaves).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def check_incoming_gradients(fn, args) -> None:
    """Expanded, permuted and sliced gradients count by their values."""
    shape = _incoming(fn, args).shape
    x = next(t for t in pytree.tree_leaves(args) if isinstance(t, Tensor))
    one = testing.fill((1, shape[1], 1, 1), x.dtype, seed=6)
    expanded = one.expand(shape)
    expected = outcome(fn, args, grad=expanded.contiguous())
    for grad in (expanded, *(testing.lay_out(expanded, how) for how in testing.LAYOUTS)):
        _same(outcome(fn, args, grad=grad), expected, f"with gradient strides {grad.stride()}")


def check_subsets(fn, args, *, singles: bool = True) -> None:
    """Whatever is asked for a gradient gets the one it gets when all are asked."""
    flat, spec = pytree.tree_flatten(args)
    wanted = [i for i, t in enumerate(flat) if isinstance(t, Tensor) and t.requires_grad]
    grad = _incoming(fn, args)
    full = outcome(fn, args, grad=grad)
    subsets = [{i} for i in wanted] if singles else [{wanted[0]}, {wanted[-1]}]
    subsets += [set(wanted) - {i} for i in (wanted if singles else wanted[:1])]
    for subset in subsets:
        some = [t.detach().requires_grad_(i in subset) if i in wanted else t for i, t in enumerate(flat)]
        part = outcome(fn, pytree.tree_unflatten(some, spec), grad=grad)
        assert len(part.grads) == len(subset)
        label = f"alone, {' '.join(part.grads)}" if len(subset) == 1 else "without some others"
        verdict = testing.exactly(part.out, full.out, f"output, {label}")
        assert verdict, verdict.message
        for name, g in part.grads.items():
            verdict = testing.exactly(g, full.grads[name], f"grad{name} {label}")
            assert verdict, verdict.message


def check_empty_batch(fn, reference, args) -> None:
    """No images in, no images out; gradients of parameters are zero and running statistics stay finite."""
    x = next(t for t in pytree.tree_leaves(args) if isinstance(t, Tensor))
    with torch.no_grad():
        expected = outcome(reference, args, wide=True).out.shape
    got = outcome(fn, args, grad=torch.zeros(expected, dtype=x.dtype))
    assert got.out.shape == expected and got.out.numel() == 0
    for name, g in got.grads.items():
        assert torch.equal(g, torch.zeros_like(g)), f"grad{name}"
    before = {pytree.keystr(p): t for p, t in pytree.tree_flatten_with_path(args)[0] if isinstance(t, Tensor)}
    for name, t in got.rest.items():
        if t.is_floating_point():
            verdict = testing.exactly(t, before[name], f"{name} after an empty batch")
            assert verdict, verdict.message


def check_autocast(fn, reference, args, *, norms=("rms",), terms: float = 1) -> None:
    """bf16 autocast: dtype of PyTorch, error within the budget of PyTorch's autocast, gradients in fp32."""

    def under(f):
        def call(**leaves):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return f(**leaves)

        return call

    grad = _incoming(reference, args).to(torch.bfloat16)
    truth = outcome(reference, args, grad=grad, wide=True)
    peer = outcome(under(reference), args, grad=grad)
    got = outcome(under(fn), args, grad=grad)
    assert got.out.dtype == peer.out.dtype
    floor = torch.finfo(torch.bfloat16).eps
    for group in ("grads", "rest"):
        for name, t in getattr(got, group).items():
            p, w = getattr(peer, group)[name], getattr(truth, group)[name]
            assert t.dtype == p.dtype, name
            if t.is_floating_point():
                # Gradients of a bf16 computation, handed out in fp32: the rounding is bf16's.
                verdict = testing.within_budget(
                    t, p, w, norms=norms, terms=max(terms, (floor / torch.finfo(torch.float32).eps) ** 2 / 4), what=name
                )
                assert verdict, verdict.message
    verdict = testing.within_budget(got.out, peer.out, truth.out, norms=norms, terms=terms, what="output")
    assert verdict, verdict.message


def opcheck_block(x, residual, units, kind: int, op: str, low: bool = False) -> None:
    """``torch.library.opcheck`` of the block engine's two operators on the arguments of one call."""
    residual = None if residual is None else residual.detach()
    convs = [u for u in units if isinstance(u, fastres.ConvBN)]
    bns = [u.bn if isinstance(u, fastres.ConvBN) else u for u in units]
    weights, biases = [c.weight for c in convs], [c.bias for c in convs]
    batch_stats, geometry = [b.training for b in bns], [v for c in convs for v in engine.flatten(c)]
    head = (
        x, residual, weights, biases, [b.weight for b in bns], [b.bias for b in bns], [b.running_mean for b in bns],
        [b.running_var for b in bns], batch_stats, [b.eps for b in bns], geometry, kind, True, low,
    )  # fmt: skip
    for save in (True, False):
        torch.library.opcheck(torch.ops.fastres.block_fwd.default, (*head, save, op, ""))
    out, *rest = engine.fwd_op(*head, True, op, "")
    stats, acts = rest[: len(bns)], rest[len(bns) :]
    mask = acts.pop() if kind != engine.NONE else None
    kept = residual if kind == engine.TENSOR_BN else None
    for everything in (True, False):
        needs = [True, True] + [everything, everything, True, True] * len(bns)
        backward = (
            torch.randn_like(out), x, kept, weights, biases, stats, acts, mask, geometry, kind, True, low, batch_stats,
            needs, op, "",
        )  # fmt: skip
        torch.library.opcheck(torch.ops.fastres.block_bwd.default, backward)


def widened(args):
    """The arguments in float64."""
    return pytree.tree_map(lambda t: _leaf(t.detach(), True) if isinstance(t, Tensor) else t, args)


def saved_bytes(fn, args, **options) -> int:
    """Bytes kept for backward beyond the arguments themselves: unique storages that autograd packs."""
    leaves = pytree.tree_map(lambda t: _leaf(t, False), args)
    given = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves(leaves) if isinstance(t, Tensor)}
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = fn(**leaves, **options)
    del out
    return sum(n for address, n in storages.items() if address not in given)
