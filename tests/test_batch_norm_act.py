"""batch_norm_act: launch functions on every backend, then the public op."""

from __future__ import annotations

import launch_tests
import public_cases
import pytest
import torch
from kernel_cases import DTYPES, NAMES
from torch import nn

import fastres
from fastres import testing
from fastres.backends.reference import acc_dtype
from fastres.nn.reading import read_batch_norm
from fastres.ops import batch_norm_act as module
from fastres.ops.batch_norm_act import batch_norm_act_ref

FUNCTIONS = ("bn_stats", "bn_finalize", "bn_fold", "bn_apply", "bn_bwd_reduce", "bn_bwd_finalize", "bn_bwd_apply")
FORMS = ("plain", "residual", "two BNs")
SHAPE = (2, 20, 7, 5)


@launch_tests.parametrize(*FUNCTIONS)
def test_values(kernels, function, dtype):
    launch_tests.check_values(kernels, function, dtype)


@launch_tests.parametrize(*FUNCTIONS)
def test_exact(kernels, function, dtype):
    launch_tests.check_exact(kernels, function, dtype)


@launch_tests.parametrize(*FUNCTIONS)
def test_repeats(kernels, function, dtype):
    launch_tests.check_repeats(kernels, function, dtype)


def make(form="plain", dtype=torch.float32, shape=SHAPE, layout="nhwc", kind="normal", **bn) -> dict:
    """Arguments of the op; no pre-activation within rounding distance of zero."""
    bn = {"dtype": acc_dtype(dtype), "mean": testing.mean_of(kind, dtype), **bn}
    args = dict(x=testing.fill(shape, dtype, kind, 1), bn=testing.make_bn(shape[1], seed=2, **bn))
    if form != "plain":
        args["residual"] = testing.fill(shape, dtype, kind, 3)
    if form == "two BNs":
        args["residual_bn"] = testing.make_bn(shape[1], seed=4, **bn)
    if args["bn"].bias is not None:
        plain = public_cases.outcome(batch_norm_act_ref, args, wide=True, relu=False).out
        testing.clear_of_zero(plain, args["bn"].bias)
    for name in ("x", "residual"):
        if name in args:
            args[name] = testing.lay_out(args[name], layout).requires_grad_()
    return args


def rows(shape=SHAPE) -> int:
    return shape[0] * shape[2] * shape[3]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_against_pytorch(backend, dtype, form, training):
    # Both ReLU settings and every layout once; odd channel counts, a single row, and a mean that dwarfs the variance.
    for shape, layout, relu in ((SHAPE, "nhwc", True), ((3, 3, 4, 5), "permuted", False), ((2, 7, 1, 1), "nchw", True)):
        args = make(form, dtype, shape, layout, training=training)
        public_cases.compare(
            fastres.batch_norm_act, batch_norm_act_ref, args, terms=rows(shape), options=dict(relu=relu)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_huge_mean(backend, dtype):
    shape = (2, 8, 9, 9)
    args = make("two BNs", dtype, shape, kind="huge_mean")
    # PyTorch's float64, the truth for float64 too, has lost the digits of the mean: a condition of 4096.
    condition = 4096 if dtype == torch.float64 else 1
    public_cases.compare(fastres.batch_norm_act, batch_norm_act_ref, args, terms=rows(shape) * condition)


def test_real_shape(backend):
    # One layer of resnet50 (small batch); simulated hardware has done enough with the odd shapes.
    shape = (1, 256, 56, 56) if backend in ("reference", "cpu") else (1, 64, 14, 14)
    args = make("residual", torch.float32, shape)
    public_cases.compare(fastres.batch_norm_act, batch_norm_act_ref, args, terms=rows(shape))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(backend, layout):
    args = make("residual", layout=layout)
    got = public_cases.compare(fastres.batch_norm_act, batch_norm_act_ref, args, terms=rows())
    channels_last = args["x"].is_contiguous(memory_format=torch.channels_last)
    assert got.out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("form", FORMS)
def test_empty_batch(backend, form):
    for training in (True, False):
        args = make(form, shape=(0, 4, 5, 5), training=training)
        public_cases.check_empty_batch(fastres.batch_norm_act, batch_norm_act_ref, args)


def test_options(backend):
    def compare(args):
        public_cases.compare(fastres.batch_norm_act, batch_norm_act_ref, args, terms=rows())

    compare(make("two BNs", momentum=None))
    compare(make("residual", affine=False))
    compare(make(eps=0.5, momentum=1.0))
    args = make(momentum=0.0)
    compare(dict(args, bn=args["bn"]._replace(num_batches_tracked=None)))
    compare(dict(args, bn=args["bn"]._replace(running_mean=None, running_var=None, num_batches_tracked=None)))
    compare(dict(args, bn=args["bn"]._replace(weight=None)))
    frozen = testing.make_bn(SHAPE[1], seed=8, training=False)  # one BN frozen, the other learning
    compare(dict(make("two BNs"), residual_bn=frozen))


def make_half(form) -> dict:
    """A network cast to fp16 as a whole: parameters and statistics in fp16 too."""
    args = make(form, torch.float16)
    bn = args["bn"]
    half = {n: getattr(bn, n).detach().half().requires_grad_(n in ("weight", "bias")) for n in bn._fields[:4]}
    return dict(args, bn=bn._replace(**half))


@pytest.mark.parametrize("dtype", [torch.float16], ids=NAMES.get)
def test_parameters_in_the_activation_dtype(backend, dtype):
    public_cases.compare(fastres.batch_norm_act, batch_norm_act_ref, make_half("residual"), terms=rows())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAMES.get)
