"""A whole basic block in one CUDA kernel, on the emulator: right values, every edge, faults that would be caught."""

from __future__ import annotations

import os

import eval_cases
import pytest
import torch
from emulated import build_planted, call_planted
from torch import nn

import fastres
from fastres import block_geometry, block_trials, whole_block
from fastres import nn as fnn
from fastres.backends import eval_kernels, fragments
from fastres.backends.eval_kernels import BasicBlockShape
from fastres.backends.one_pass import Chip
from fastres.codegen import eval_model

CPU = torch.device("cpu")
A100, L4 = Chip("A100", 108, 163 * 1024, 164 * 1024), Chip("L4", 58, 99 * 1024, 100 * 1024)
# One tile and less; tiles cut on either side; several images, so that tiles follow each other in one block; wide C.
SHAPES = (
    BasicBlockShape(1, 14, 14, 64),
    BasicBlockShape(1, 1, 1, 64),
    BasicBlockShape(2, 15, 29, 64),
    BasicBlockShape(1, 3, 43, 64),
    BasicBlockShape(1, 16, 15, 128),
)


def run(kernels, shape, dtype, whole=True):
    """(output, what it should be) on the data of the verification."""
    launch, truth, _ = block_trials.trial(shape, CPU, dtype, whole)
    out = torch.full(truth.shape, float("nan"), dtype=dtype).to(memory_format=torch.channels_last)
    launch(kernels, out)
    return out, truth.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_right(emulator, shape, dtype):
    """The verification itself with two blocks of threads: tiles in turn, the stream of weights all round."""
    emulator.module.set_chip("sm_80", 1)
    emulator.set_seed(SHAPES.index(shape))
    assert whole_block.check(emulator, CPU, dtype, shape) == ""


def test_same_bits(emulator):
    """Whatever the order of threads and however many blocks."""
    first = None
    for seed, multiprocessors in zip((0, 1, 41), (1, 4, 7), strict=True):
        emulator.set_seed(seed)
        emulator.module.set_chip("sm_90a", multiprocessors)
        out, expected = run(emulator, SHAPES[2], torch.bfloat16, whole=False)
        first = out if first is None else first
        assert torch.equal(out, first)
    torch.testing.assert_close(first, expected, rtol=2**-6, atol=2**-4)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("tap", range(9))
