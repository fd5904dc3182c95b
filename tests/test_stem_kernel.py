"""The stem, convolution and pooling, in one CUDA kernel, on the emulator: right values, every edge, faults caught."""

from __future__ import annotations

import copy
import os

import eval_cases
import pytest
import torch
from emulated import build_planted, call_planted
from torch import nn
from torch.nn import functional as F

import fastres
from fastres import block_geometry, block_trials, whole_block
from fastres import models as fmodels
from fastres.backends import eval_kernels, fragments
from fastres.backends.eval_kernels import StemShape
from fastres.backends.one_pass import Chip
from fastres.codegen import eval_model

CPU = torch.device("cpu")
A100 = Chip("A100", 108, 163 * 1024, 164 * 1024)
# A tile of 7 x 7 pooled pixels exactly, one pixel, every remainder of both sizes by four, several tiles in turn.
SHAPES = (
    StemShape(1, 28, 28),
    StemShape(1, 1, 1),
    StemShape(3, 29, 58),
    StemShape(1, 5, 35),
    StemShape(1, 31, 32),
    StemShape(1, 2, 3),
)


def nan_output(shape, dtype):
    return torch.full((shape.N, 64, shape.P, shape.Q), float("nan"), dtype=dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_right(emulator, shape, dtype):
    """The verification itself, with two blocks of threads that take tiles in turn."""
    emulator.module.set_chip("sm_80", 1)
    emulator.set_seed(SHAPES.index(shape))
    assert whole_block.check(emulator, CPU, dtype, shape) == ""


LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "contiguous": lambda x: x.contiguous(),
    "a crop": lambda x: F.pad(x, (3, 2, 1, 4), value=float("nan"))[:, :, 1 : 1 + x.shape[2], 3 : 3 + x.shape[3]],
    "of four channels": lambda x: F.pad(x, (0, 0, 0, 0, 0, 1), value=float("nan"))[:, :3],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "at an odd element": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(emulator, layout):
    """The image is read as it lies; the same bits whatever the order of threads and however many blocks."""
    shape = SHAPES[2]
    x, w, bias = block_trials.stem_data(shape, CPU, torch.bfloat16, False)
    given = LAYOUTS[layout](x)
    assert torch.equal(given, x)
    outs = []
    for seed, multiprocessors, image in ((0, 1, x), (41, 7, given)):
        emulator.set_seed(seed)
        emulator.module.set_chip("sm_90a", multiprocessors)
        outs.append(nan_output(shape, x.dtype))
        emulator.stem_eval(image, fragments.stem(w), bias, outs[-1])
    assert torch.equal(*outs)
    torch.testing.assert_close(outs[0], block_trials.stem_expected(x, w, bias).to(x.dtype), rtol=2**-7, atol=2**-6)


def test_taps(emulator):
    """Output channel k is one tap of one colour: which pixel of the image it saw, exactly; two launches for all 147."""
    x = torch.randn(1, 3, 30, 33, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    shape = StemShape(1, 30, 33)
    for first in (0, 64, 83):
        w = torch.zeros(64, 147, dtype=torch.bfloat16)
        w[torch.arange(64), first + torch.arange(64)] = 1
        w = w.view(64, 3, 7, 7)
        out, bias = nan_output(shape, x.dtype), torch.full((64,), 0.5)
        emulator.stem_eval(x, fragments.stem(w), bias, out)
        assert torch.equal(out, block_trials.stem_expected(x, w, bias).to(x.dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity(emulator, bad):
    """As far as a window reaches and no further, although the kernel reads beyond it."""
    shape = SHAPES[2]
    for h, w0 in ((28, 57), (12, 26), (13, 23), (0, 0)):
        x, w, bias = block_trials.stem_data(shape, CPU, torch.bfloat16, False)
        x[1, h % 3, h, w0] = bad  # all colours
        out = nan_output(shape, x.dtype)
        emulator.stem_eval(x, fragments.stem(w), bias, out)
        expected = block_trials.stem_expected(x, w, bias).to(x.dtype)
        assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())
        assert out[[0, 2]].isfinite().all()


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "dtype", "chip", "words"),
    [
        ({}, torch.bfloat16, A100, ""),
        ({}, torch.float32, A100, "bfloat16 and float16 are served, not float32"),
        ({}, torch.float16, Chip("small", 1, 48 * 1024, 48 * 1024), "62488 bytes of shared memory are needed"),
        ({"W": 1 << 20}, torch.float16, A100, "no side may be 2\\*\\*20 or more"),
        ({"N": 1 << 19, "H": 1 << 12, "W": 1 << 12}, torch.float16, A100, "fewer than 2\\*\\*30 tiles"),
    ],
)
def test_why_not(change, dtype, chip, words):
    reasons = eval_kernels.why_not_stem(StemShape(**{**dict(N=1, H=28, W=28), **change}), dtype, chip)
    eval_cases.check_reasons(reasons, words)


def test_bad_input(emulator):
    shape = SHAPES[0]
    x, w, bias = block_trials.stem_data(shape, CPU, torch.bfloat16, True)
    weights, out = fragments.stem(w), nan_output(shape, x.dtype)

    def call(match, kind=ValueError, **change):
        a = dict(x=x, weights=weights, bias=bias, out=out.fill_(7)) | change
        with pytest.raises(kind, match=f"stem_eval: .*{match}"):
            emulator.stem_eval(**a)
        assert (out == 7).all()

    call("x must be float32, bfloat16 or float16", TypeError, x=x.double())
    call("x must have 3 channels, got 4", x=torch.zeros(1, 4, 28, 28, dtype=x.dtype))
    call("x must have four dimensions", x=x[0])
    call("out must have shape \\[1, 64, 7, 7\\]", out=torch.zeros(1, 64, 7, 8, dtype=x.dtype))
    call("out must be dense channels_last", out=out.contiguous())
    inside = out[:, :49].view(1, 49, 49)[:, :1, :].expand(1, 3, 49)[:, :, :1, None].expand(1, 3, 28, 28)
    call("out must not overlap x", x=inside)
    call("weights must be contiguous torch.bfloat16", weights=weights[:-256])
    call("bias must be contiguous torch.float32", bias=bias.half())
    call("x must have strides below", x=x.flatten()[:3].as_strided((1, 3, 1, 1), (0, 1, 2**31, 0)))
    with pytest.raises(ValueError, match="stem_eval: H is 1..2\\^20, got 0"):
        emulator.module.stem_eval(1, 16, 1, 0, 1, 3, 1, 3, 3, 16, 16, 16, 0)
    with pytest.raises(ValueError, match="stem_eval: out is aligned to 16 bytes, got 8"):
        emulator.module.stem_eval(1, 16, 1, 1, 1, 3, 1, 3, 3, 16, 16, 8, 0)


def test_empty(emulator):
    _, w, bias = block_trials.stem_data(SHAPES[0], CPU, torch.float16, True)
    x = torch.empty(0, 3, 28, 28, dtype=torch.float16)
    emulator.stem_eval(x, fragments.stem(w), bias, nan_output(StemShape(0, 28, 28), torch.float16))


# ---- modules


def test_modules_use_it(emulator, monkeypatch):
    """A folded network's stem in evaluation is one launch, and what it computes is the stem."""
    torch.manual_seed(0)
    net = fastres.fuse(fmodels.resnet18(num_classes=2)).to(torch.bfloat16).eval()
    nn.init.uniform_(net.bn1.running_var, 0.5, 2), nn.init.normal_(net.bn1.running_mean)
    net._fastres_fold = True
    x = torch.randn(1, 3, 33, 40, dtype=torch.bfloat16)
    calls = []
    inner = emulator.stem_eval
    monkeypatch.setattr(emulator, "stem_eval", lambda *a: (calls.append(a), inner(*a)))
    with torch.no_grad(), fastres.backend("emulator"):
        out, again = net._fastres_stem(x), net._fastres_stem(x.to(memory_format=torch.channels_last))
    assert len(calls) == 2 and calls[0][1] is calls[1][1], "the packed weights are kept"
    assert out.is_contiguous() and torch.equal(out, again)
    truth = copy.deepcopy(net).double()
    with torch.no_grad():
        expected = truth.maxpool(truth.relu(truth.bn1(truth.conv1(x.double()))))
    torch.testing.assert_close(out.double(), expected, rtol=2**-6, atol=2**-6 * expected.max().item())
    with torch.no_grad(), fastres.backend("emulator"):
        calls.clear()
        net.maxpool.padding = 0
        net._fastres_stem(x)
        net.maxpool.padding = 1
        net.float()._fastres_stem(x.float())
    assert not calls, "another window, and float32, go to separate calls"


OTHER_GEOMETRIES = {
    "stride": (dict(stride=(1, 1)), "conv1 has stride 1x1, expected 2x2"),
    "dilation": (dict(dilation=(2, 2)), "conv1 has dilation 2x2, expected 1x1"),
    "groups": (dict(groups=3), "conv1 has groups 3, expected 1"),
    "padding": (dict(padding=(2, 3)), "conv1 has padding 2x3, expected 3x3"),
    "outputs": (dict(weight=torch.zeros(32, 3, 7, 7)), "conv1 has weight 32x3x7x7, expected 64x3x7x7"),
    "pool": (dict(), "max pooling has window 2, stride 2, padding 0, expected window 3, stride 2, padding 1"),
    "channels": (dict(), "the input has 1 channels, expected 3"),
    "far": (dict(), "the input has strides 0x1x2147483648x0, expected those inside an image below 2**31"),
}


@pytest.mark.parametrize("change", OTHER_GEOMETRIES)
def test_other_geometries(change):
    """No kernel's, and the reason names what was got and what is expected."""
    conv = fastres.ConvBN(torch.zeros(64, 3, 7, 7), stride=(2, 2), padding=(3, 3))
    x, pool = torch.zeros(2, 3, 8, 9), (3, 2, 1)
    assert block_geometry.stem_shape(x, conv, *pool) == StemShape(2, 8, 9)
    wrong, words = OTHER_GEOMETRIES[change]
    if change == "channels":
        x = torch.zeros(2, 1, 8, 9)
    elif change == "far":
        x = x.as_strided((1, 3, 1, 1), (0, 1, 2**31, 0))
    pool = (2, 2, 0) if change == "pool" else pool
    shape = block_geometry.stem_shape(x, conv._replace(**wrong), *pool)
    assert isinstance(shape, block_geometry.Unserved) and shape.reasons == [words]


# ---- what it moves


def test_traffic(emulator):
    """The image and what the pooling leaves reach DRAM, nothing between. No read waits for a bank: not of the image,
    not of weights, not of the pooling."""
    shape = StemShape(1, 56, 112)
    launch, truth, _ = block_trials.trial(shape, CPU, torch.bfloat16, True)
    out = nan_output(shape, torch.bfloat16)
    emulator.module.set_chip("sm_80", 1)
    emulator.module.meter(True)
    launch(emulator, out)
    counted = emulator.module.meter(False)
    assert torch.equal(out, truth.to(torch.bfloat16))
    assert counted["stored"] == counted["stored_once"] == eval_model.output_bytes(shape)
    assert counted["loaded_once"] + counted["stored"] == pytest.approx(eval_model.memory_bytes(shape), rel=0.001)
    # From L2 what the model says for two blocks of threads, and for every tile the biases once a lane.
    biases = 8 * 32 * 2 * 32 * eval_model.tiles(shape)
    assert counted["loaded"] == eval_model.loaded_bytes(shape, blocks=2) + biases
    assert counted["word_conflicts"] == counted["load_conflicts"] == 0
    # What the convolution gives is stored by eight lanes at a time, 64 bytes to each of two neighbours, which share a
    # bank at this pitch. In each of a tile's 15 rows that are seven pairs, twice 32 channels: 210 waits. The last pair
    # meets the 16th column, which is dropped; the emulator, which pairs a lane's n-th store with the others' n-th,
    # may miss waits there but for six pairs counts all.
    tiles = eval_model.tiles(shape)
    assert 180 * tiles <= counted["store_conflicts"] <= 210 * tiles
    assert counted["wavefronts"] > 0


# ---- planted faults: each is found, whatever it does to the values


SOURCE = "stem_eval.cuh"
FAULTS = {
    "mask": (SOURCE, "lane % 4 == 2 ? 0xffffu : 0u", "lane % 4 == 2 ? 0xffffffffu : 0u", "wrong"),
    "none": ("", "", "", ""),
    "patch": (SOURCE, "patch);\n        sync_block();\n", "patch);\n", "race"),
    "pool": (SOURCE, "kConvUnits);\n        sync_block();\n", "kConvUnits);\n", "race"),
    "wait": (SOURCE, "    copy_async_wait<0>();\n", "", "wrong"),
    "tap": (SOURCE, "first[i][e] + r * kPatchWords", "first[i][e] + (r + 1) % kFilter * kPatchWords", "wrong"),
    "border": (SOURCE, "if (h < 0 || h >= s.conv_h ||", "if (h < 0 ||", "wrong"),
}
USUAL = ("mask",)  # the others are caught too, at the price of a compilation each


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(fault, tmp_path):
    if fault not in USUAL and not os.environ.get("FASTRES_FULL"):
        pytest.skip("set FASTRES_FULL=1")
    *change, caught_as = FAULTS[fault]
    library = build_planted(tmp_path, "selftest_stem.cu", *change)
    shape = StemShape(1, 29, 30)
    x, w, bias = block_trials.stem_data(shape, CPU, torch.bfloat16, True)
    bias += 8  # not zero outside of the convolution's image
    x[0, 0, 9, 10] = float("nan")  # the 22nd element of a row for the third pixel of the convolution
    out = nan_output(shape, x.dtype)
    error = call_planted(library, x, shape.N, shape.H, shape.W, fragments.stem(w), bias, out, 3)
    expected = block_trials.stem_expected(x, w, bias).to(x.dtype)
    right = torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.nan_to_num(), expected.nan_to_num())
    if caught_as == "":
        assert error == "" and right
    elif caught_as == "wrong":
        assert error or not right
    else:
        assert caught_as in error
