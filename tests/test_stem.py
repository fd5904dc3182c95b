"""stem: launch functions on every backend, then the public op."""

from __future__ import annotations

import launch_tests
import public_cases
import pytest
import torch
from kernel_cases import DTYPES, NAMES

import fastres
from fastres import testing
from fastres.ops import engine
from fastres.ops import stem as module
from fastres.ops.conv_bn_act import conv_bn_act_ref
from fastres.ops.stem import stem_ref

FUNCTIONS = ("stem_fwd", "stem_bwd_reduce", "stem_bwd_apply")
POOLS = {
    "3/2/1": {},  # a ResNet's
    "2/2/0": dict(pool_kernel=2, pool_stride=2, pool_padding=0),
    "5/3/2": dict(pool_kernel=5, pool_stride=3, pool_padding=2),
    "3/1/1": dict(pool_kernel=3, pool_stride=1, pool_padding=1),
    "1/2/0": dict(pool_kernel=1, pool_stride=2, pool_padding=0),  # pixels that no window reads
}


@launch_tests.parametrize(*FUNCTIONS)
def test_values(kernels, function, dtype):
    launch_tests.check_values(kernels, function, dtype)


@launch_tests.parametrize(*FUNCTIONS)
def test_exact(kernels, function, dtype):
    """Small integers tie all the time: the first maximum must win."""
    launch_tests.check_exact(kernels, function, dtype)


@launch_tests.parametrize(*FUNCTIONS)
def test_repeats(kernels, function, dtype):
    launch_tests.check_repeats(kernels, function, dtype)


def make(
    dtype=torch.float32, layout="nhwc", batch=2, size=(19, 17), K=10, taps=7, pool=None, margin=1e-5, **conv
) -> dict:
    """Arguments of the op. In float64 no window has two candidates within ``margin`` of each other, and no candidate
    is near zero."""
    pool = pool or {}
    seed = 1
    while True:
        x = testing.fill((batch, 3, *size), dtype, seed=seed)
        args = dict(x=x, conv=testing.make_conv(3, K, taps, stride=2, dtype=dtype, seed=seed + 1, **conv))
        if batch:
            pre = public_cases.outcome(conv_bn_act_ref, args, wide=True, relu=False).out
            testing.clear_of_zero(pre, args["conv"].bn.bias)
        if dtype in (torch.bfloat16, torch.float16) or not batch or _margin(args, **pool) > margin:
            break
        seed += 10
    args["x"] = testing.lay_out(x, layout).requires_grad_()
    return args


def _margin(args, pool_kernel=3, pool_stride=2, pool_padding=1) -> float:
    """Smallest lead of a winning pixel that is above zero over the next in its window, in float64."""
    with torch.no_grad():
        y = public_cases.outcome(conv_bn_act_ref, args, wide=True).out
    padded = torch.nn.functional.pad(y, [pool_padding] * 4, value=-1.0)
    windows = padded.unfold(2, pool_kernel, pool_stride).unfold(3, pool_kernel, pool_stride).flatten(4)
    if windows.shape[-1] == 1:
        return float("inf")
    top = windows.topk(2, dim=-1).values
    lead = torch.where(top[..., 0] > 0, top[..., 0] - top[..., 1], torch.inf)
    return lead.min().item()


def terms(args) -> int:
    return 7 * 7 * 3 + args["x"].shape[0] * 10 * 9


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_against_pytorch(backend, training, pool):
    args = make(training=training, pool=POOLS[pool])
    public_cases.compare(fastres.stem, stem_ref, args, terms=terms(args), options=POOLS[pool])


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_dtypes(backend, dtype):
    args = make(dtype, size=(33, 29), bias=True)
    # In 16 bits values tie after rounding and another pixel may win: compared in the mean, as PyTorch's ties are.
    norms = ("max", "rms") if dtype in (torch.float32, torch.float64) else ("rms",)
    public_cases.compare(fastres.stem, stem_ref, args, terms=terms(args), norms=norms)


def test_real_shape(backend):
    if backend in ("reference", "cpu"):
        args = make(batch=1, size=(112, 112), K=64, pool=None)
    else:
        args = make(batch=1, size=(32, 32), K=64)
    public_cases.compare(fastres.stem, stem_ref, args, terms=147 + 56 * 56)


def test_ties(backend):
    """Constant images tie in every window: PyTorch's winner is ours."""
    conv = testing.make_conv(3, 8, 1, training=False)
    x = torch.ones(1, 3, 9, 9).requires_grad_()
    args = dict(x=x, conv=conv)
    grad = testing.fill((1, 8, 5, 5), torch.float32, "integers", seed=3)
    public_cases.compare(fastres.stem, stem_ref, args, terms=81, grad=grad)


def test_nan_wins(backend):
    conv = testing.make_conv(3, 4, 1, training=False, requires_grad=False)
    x = testing.fill((1, 3, 8, 8), torch.float32)
    x[0, :, 4, 5] = float("nan")
    expected, got = stem_ref(x, conv), fastres.stem(x, conv)
    assert torch.equal(expected.isnan(), got.isnan()) and got.isnan().any()


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(backend, layout):
    args = make(layout=layout)
    got = public_cases.compare(fastres.stem, stem_ref, args, terms=terms(args))
    channels_last = args["x"].is_contiguous(memory_format=torch.channels_last)
    assert got.out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_empty_batch(backend):
    public_cases.check_empty_batch(fastres.stem, stem_ref, make(batch=0))


@pytest.mark.parametrize("dtype", [torch.float64], ids=NAMES.get)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradcheck(backend, dtype, training):
    # Finite differences must not change a winner.
    args = make(dtype, size=(7, 6), K=3, taps=3, margin=1e-3, training=training, bias=True)
    conv = args["conv"]

    def call(x, w, b, bw, bb):
        return fastres.stem(x, conv._replace(weight=w, bias=b, bn=conv.bn._replace(weight=bw, bias=bb)))

    inputs = (args["x"], conv.weight, conv.bias, conv.bn.weight, conv.bn.bias)
    assert torch.autograd.gradcheck(call, inputs, eps=1e-7, atol=1e-5, fast_mode=True)


def test_repeats_and_subsets(backend):
    args = make(bias=True)
    public_cases.check_repeats(fastres.stem, args)
    public_cases.check_subsets(fastres.stem, args)


def test_incoming_gradients(backend):
    public_cases.check_incoming_gradients(fastres.stem, make())


def test_double_backward(backend):
    public_cases.check_double_backward(fastres.stem, make())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpoint(backend, momentum):
    public_cases.check_checkpoint(fastres.stem, make(momentum=momentum))


@pytest.mark.computes_in(torch.bfloat16)
def test_autocast(backend):
    args = make(size=(33, 29))
    public_cases.check_autocast(fastres.stem, stem_ref, args, terms=terms(args))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile(training):
    public_cases.check_compile(fastres.stem, make(training=training), "aot_eager")


def test_opcheck():
    args = make(requires_grad=False, bias=True)
    x, conv = args["x"].detach(), args["conv"]
    bn, pool = conv.bn, [3, 2, 1]
    head = (
        x, conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var, True, bn.eps,
        engine.flatten(conv), pool,
    )  # fmt: skip
    for save in (True, False):
        torch.library.opcheck(torch.ops.fastres.stem_fwd.default, (*head, save, ""))
    out, stat, a, idx = module.fwd_op(*head, True, "")
    for needs in ([True] * 5, [False, True, False, True, False]):
        backward = (torch.randn_like(out), x, conv.weight, a, idx, stat, head[9], pool, True, needs, "")
        torch.library.opcheck(torch.ops.fastres.stem_bwd.default, backward)