def test_taps(emulator, tap, second):
    """A 3x3 of one tap moves the image by one pixel, with zeros from outside although relu(bias) is not zero."""
    C, H, W = 64, 15, 16
    x = torch.randn(1, C, H, W, generator=torch.Generator().manual_seed(tap)).to(torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    weights = torch.zeros(2, C, C, 3, 3, dtype=torch.bfloat16)
    weights[1 - second, :, :, 1, 1] = torch.eye(C)
    weights[int(second), :, :, tap // 3, tap % 3] = torch.eye(C)
    bias = torch.cat((torch.full((C,), 1.0), torch.zeros(C)))
    out = torch.empty_like(x)
    emulator.basic_block_eval(x, fragments.basic_block(*weights), bias, out)

    def moved(y):
        return nn.functional.pad(y, (1, 1, 1, 1))[:, :, tap // 3 :, tap % 3 :][:, :, :H, :W]

    y = torch.relu((x.double() if second else moved(x.double())) + 1).to(torch.bfloat16).double()
    y = moved(y) if second else y
    assert torch.equal(out, torch.relu(y + x.double()).to(torch.bfloat16))


def test_nan_and_infinity(emulator):
    """A NaN spreads as far as its 5x5 neighbourhood; no pixel beyond is touched."""
    for bad in (float("nan"), float("inf")):
        x, w1, w2, bias = block_trials.basic_block_data(SHAPES[2], CPU, torch.bfloat16, False)
        x[1, 3, 14, 13] = bad
        out = torch.empty_like(x)
        emulator.basic_block_eval(x, fragments.basic_block(w1, w2), bias, out)
        touched = ~out.isfinite().all(1)
        assert touched[1, 12:, 11:16].any() and not touched[0].any()
        assert not touched[1, :12].any() and not touched[1, :, :11].any() and not touched[1, :, 16:].any()
        expected = block_trials.basic_block_expected(x, w1, w2, bias).to(torch.bfloat16)
        assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "dtype", "chip", "words"),
    [
        ({}, torch.bfloat16, L4, ""),
        ({"C": 128}, torch.bfloat16, A100, ""),
        ({"C": 128}, torch.bfloat16, L4, "112704 bytes of shared memory are needed"),
        ({}, torch.float32, A100, "bfloat16 and float16 are served, not float32"),
        ({"C": 256}, torch.float16, A100, "64 and 128 channels are served, not 256"),
        ({"H": 1 << 20}, torch.float16, A100, "no side may be 2\\*\\*20 or more"),
        ({"N": 1 << 19, "H": 1 << 10, "W": 1 << 10}, torch.float16, A100, "fewer than 2\\*\\*30 tiles"),
        ({"H": 1 << 13, "W": 1 << 12}, torch.float16, A100, "fewer than 2\\*\\*31 elements"),
    ],
)
def test_why_not(change, dtype, chip, words):
    shape = BasicBlockShape(**{**dict(N=1, H=14, W=14, C=64), **change})
    reasons = eval_kernels.why_not_basic_block(shape, dtype, chip)
    eval_cases.check_reasons(reasons, words)


def test_bad_input(emulator):
    x, w1, w2, bias = block_trials.basic_block_data(SHAPES[0], CPU, torch.bfloat16, True)
    weights = fragments.basic_block(w1, w2)

    def call(match, kind=ValueError, **change):
        a = dict(x=x, weights=weights, bias=bias, out=torch.full_like(x, 7)) | change
        with pytest.raises(kind, match=f"basic_block_eval: .*{match}"):
            emulator.basic_block_eval(**a)
        if change.get("out") is not x:
            assert a["out"] is None or (a["out"] == 7).all()

    call("x must be float32, bfloat16 or float16", TypeError, x=x.double())
    call("x must be dense channels_last", x=x.contiguous())
    call("x must be aligned to 16 bytes", x=torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(1, 14, 14, 64)
         .permute(0, 3, 1, 2))  # fmt: skip
    call("x must have four dimensions", x=x[0])
    call("out must have shape", out=torch.full((1, 64, 14, 15), 7.0, dtype=x.dtype))
    call("out must not overlap x", out=x)
    call("out must have four dimensions", out=None)
    call("weights must be contiguous torch.bfloat16", weights=weights[:-256])
    call("weights must be a tensor", TypeError, weights=None)
    call("bias must be contiguous torch.float32", bias=bias.half())
    call("is not served: .* channels are served, not 96", x=torch.zeros(1, 96, 2, 2, dtype=x.dtype))
    with pytest.raises(ValueError, match="basic_block_eval: C is 64 or 128, got 96"):
        emulator.module.basic_block_eval(1, 16, 1, 1, 1, 96, 16, 16, 16, 0)
    with pytest.raises(ValueError, match="basic_block_eval: x is aligned to 16 bytes, got 8"):
        emulator.module.basic_block_eval(1, 8, 1, 1, 1, 64, 16, 16, 16, 0)


def test_empty(emulator):
    x = torch.empty(0, 64, 14, 14, dtype=torch.float16).to(memory_format=torch.channels_last)
    _, w1, w2, bias = block_trials.basic_block_data(SHAPES[0], CPU, torch.float16, True)
    emulator.basic_block_eval(x, fragments.basic_block(w1, w2), bias, torch.empty_like(x))


# ---- modules


def test_modules_use_it(emulator, monkeypatch):
    """A folded block of fastres.nn in evaluation is one launch, and what it computes is the block."""
    torch.manual_seed(0)
    block = eval_cases.ready(fnn.BasicBlock(64, 64))
    x = torch.randn(1, 64, 9, 15, dtype=torch.bfloat16)
    eval_cases.uses_kernel(block, x, emulator, "basic_block_eval", monkeypatch)


OTHER_GEOMETRIES = {
    "stride": (dict(stride=(2, 2)), "conv1 has stride 2x2, expected 1x1"),
    "dilation": (dict(dilation=(2, 2), padding=(2, 2)), "conv1 has dilation 2x2, expected 1x1"),
    "groups": (dict(groups=2, weight=torch.zeros(64, 32, 3, 3)), "conv1 has groups 2, expected 1"),
    "padding": (dict(padding=(0, 0)), "conv1 has padding 0x0, expected 1x1"),
    "channels": (dict(weight=torch.zeros(128, 64, 3, 3)), "conv1 has weight 128x64x3x3, expected 64x64x3x3"),
    "shortcut": (dict(), "has a projection, expected the identity"),
}


@pytest.mark.parametrize("change", OTHER_GEOMETRIES)
def test_other_geometries(change):
    """No kernel's, and the reason names what was got and what is expected."""
    convs = [fastres.ConvBN(torch.zeros(64, 64, 3, 3), padding=(1, 1)) for _ in range(2)]
    x, shortcut = torch.zeros(2, 64, 8, 9), None
    assert block_geometry.shape_of(x, convs, None) == BasicBlockShape(2, 8, 9, 64)
    wrong, words = OTHER_GEOMETRIES[change]
    if change == "shortcut":
        shortcut = fastres.ConvBN(torch.zeros(64, 64, 1, 1))
    convs[0] = convs[0]._replace(**wrong)
    shape = block_geometry.shape_of(x, convs, shortcut)
    assert isinstance(shape, block_geometry.Unserved) and words in shape.reasons


# ---- what it moves


@pytest.mark.parametrize("shape", [BasicBlockShape(1, 28, 28, 64), BasicBlockShape(1, 14, 28, 128)], ids=str)
def test_traffic(emulator, shape):
    """Two units of C elements a pixel reach DRAM, where separate convolutions move five. No read of pixels, and none of
    weights, waits for a bank."""
    launch, truth, _ = block_trials.trial(shape, CPU, torch.bfloat16, True)
    out = torch.empty(truth.shape, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    emulator.module.meter(True)
    launch(emulator, out)
    counted = emulator.module.meter(False)
    pixels = shape.H * shape.W
    assert counted["stored"] == counted["stored_once"] == 2 * pixels * shape.C
    assert counted["loaded_once"] + counted["stored"] == pytest.approx(eval_model.memory_bytes(shape), rel=0.001)
    # From L2 what the model says, and for each tile, here a block of threads each: two chunks of weights taken in vain,
    # and the biases, 32 bytes a lane and 32 channels, once by the warps that compute (seven of them in conv2).
    biases = (8 + 7) * 32 * shape.C // 32 * 32
    extra = eval_model.tiles(shape) * (2 * 8192 + biases)
    assert counted["loaded"] == eval_model.loaded_bytes(shape) + extra
    assert counted["matrix_conflicts"] == counted["load_conflicts"] == 0
    # What conv1 gives is stored by eight lanes at a time, 64 bytes to each of two neighbouring pixels. Those share a
    # bank: the odd pitch lets the 3x3 read eight neighbours at once, at every tap, and half of two would need one that
    # is 64 bytes off a multiple of 128. So each of these stores waits once, 1 to 2% of all wavefronts.
    assert counted["store_conflicts"] == eval_model.tiles(shape) * 16 * 16 * shape.C // 64
    assert counted["store_conflicts"] < 0.02 * counted["wavefronts"]
    assert counted["wavefronts"] > 0


# ---- planted faults: each is found, whatever it does to the values


SOURCE = "basic_block_eval.cuh"
FAULTS = {
    "overlay": (SOURCE, "    sync_block();  // x has been read\n", "", "race"),
    "none": ("", "", "", ""),
    "next": (SOURCE, "        sync_block();  // what conv1 gave", "        // what conv1 gave", "race"),
    "wait": (SOURCE, "    copy_async_wait<0>();\n", "", "race"),
    "tap": ("taps.cuh", "r * row + t * kPitch", "r * row + (t + 1) % 3 * kPitch", "wrong"),
    "row": (SOURCE, "(pixel + i * kWidth)", "(pixel + i * (kWidth - 1))", "wrong"),
    "halo": (SOURCE, "w = at.w0 - 2 + pixel", "w = at.w0 - 1 + pixel", "wrong"),
    "padding": (SOURCE, "if (pixel.p[e] < 0) packed", "if (pixel.p[e] < -1) packed", "wrong"),
    "drain": (SOURCE, "    weights.finish();\n", "", "asynchronous copies in flight"),
}
USUAL = ("overlay",)  # the others are caught too, at the price of a compilation each


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(fault, tmp_path):
    if fault not in USUAL and not os.environ.get("FASTRES_FULL"):
        pytest.skip("set FASTRES_FULL=1")
    *change, caught_as = FAULTS[fault]
    library = build_planted(tmp_path, "selftest_basic_block.cu", *change)
    shape = BasicBlockShape(1, 16, 15, 64)
    x, w1, w2, bias = block_trials.basic_block_data(shape, CPU, torch.bfloat16, True)
    out = torch.full_like(x, float("nan"))
    weights = fragments.basic_block(w1, w2)
    error = call_planted(library, x, shape.N, shape.H, shape.W, weights, bias, out, 3)
    right = torch.equal(out, block_trials.basic_block_expected(x, w1, w2, bias).to(torch.bfloat16))
    if caught_as in ("", "wrong"):
        assert error == "" and right == (caught_as == "")
    else:
        assert caught_as in error
