"""Bad input: the right exception, naming argument, got and expected, before anything is written."""

from __future__ import annotations

import re

import public_cases
import pytest
import torch
from torch.utils import _pytree as pytree

import fastres
from fastres import BN, ConvBN, testing


def x(*shape, dtype=torch.float32, **kwargs):
    return torch.ones(shape or (2, 8, 6, 6), dtype=dtype, **kwargs)


def bn(C=8, **changes) -> BN:
    return testing.make_bn(C)._replace(**changes)


def conv(C=8, K=8, size=3, **changes) -> ConvBN:
    return testing.make_conv(C, K, size)._replace(**changes)


def vector(n=8, **kwargs):
    return torch.ones(n, **kwargs)


META = torch.device("meta")
OPS = {
    "add_relu": lambda x_, **k: fastres.add_relu(x_, k.pop("residual", x_), **k),
    "batch_norm_act": lambda x_, **k: fastres.batch_norm_act(x_, k.pop("bn", bn()), **k),
    "conv_bn_act": lambda x_, **k: fastres.conv_bn_act(x_, k.pop("conv", conv()), **k),
    "basic_block": lambda x_, **k: fastres.basic_block(x_, k.pop("convs", (conv(), conv())), **k),
    "bottleneck": lambda x_, **k: fastres.bottleneck(x_, k.pop("convs", (conv(), conv(), conv())), **k),
    "stem": lambda x_, **k: fastres.stem(x_, k.pop("conv", conv()), **k),
    "conv_bias_act": lambda x_, **k: fastres.conv_bias_act(
        x_, k.pop("weight", vector(576).view(8, 8, 3, 3)), k.pop("bias", None), padding=(1, 1), **k
    ),
}

