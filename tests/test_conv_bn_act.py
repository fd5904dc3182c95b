"""conv_bn_act and its folded inference: launch functions on every backend, then the public ops."""

from __future__ import annotations

import launch_tests
import public_cases
import pytest
import torch
from kernel_cases import DTYPES, NAMES

import fastres
from fastres import testing
from fastres.backends.reference import acc_dtype
from fastres.ops import engine
from fastres.ops.conv_bn_act import conv_bn_act_ref

FUNCTIONS = ("bias_act",)
FORMS = ("plain", "residual", "two BNs")
#: Geometries, each with its own corner: pointwise, strided, dilated, grouped, depthwise and biased, even and padded.
GEOMETRIES = {
    "1x1": dict(C=7, K=12, size=1),
    "strided 3x3": dict(C=8, K=8, size=3, stride=2),
    "dilated": dict(C=4, K=5, size=3, dilation=2),
    "grouped": dict(C=8, K=12, size=3, groups=4),
    "depthwise, biased": dict(C=6, K=6, size=3, groups=6, bias=True),
    "even, padded": dict(C=3, K=4, size=2, padding=1, stride=2),
}


@launch_tests.parametrize(*FUNCTIONS)
def test_values(kernels, function, dtype):
    launch_tests.check_values(kernels, function, dtype)


@launch_tests.parametrize(*FUNCTIONS)
def test_exact(kernels, function, dtype):
    launch_tests.check_exact(kernels, function, dtype)


@launch_tests.parametrize(*FUNCTIONS)
def test_repeats(kernels, function, dtype):
    launch_tests.check_repeats(kernels, function, dtype)


def make(form="plain", dtype=torch.float32, geometry="strided 3x3", layout="nhwc", batch=2, **conv) -> dict:
    options = GEOMETRIES[geometry]
    x = testing.fill((batch, options["C"], 9, 8), dtype, seed=1)
    args = dict(x=x, conv=testing.make_conv(**options, dtype=dtype, seed=2, **conv))
    with torch.no_grad():
        shape = conv_bn_act_ref(**args, upcast=True).shape
    if form != "plain":
        args["residual"] = testing.fill(shape, dtype, seed=3)
    if form == "two BNs":
        bn = {k: v for k, v in conv.items() if k in ("training", "momentum")}
        args["residual_bn"] = testing.make_bn(shape[1], dtype=acc_dtype(dtype), seed=4, **bn)
    if batch:
        plain = public_cases.outcome(conv_bn_act_ref, args, wide=True, relu=False).out
        testing.clear_of_zero(plain, args["conv"].bn.bias)
    for name in ("x", "residual"):
        if name in args:
            args[name] = testing.lay_out(args[name], layout).requires_grad_()
    return args


def terms(args) -> int:
    """Products in an output, plus rows of a reduction."""
    return args["conv"].weight[0].numel() + 2 * 9 * 8


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_against_pytorch(backend, dtype, geometry, training):
    form = FORMS[(list(GEOMETRIES).index(geometry) + training) % 3]  # every form meets both modes
    args = make(form, dtype, geometry, training=training)
    # In 16 bits the convolution's own rounding flips ReLUs: compared in the mean, where PyTorch flips as many.
    norms = ("max", "rms") if dtype in (torch.float32, torch.float64) else ("rms",)
    public_cases.compare(fastres.conv_bn_act, conv_bn_act_ref, args, terms=terms(args), norms=norms)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(backend, layout):
    args = make("residual", layout=layout)
    got = public_cases.compare(fastres.conv_bn_act, conv_bn_act_ref, args, terms=terms(args))
    channels_last = args["x"].is_contiguous(memory_format=torch.channels_last)
    assert got.out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("form", FORMS)
def test_empty_batch(backend, form):
    public_cases.check_empty_batch(fastres.conv_bn_act, conv_bn_act_ref, make(form, batch=0))