def test_mask_near_zero(backend, dtype):
    """Without keeping clear of zero: the mask is that of float64 but for accumulator rounding at the edge."""
    x, bn = testing.fill((4, 16, 16, 16), dtype, seed=11), testing.make_bn(16, seed=12)
    residual = testing.fill(x.shape, dtype, seed=13)
    args = dict(x=x.requires_grad_(), bn=bn, residual=residual.requires_grad_())
    pre = public_cases.outcome(batch_norm_act_ref, args, wide=True, relu=False).out
    got = public_cases.outcome(fastres.batch_norm_act, args, grad=torch.ones(x.shape, dtype=dtype))
    passed = got.grads["['residual']"] != 0
    verdict = testing.mask_verdict(passed, pre, 32 * torch.finfo(torch.float32).eps * pre.abs().max().item())
    assert verdict, verdict.message


def test_nan_and_infinity(backend):
    """They stay where they are with given statistics; NaN passes the ReLU's gradient, as in PyTorch."""
    for form in FORMS:
        args = make(form, training=False)
        with torch.no_grad():
            for value, channel in ((float("nan"), 1), (float("inf"), 2), (-float("inf"), 3)):
                args["x"][0, channel, 2, 2] = value
        public_cases.compare(fastres.batch_norm_act, batch_norm_act_ref, args, terms=rows(), backward=False)
        if form == "residual":
            grad = torch.ones(SHAPE)
            ours, expected = (
                public_cases.outcome(fn, args, grad=grad).grads["['residual']"]
                for fn in (fastres.batch_norm_act, batch_norm_act_ref)
            )
            assert torch.equal(ours, expected) and ours[0, 1, 2, 2] == 1


@pytest.mark.parametrize("dtype", [torch.float64], ids=NAMES.get)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradcheck(backend, dtype, training):
    args = make("two BNs", dtype, (2, 3, 2, 3), training=training)
    bn, rbn = args["bn"], args["residual_bn"]
    inputs = (args["x"], bn.weight, bn.bias, args["residual"], rbn.weight, rbn.bias)

    def call(x, w, b, r, rw, rb):
        first, second = bn._replace(weight=w, bias=b), rbn._replace(weight=rw, bias=rb)
        return fastres.batch_norm_act(x, first, residual=r, residual_bn=second)

    assert torch.autograd.gradcheck(call, inputs)