#: op, argument x, further arguments, exception, what the message says
CASES = [
    # non-tensors
    ("add_relu", [1.0], {}, TypeError, "x: got list, expected a torch.Tensor"),
    ("add_relu", x(), dict(residual=None), TypeError, "residual: got NoneType, expected a torch.Tensor"),
    ("batch_norm_act", None, {}, TypeError, "x: got NoneType"),
    ("batch_norm_act", x(), dict(bn=torch.nn.BatchNorm2d(8)), TypeError, "bn: got BatchNorm2d, expected fastres.BN"),
    ("batch_norm_act", x(), dict(bn=bn(weight=[1.0] * 8)), TypeError, "bn.weight: got list, expected a torch.Tensor"),
    ("conv_bn_act", x(), dict(conv=torch.nn.Conv2d(8, 8, 3)), TypeError, "conv: got Conv2d, expected fastres.ConvBN"),
    ("conv_bn_act", x(), dict(conv=conv(weight=None)), TypeError, "conv.weight: got NoneType"),
    ("conv_bn_act", x(), dict(conv=conv(bn=None)), TypeError, "conv.bn: got NoneType, expected fastres.BN"),
    ("basic_block", x(), dict(convs=(conv(), None)), TypeError, "convs[1]: got NoneType, expected fastres.ConvBN"),
    ("basic_block", x(), dict(shortcut=x()), TypeError, "shortcut: got Tensor, expected fastres.ConvBN"),
    ("stem", "image", {}, TypeError, "x: got str"),
    # dtypes
    ("add_relu", x(dtype=torch.int32), {}, TypeError, "x: got dtype torch.int32, expected float32"),
    ("add_relu", x(), dict(residual=x(dtype=torch.float64)), TypeError, "residual: got dtype torch.float64, expected"),
    ("batch_norm_act", x(dtype=torch.complex64), {}, TypeError, "x: got dtype torch.complex64"),
    ("batch_norm_act", x(), dict(residual=x(dtype=torch.bfloat16)), TypeError, "residual: got dtype torch.bfloat16"),
    ("batch_norm_act", x(), dict(bn=bn(weight=vector(dtype=torch.int64))), TypeError, "bn.weight: got dtype torch.int"),
    ("conv_bn_act", x(dtype=torch.bfloat16), {}, TypeError, "conv.weight: got dtype torch.float32, expected torch.bf"),
    ("conv_bn_act", x(), dict(residual=x(dtype=torch.float16)), TypeError, "residual: got dtype torch.float16"),
    ("conv_bias_act", x(dtype=torch.float64), {}, TypeError, "weight: got dtype torch.float32, expected torch.float64"),
    ("bottleneck", x(dtype=torch.float16), {}, TypeError, "convs[0].weight: got dtype torch.float32"),
    # devices
    ("add_relu", x(), dict(residual=x(device=META)), ValueError, "residual: got device meta, expected that of x, cpu"),
    ("batch_norm_act", x(device=META), {}, ValueError, "bn.weight: got device cpu, expected meta"),
    ("batch_norm_act", x(), dict(bn=bn(running_var=vector(device=META))), ValueError, "bn.running_var: got device"),
    ("batch_norm_act", x(), dict(residual=x(device=META)), ValueError, "residual: got device meta"),
    ("conv_bn_act", x(device=META), {}, ValueError, "conv.weight: got device cpu, expected meta"),
    ("conv_bn_act", x(), dict(residual=x(device=META)), ValueError, "residual: got device meta, expected that of x"),
    ("stem", x(device=META), {}, ValueError, "conv.weight: got device cpu"),
    ("conv_bias_act", x(), dict(bias=vector(device=META)), ValueError, "bias: got device meta"),
    # layouts
    ("add_relu", x().to_sparse(), {}, ValueError, "x: got layout torch.sparse_coo, expected a strided tensor"),
    ("batch_norm_act", x().to_sparse(), {}, ValueError, "x: got layout torch.sparse_coo"),
    ("batch_norm_act", x(), dict(residual=x().to_sparse()), ValueError, "residual: got layout torch.sparse_coo"),
    ("stem", x().to_mkldnn(), {}, ValueError, "x: got layout torch._mkldnn"),
    # shapes
    ("add_relu", x(), dict(residual=x(2, 8, 1, 1)), ValueError, "residual: got shape (2, 8, 1, 1), expected that of x"),
    ("batch_norm_act", x(2, 8), {}, ValueError, "x: got shape (2, 8), expected 4 dimensions"),
    ("batch_norm_act", x(2, 8, 5), {}, ValueError, "x: got shape (2, 8, 5), expected 4 dimensions"),
    ("batch_norm_act", x(), dict(residual=x(2, 8, 6, 5)), ValueError, "residual: got shape (2, 8, 6, 5)"),
    ("batch_norm_act", x(), dict(bn=bn(7)), ValueError, "bn.weight: got shape (7,), expected (8,)"),
    ("batch_norm_act", x(), dict(bn=bn(bias=vector(1))), ValueError, "bn.bias: got shape (1,), expected (8,)"),
    ("batch_norm_act", x(), dict(bn=bn(running_mean=vector(9))), ValueError, "bn.running_mean: got shape (9,)"),
    ("batch_norm_act", x(), dict(residual=x(), residual_bn=bn(4)), ValueError, "residual_bn.weight: got shape (4,)"),
    ("conv_bn_act", x(2, 5, 6, 6), {}, ValueError, "conv.weight: got 8 input channels, expected 5"),
    ("conv_bn_act", x(), dict(conv=conv(weight=x(8, 8))), ValueError, "conv.weight: got shape (8, 8), expected [K,"),
    ("conv_bn_act", x(), dict(conv=conv(bias=vector(3))), ValueError, "conv.bias: got shape (3,), expected (8,)"),
    ("conv_bn_act", x(), dict(residual=x(2, 8, 3, 3)), ValueError, "residual: got shape (2, 8, 3, 3), expected"),
    ("conv_bn_act", x(2, 8, 1, 1), dict(conv=conv(padding=(0, 0))), ValueError, "conv: got an input of 1x1, expected"),
    ("conv_bias_act", x(), dict(residual=x(1)), ValueError, "residual: got shape (1,)"),
    ("basic_block", x(), dict(convs=(conv(), conv(8, 4))), ValueError, "shortcut: got None with x (2, 8, 6, 6)"),
    ("basic_block", x(), dict(shortcut=conv(8, 4, 1)), ValueError, "shortcut: got output shape (2, 4, 6, 6), expected"),
    ("basic_block", x(), dict(convs=(conv(8, 4), conv())), ValueError, "convs[1].weight: got 8 input channels, expect"),
    ("bottleneck", x(), dict(convs=(conv(), conv())), ValueError, "convs: got 2, expected 3 fastres.ConvBN"),
    ("bottleneck", x(), dict(convs=conv), ValueError, "convs: got function, expected 3"),
    ("stem", x(2, 8, 6), {}, ValueError, "x: got shape (2, 8, 6), expected 4 dimensions"),
    # zero channels, too few values
    ("batch_norm_act", x(2, 0, 6, 6), {}, ValueError, "x: got shape (2, 0, 6, 6), expected at least one channel"),
    ("conv_bn_act", x(2, 0, 6, 6), {}, ValueError, "expected at least one channel"),
    ("conv_bn_act", x(), dict(conv=conv(weight=x(0, 8, 3, 3))), ValueError, "conv.weight: got shape (0, 8, 3, 3)"),
    ("batch_norm_act", x(1, 8, 1, 1), {}, ValueError, "bn: got one value per channel in training, expected more"),
    ("conv_bn_act", x(1, 8, 2, 2), dict(conv=conv(stride=(2, 2))), ValueError, "conv.bn: got one value per channel"),
    ("basic_block", x(1, 8, 1, 1), {}, ValueError, "convs[0].bn: got one value per channel"),
    ("stem", x(1, 8, 1, 1), {}, ValueError, "conv.bn: got one value per channel"),
    # options
    ("batch_norm_act", x(), dict(residual_bn=bn()), ValueError, "residual_bn: got a BN without a residual"),
    ("batch_norm_act", x(), dict(bn=bn(eps=-1.0)), ValueError, "bn.eps: got -1.0, expected a number >= 0"),
    ("batch_norm_act", x(), dict(bn=bn(eps=float("nan"))), ValueError, "bn.eps: got nan"),
    ("batch_norm_act", x(), dict(bn=bn(running_mean=None)), ValueError, "bn.running_mean and bn.running_var: expected"),
    ("batch_norm_act", x(), dict(bn=bn(running_mean=None, running_var=None, training=False)), ValueError,
     "bn: got training=False without running statistics"),
    ("batch_norm_act", x(), dict(bn=bn(momentum=None, num_batches_tracked=None)), ValueError, "bn.momentum: got None"),
    ("batch_norm_act", x(), dict(bn=bn(momentum="0.1")), TypeError, "bn.momentum: got '0.1', expected"),
    ("batch_norm_act", x(), dict(bn=bn(num_batches_tracked=3)), TypeError, "bn.num_batches_tracked: got int, expected"),
    ("conv_bn_act", x(), dict(residual_bn=bn()), ValueError, "residual_bn: got a BN without a residual"),
    ("conv_bn_act", x(), dict(conv=conv(stride=2)), TypeError, "conv.stride: got 2, expected a tuple of two integers"),
    ("conv_bn_act", x(), dict(conv=conv(stride=(0, 1))), ValueError, "conv.stride: got (0, 1), expected integers >= 1"),
    ("conv_bn_act", x(), dict(conv=conv(padding="same")), TypeError, "conv.padding: got 'same', expected a tuple"),
    ("conv_bn_act", x(), dict(conv=conv(padding=(-1, 0))), ValueError, "conv.padding: got (-1, 0), expected"),
    ("conv_bn_act", x(), dict(conv=conv(groups=3)), ValueError, "conv.groups: got 3, expected a divisor of the 8"),
    ("basic_block", x(), dict(memory="tiny"), ValueError, "memory: got 'tiny', expected 'default' or 'low'"),
    ("stem", x(), dict(pool_kernel=0), ValueError, "pool_kernel: got 0, expected an integer >= 1"),
    ("stem", x(), dict(pool_stride=1.5), ValueError, "pool_stride: got 1.5, expected an integer >= 1"),
    ("stem", x(), dict(pool_kernel=16, pool_padding=0), ValueError, "pool_kernel: got 16, expected at most 15"),
    ("stem", x(), dict(pool_padding=2), ValueError, "pool_padding: got 2, expected 0 to half of pool_kernel"),
    ("stem", x(), dict(pool_kernel=9, pool_padding=0), ValueError, "pool_kernel: got 9, expected one that fits"),
    # requires grad where unsupported
    ("conv_bias_act", x(requires_grad=True), {}, ValueError, "x: got a tensor that requires grad, expected inference"),
    ("batch_norm_act", x(), dict(bn=bn(running_mean=vector(requires_grad=True))), ValueError,
     "bn.running_mean: got a tensor that requires grad, expected a buffer without"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "given", "arguments", "error", "message"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)
def test_refused(op, given, arguments, error, message):
    tensors = [t for t in pytree.tree_leaves((given, arguments)) if _comparable(t)]
    before = [t.clone() for t in tensors]
    with pytest.raises(error, match=re.escape(message)):
        OPS[op](given, **dict(arguments))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True)), "something was written"