@pytest.mark.parametrize("dtype", [torch.float64], ids=NAMES.get)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradcheck(backend, dtype, training):
    args = make("two BNs", dtype, "even, padded", training=training, bias=True)
    args["x"] = args["x"].detach()[:, :, :4, :3].clone().requires_grad_()
    conv, rbn = args["conv"], args["residual_bn"]
    args["residual"] = args["residual"].detach()[:, :, :3, :2].clone().requires_grad_()
    inputs = (args["x"], conv.weight, conv.bias, conv.bn.weight, conv.bn.bias, args["residual"], rbn.weight)
    pre = public_cases.outcome(conv_bn_act_ref, args, wide=True, relu=False).out
    assert testing.clear_of_zero(pre, conv.bn.bias) > 1e-3

    def call(x, w, b, bw, bb, r, rw):
        unit = conv._replace(weight=w, bias=b, bn=conv.bn._replace(weight=bw, bias=bb))
        return fastres.conv_bn_act(x, unit, residual=r, residual_bn=rbn._replace(weight=rw))

    assert torch.autograd.gradcheck(call, inputs)


def test_repeats_and_subsets(backend):
    public_cases.check_repeats(fastres.conv_bn_act, make("two BNs", geometry="depthwise, biased"))
    public_cases.check_subsets(fastres.conv_bn_act, make("two BNs", geometry="depthwise, biased"))
    public_cases.check_subsets(fastres.conv_bn_act, make("plain"))


def test_incoming_gradients(backend):
    public_cases.check_incoming_gradients(fastres.conv_bn_act, make("residual"))


def test_double_backward(backend):
    public_cases.check_double_backward(fastres.conv_bn_act, make())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpoint(backend, momentum):
    public_cases.check_checkpoint(fastres.conv_bn_act, make("two BNs", momentum=momentum))


@pytest.mark.computes_in(torch.bfloat16)
def test_autocast(backend):
    args = make("residual")
    args["residual"] = args["residual"].detach().bfloat16().requires_grad_()  # what a convolution would have made
    public_cases.check_autocast(fastres.conv_bn_act, conv_bn_act_ref, args, terms=terms(args))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("form", FORMS)
def test_compile(form, training):
    public_cases.check_compile(fastres.conv_bn_act, make(form, training=training), "aot_eager")


# ---- folded inference


def _folded(x, conv, residual=None, relu=True):
    weight, bias = fastres.fold_conv_bn(conv)
    return fastres.conv_bias_act(
        x, weight, bias, stride=conv.stride, padding=conv.padding, dilation=conv.dilation, groups=conv.groups,
        residual=residual, relu=relu,
    )  # fmt: skip


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_folded(backend, dtype, geometry):
    for form, relu in (("plain", True), ("residual", True), ("plain", False)):
        args = make(form, dtype, geometry, training=False, requires_grad=False)
        args = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
        public_cases.compare(_folded, conv_bn_act_ref, args, terms=terms(args), backward=False, options=dict(relu=relu))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_folded_automatic(dtype):
    """Without a forced backend the library's own epilogue may serve."""
    for geometry in GEOMETRIES:
        args = make("residual", dtype, geometry, training=False, requires_grad=False)
        args = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
        public_cases.compare(_folded, conv_bn_act_ref, args, terms=terms(args), backward=False)


def test_folding_is_exact_in_float64():
    conv = make(dtype=torch.float64, training=False, bias=True)["conv"]
    weight, bias = fastres.fold_conv_bn(conv)
    scale = conv.bn.weight / (conv.bn.running_var + conv.bn.eps).sqrt()
    verdict = testing.within_budget(weight, None, (conv.weight * scale[:, None, None, None]).detach(), what="weight")
    assert verdict, verdict.message
    expected = ((conv.bias - conv.bn.running_mean) * scale + conv.bn.bias).detach()
    verdict = testing.within_budget(bias, None, expected, what="bias")
    assert verdict, verdict.message
    bare = conv._replace(bn=conv.bn._replace(weight=None, bias=None))
    weight, bias = fastres.fold_conv_bn(bare)
    assert weight.dtype == torch.float64 and bias.shape == (8,)


def test_opcheck():
    for form, kind in zip(FORMS, (engine.NONE, engine.TENSOR, engine.TENSOR_BN), strict=True):
        args = make(form, requires_grad=False)
        units = [args["conv"], *([args["residual_bn"]] if "residual_bn" in args else [])]
        public_cases.opcheck_block(args["x"].detach(), args.get("residual"), units, kind, "conv_bn_act")
    conv = args["conv"]
    x = args["x"].detach()
    flat = (x, conv.weight, torch.randn(8), engine.flatten(conv), args["residual"].detach(), True, "")
    torch.library.opcheck(torch.ops.fastres.conv_bias_act.default, flat)