def test_repeats_and_threads(backend):
    args = make("two BNs")
    public_cases.check_repeats(fastres.batch_norm_act, args)
    public_cases.check_threads(fastres.batch_norm_act, make("residual", shape=(2, 24, 16, 16)))


@pytest.mark.parametrize("form", FORMS)
def test_subsets_of_gradients(backend, form):
    public_cases.check_subsets(fastres.batch_norm_act, make(form))


def test_incoming_gradients(backend):
    public_cases.check_incoming_gradients(fastres.batch_norm_act, make("residual"))


def test_double_backward(backend):
    public_cases.check_double_backward(fastres.batch_norm_act, make())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpoint(backend, momentum):
    public_cases.check_checkpoint(fastres.batch_norm_act, make("two BNs", momentum=momentum))


def test_autocast(backend):
    # BN is not on autocast's lists: an fp32 input stays fp32.
    args = make("residual")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        public_cases.compare(fastres.batch_norm_act, batch_norm_act_ref, args, terms=rows())


# The compiled graph holds the op as it is, whichever backend serves it: the automatic choice will do.
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("form", FORMS)
def test_compile(form, training):
    public_cases.check_compile(fastres.batch_norm_act, make(form, training=training), "aot_eager")


def test_compile_momentum_none():
    public_cases.check_compile(fastres.batch_norm_act, make(momentum=None), "aot_eager")


def test_compile_dynamic_batch():
    bn = testing.make_bn(20)
    public_cases.check_compile_dynamic(lambda x: fastres.batch_norm_act(x, bn, residual=x + 1), channels=20)


def test_opcheck():
    for form in FORMS:
        for training in (True, False):
            args = make(form, training=training, requires_grad=False)
            x, bn = args["x"].detach(), args["bn"]
            residual = args["residual"].detach() if "residual" in args else None
            own = args.get("residual_bn") or fastres.BN()
            flat = (
                x, bn.weight, bn.bias, bn.running_mean, bn.running_var, training, bn.eps, residual, form == "two BNs",
                own.weight, own.bias, own.running_mean, own.running_var, own.training, own.eps, True, True, "",
            )  # fmt: skip
            torch.library.opcheck(torch.ops.fastres.batch_norm_act_fwd.default, flat)
            _, mask, stat, rstat = module.fwd_op(*flat)
            two = form == "two BNs"
            backward = (
                torch.randn_like(x), x, stat, residual if two else None, rstat if two else None,
                mask if residual is not None else None, True, training, training, [True] * 6, "",
            )  # fmt: skip
            torch.library.opcheck(torch.ops.fastres.batch_norm_act_bwd.default, backward)


def test_opcheck_of_running_statistics():
    def vector():
        return torch.randn(4)

    stat = torch.randn(5, 4)
    torch.library.opcheck(
        torch.ops.fastres.bn_update_.default,
        (
            [vector(), vector()],
            [vector(), vector()],
            [torch.tensor(3)],
            [stat, stat + 1],
            [10, 10],
            [0.1, 0.0],
            [-1, 0],
        ),
    )


@pytest.mark.parametrize("momentum", [0.25, None])
def test_one_bn_in_both_places(momentum):
    """Its statistics move twice a call, one update after the other, as the module's would."""
    x, r = testing.fill((4, 8, 3, 3), torch.float64, seed=1), testing.fill((4, 8, 3, 3), torch.float64, seed=2)
    ours, theirs = nn.BatchNorm2d(8, momentum=momentum).double(), nn.BatchNorm2d(8, momentum=momentum).double()
    bn = read_batch_norm(ours)
    fastres.batch_norm_act(x, bn, residual=r, residual_bn=bn)
    theirs(x), theirs(r)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 2
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-9, atol=1e-12)


def test_nothing_moves_without_training(backend):
    args = make("two BNs", training=False)
    fastres.batch_norm_act(**args)
    for bn, fresh in ((args["bn"], make("two BNs")["bn"]), (args["residual_bn"], make("two BNs")["residual_bn"])):
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(getattr(bn, name), getattr(fresh, name)), name