def _comparable(t) -> bool:
    return isinstance(t, torch.Tensor) and t.device.type == "cpu" and t.layout == torch.strided


def test_the_last_argument_is_checked_before_the_first_is_touched():
    """A block whose shortcut is wrong leaves the running statistics of its first BN alone."""
    first = conv()
    before = [t.clone() for t in (first.bn.running_mean, first.bn.running_var, first.bn.num_batches_tracked)]
    with pytest.raises(ValueError, match="shortcut.bn.weight: got shape"):
        fastres.basic_block(x(), (first, conv()), conv(8, 8, 1, bn=bn(4)))
    with pytest.raises(ValueError, match="residual_bn.weight: got shape"):
        fastres.batch_norm_act(x(), first.bn, residual=x(), residual_bn=bn(4))
    after = [first.bn.running_mean, first.bn.running_var, first.bn.num_batches_tracked]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("op", [op for op in OPS if op != "add_relu"])
def test_a_backend_that_cannot_serve_leaves_statistics_alone(op):
    units = {"bn": bn(), "conv": conv(), "convs": (conv(), conv()), "bottleneck": (conv(), conv(), conv())}
    name = {"batch_norm_act": "bn", "basic_block": "convs", "bottleneck": "bottleneck"}.get(op, "conv")
    arguments = {} if op == "conv_bias_act" else {name.replace("bottleneck", "convs"): units[name]}
    before = pytree.tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, units[name])
    with fastres.backend("cuda"), torch.no_grad(), pytest.raises(ValueError, match="backend 'cuda' cannot serve"):
        OPS[op](x(), **arguments)
    for a, b in zip(pytree.tree_leaves(units[name]), pytree.tree_leaves(before), strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend: got 'gpu', expected one of"), fastres.backend("gpu"):
        fastres.add_relu(x(), x())


def test_folding_needs_statistics():
    with pytest.raises(ValueError, match="conv.bn: got no running statistics"):
        fastres.fold_conv_bn(conv(bn=bn(running_mean=None, running_var=None)))
    with pytest.raises(TypeError, match="conv: got Conv2d, expected fastres.ConvBN"):
        fastres.fold_conv_bn(torch.nn.Conv2d(3, 3, 1))


def test_meta_tensors_infer_shapes():
    """All arguments on the meta device is no mistake: shapes are inferred, as by PyTorch's own operators."""
    args = pytree.tree_map(
        lambda t: t.detach().to(META) if isinstance(t, torch.Tensor) else t, dict(x=x(), convs=(conv(), conv()))
    )
    out = fastres.basic_block(**args)
    assert out.shape == (2, 8, 6, 6) and out.device == META


# ---- launches: what reaches the compiled kernels as an address is checked by backends/native.py


def _apply(launch, **changes):
    given = dict(
        x=torch.zeros(5, 8), M=5, C=8, stat=torch.zeros(5, 8), residual=None, rstat=None, relu=True,
        out=torch.full((5, 8), 7.0), mask=torch.full((5, 1), 7, dtype=torch.uint8),
    )  # fmt: skip
    given.update(changes)
    launch.bn_apply(**given)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(x=None), TypeError, "x must be a tensor, got NoneType"),
        (dict(x=torch.zeros(5, 8, dtype=torch.int32)), TypeError, "x must be float32"),
        (dict(x=torch.zeros(4, 8)), ValueError, "x must be 5 x 8 elements in dense NHWC"),
        (dict(x=torch.zeros(8, 5).t()), ValueError, "x must be 5 x 8 elements in dense NHWC"),
        (dict(x=torch.zeros(1, 8, 5, 1, device=META)), ValueError, "x must be on"),
        (dict(stat=torch.zeros(4, 8)), ValueError, "stat must be contiguous [5, 8]"),
        (dict(stat=torch.zeros(5, 8, dtype=torch.float64)), TypeError, "stat must be torch.float32"),
        (dict(residual=torch.zeros(5, 8, dtype=torch.float16)), TypeError, "residual must be torch.float32"),
        (dict(rstat=torch.zeros(5, 8)), ValueError, "rstat was given without residual"),
        (dict(mask=torch.zeros(5, 1)), TypeError, "mask must be torch.uint8"),
        (dict(mask=torch.zeros(5, 2, dtype=torch.uint8)), ValueError, "mask must be contiguous [5, 1]"),
        (dict(relu=2), ValueError, "relu must be a bool, got 2"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_launch_arguments(native, changes, error, message):
    out = torch.full((5, 8), 7.0)
    with pytest.raises(error, match=re.escape(message)):
        _apply(native, **{"out": out, **changes})
    assert torch.equal(out, torch.full((5, 8), 7.0))


def test_launch_aliases(native):
    """Overlaps that launch.h does not allow."""
    memory = torch.zeros(12, 8)
    with pytest.raises(ValueError, match="out must not overlap x in memory"):
        _apply(native, x=memory[:5], out=memory[1:6])
    with pytest.raises(ValueError, match="out must not overlap residual in memory"):
        _apply(native, residual=memory[:5], out=memory[:5])
    with pytest.raises(ValueError, match="out must not overlap stat in memory"):
        _apply(native, stat=memory[:5], out=memory[:5])
    _apply(native, x=memory[:5], out=memory[:5])


def test_helpers_of_testing_refuse_nonsense():
    t = torch.zeros(3)
    with pytest.raises(ValueError, match="truth: got dtype torch.float32"):
        testing.within_budget(t, t, t)
    with pytest.raises(ValueError, match="peer: got shape"):
        testing.within_budget(t, torch.zeros(4), t.double())
    with pytest.raises(ValueError, match="layout: got 'nwhc'"):
        testing.lay_out(torch.zeros(1, 1, 1, 1), "nwhc")
    assert not testing.within_budget(t + 1e-3, t, t.double() + 1e-9, what="a thousandth")
    assert not testing.within_budget(t * float("nan"), t, t.double())
    assert public_cases.saved_bytes(torch.relu, dict(input=torch.ones(4, requires_grad=True))) == 16
