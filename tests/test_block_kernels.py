"""A whole bottleneck in one CUDA kernel, on the emulator: right values, every edge, faults that would be caught."""

from __future__ import annotations

import os

import eval_cases
import pytest
import torch
from emulated import build_planted, call_planted
from torch import nn

import fastres
from fastres import block_geometry, block_trials, dispatch, whole_block
from fastres import nn as fnn
from fastres.backends import block_kernels, fragments
from fastres.backends.block_kernels import BottleneckShape
from fastres.backends.one_pass import Chip
from fastres.codegen import block_model

CPU = torch.device("cpu")
SEEDS = (0, 1, 41)
A100, L4 = Chip("A100", 108, 163 * 1024, 164 * 1024), Chip("L4", 58, 99 * 1024, 100 * 1024)

# One tile and less; tiles cut on either side; more tiles than blocks, so that the stream of weights runs on; wide C.
SHAPES = (
    BottleneckShape(1, 14, 14, 64, 64, 64, False),
    BottleneckShape(1, 1, 1, 64, 64, 64, False),
    BottleneckShape(3, 15, 29, 64, 64, 64, False),
    BottleneckShape(1, 5, 43, 192, 64, 192, False),
    BottleneckShape(2, 13, 16, 64, 64, 128, True),
    BottleneckShape(1, 16, 15, 128, 128, 128, False),
    BottleneckShape(1, 16, 15, 64, 128, 128, True),
    BottleneckShape(2, 7, 9, 192, 128, 64, True),
)


def run(kernels, shape, dtype, whole=True):
    """(output, what it should be, arguments) on the data of the verification."""
    x, w1, w2, w3, projection, bias = block_trials.bottleneck_data(shape, CPU, dtype, whole)
    out = torch.full((shape.N, shape.H, shape.W, shape.K), float("nan"), dtype=dtype).permute(0, 3, 1, 2)
    weights = fragments.bottleneck(w1, w2, w3, projection)
    kernels.bottleneck_eval(x, weights, bias, shape.mid, shape.projected, out)
    return out, block_trials.bottleneck_expected(x, w1, w2, w3, projection, bias).to(dtype), (x, weights, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_right(emulator, shape, dtype):
    """The verification itself, with two blocks of threads: tiles in turn, the stream of weights all round."""
    emulator.module.set_chip("sm_80", 1)
    emulator.set_seed(SHAPES.index(shape))
    assert whole_block.check(emulator, CPU, dtype, shape) == ""


@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[4]], ids=str)
def test_same_bits(emulator, shape):
    """Whatever the order of threads and however many blocks."""
    first = None
    for seed, multiprocessors in zip(SEEDS, (1, 4, 7), strict=True):
        emulator.set_seed(seed)
        emulator.module.set_chip("sm_90a", multiprocessors)
        out, expected, _ = run(emulator, shape, torch.bfloat16, whole=False)
        first = out if first is None else first
        assert torch.equal(out, first)
    torch.testing.assert_close(first, expected, rtol=2**-6, atol=2**-4)


@pytest.mark.parametrize("tap", range(9))
def test_taps(emulator, tap):
    """A 3x3 of one tap moves the image by one pixel, with zeros from outside although relu(bias) is not zero."""
    x, weights, bias, expected = eval_cases.moving_bottleneck(64, 15, 16, tap)
    out = torch.empty_like(x)
    emulator.bottleneck_eval(x, fragments.bottleneck(*weights), bias, 64, False, out)
    assert torch.equal(out, expected)


def test_nan_and_infinity(emulator):
    """A NaN spreads as far as its 3x3 neighbourhood; no pixel beyond is touched."""
    shape = SHAPES[2]
    for bad in (float("nan"), float("inf")):
        x, w1, w2, w3, _, bias = block_trials.bottleneck_data(shape, CPU, torch.bfloat16, False)
        x[1, 3, 14, 13] = bad
        out = torch.empty_like(x)
        emulator.bottleneck_eval(x, fragments.bottleneck(w1, w2, w3), bias, 64, False, out)
        touched = ~out.isfinite().all(1)
        assert touched[1, 13:15, 12:15].any() and not touched[:, :13].any() and not touched[[0, 2]].any()
        expected = block_trials.bottleneck_expected(x, w1, w2, w3, None, bias).to(torch.bfloat16)
        assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "dtype", "chip", "words"),
    [
        ({}, torch.bfloat16, L4, ""),
        ({}, torch.float32, A100, "bfloat16 and float16 are served, not float32"),
        ({"mid": 256}, torch.float16, A100, "channels inside are served, not 256"),
        ({"mid": 128, "C": 192, "projected": True}, torch.float16, L4, ""),
        ({"C": 96}, torch.float16, A100, "multiples of 64 channels are served, not 96 to 64"),
        ({"C": 128, "projected": True}, torch.float16, A100, "a projection is served from 64 channels, not from 128"),
        ({"H": 1 << 20}, torch.float16, A100, "no side 2\\*\\*20 or more"),
        ({"mid": 128}, torch.float16, Chip("small", 1, 64 * 1024, 64 * 1024), "94208 bytes of shared memory"),
    ],
)
def test_why_not(change, dtype, chip, words):
    sizes = {**dict(N=1, H=14, W=14, C=64, mid=64, K=64, projected=False), **change}
    reasons = block_kernels.why_not_bottleneck(BottleneckShape(**sizes), dtype, chip)
    eval_cases.check_reasons(reasons, words)


def test_bad_input(emulator):
    x, w1, w2, w3, _, bias = block_trials.bottleneck_data(SHAPES[0], CPU, torch.bfloat16, True)
    weights = fragments.bottleneck(w1, w2, w3)

    def call(match, kind=ValueError, **change):
        a = dict(x=x, weights=weights, bias=bias, mid=64, projected=False, out=torch.full_like(x, 7)) | change
        with pytest.raises(kind, match=f"bottleneck_eval: .*{match}"):
            emulator.bottleneck_eval(**a)
        if change.get("out") is not x:
            assert a["out"] is None or (a["out"] == 7).all()

    call("x must be float32, bfloat16 or float16", TypeError, x=x.double())
    call("x must be dense channels_last", x=x.contiguous())
    call("x must be aligned to 16 bytes", x=torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(1, 14, 14, 64)
         .permute(0, 3, 1, 2))  # fmt: skip
    call("out must have shape", out=torch.full((1, 64, 14, 15), 7.0, dtype=x.dtype))
    call("out must not overlap x", out=x)
    call("weights must be contiguous torch.bfloat16", weights=weights[:-256])
    call("weights must be contiguous torch.bfloat16", weights=weights.half())
    call("bias must be a tensor", TypeError, bias=None)
    call("projected must be a bool", projected=2)
    call("is not served: .* channels inside", mid=32)
    call("must have the 64 channels of x", out=torch.full((1, 128, 14, 14), 7.0, dtype=x.dtype))
    with pytest.raises(ValueError, match="multiples of 16 and 32"):
        fragments.fragments(torch.zeros(16, 16), rows="loaded", stored=True)
    with pytest.raises(ValueError, match="bottleneck_eval: mid is 64"):
        emulator.module.bottleneck_eval(1, 16, 1, 1, 1, 64, 96, 64, 0, 16, 16, 16, 0)


def test_empty(emulator):
    x = torch.empty(0, 64, 14, 14, dtype=torch.float16).to(memory_format=torch.channels_last)
    _, w1, w2, w3, _, bias = block_trials.bottleneck_data(SHAPES[0], CPU, torch.float16, True)
    emulator.bottleneck_eval(x, fragments.bottleneck(w1, w2, w3), bias, 64, False, torch.empty_like(x))


# ---- modules


@pytest.mark.parametrize("projected", [False, True])
def test_modules_use_it(emulator, monkeypatch, projected):
    """A folded block of fastres.nn in evaluation is one launch, and what it computes is the block."""
    torch.manual_seed(0)
    down = nn.Sequential(nn.Conv2d(64, 256, 1, bias=False), nn.BatchNorm2d(256)) if projected else None
    block = eval_cases.ready(fnn.Bottleneck(64 if projected else 256, 64, downsample=down))
    x = torch.randn(1, 64 if projected else 256, 9, 15, dtype=torch.bfloat16)
    eval_cases.uses_kernel(block, x, emulator, "bottleneck_eval", monkeypatch)


OTHER_GEOMETRIES = {
    "stride": (dict(stride=(2, 2)), "conv2 has stride 2x2, expected 1x1"),
    "dilation": (dict(dilation=(2, 2), padding=(2, 2)),
                 "conv2 has padding 2x2, expected 1x1; conv2 has dilation 2x2, expected 1x1"),
    "groups": (dict(groups=2, weight=torch.zeros(64, 32, 3, 3)),
               "conv2 has weight 64x32x3x3, expected 64x64x3x3; conv2 has groups 2, expected 1"),
    "padding": (dict(padding=(0, 0)), "conv2 has padding 0x0, expected 1x1"),
    "channels": (dict(weight=torch.zeros(32, 64, 3, 3)), "conv2 has weight 32x64x3x3, expected 64x64x3x3"),
}  # fmt: skip


@pytest.mark.parametrize("change", OTHER_GEOMETRIES)
def test_other_geometries(change):
    """No kernel's, and the reason names what was got and what is expected."""
    convs = [
        fastres.ConvBN(torch.zeros(64, 64, 1, 1)),
        fastres.ConvBN(torch.zeros(64, 64, 3, 3), padding=(1, 1)),
        fastres.ConvBN(torch.zeros(64, 64, 1, 1)),
    ]
    x = torch.zeros(2, 64, 8, 9)
    assert block_geometry.shape_of(x, convs, None) == BottleneckShape(2, 8, 9, 64, 64, 64, False)
    assert block_geometry.shape_of(x, convs, convs[0]) == BottleneckShape(2, 8, 9, 64, 64, 64, True)
    wrong, words = OTHER_GEOMETRIES[change]
    convs[1] = convs[1]._replace(**wrong)
    shape = block_geometry.shape_of(x, convs, None)
    assert isinstance(shape, block_geometry.Unserved) and "; ".join(shape.reasons) == words
    for four in ([*convs, convs[0]], convs[:1]):
        assert f"has {len(four)} convolutions, expected two or three" in block_geometry.shape_of(x, four, None).reasons


def strided_bottleneck():
    """The first block of torchvision's second stage, and an input."""
    down = nn.Sequential(nn.Conv2d(64, 128, 1, 2, bias=False), nn.BatchNorm2d(128))
    block = eval_cases.ready(fnn.Bottleneck(64, 32, stride=2, downsample=down))
    return fastres.fuse(block, fold=True), torch.randn(1, 64, 6, 8, dtype=torch.bfloat16)


def test_a_strided_block_says_why(emulator):
    """Where users look: the report of the model, and the verdicts of the process."""
    block, x = strided_bottleneck()
    whole_block.forget()
    with torch.no_grad():
        block(x)
        assert fastres.report(block).rows[0].separate is None, "on a CPU there is no kernel to miss"
        with fastres.backend("emulator"):
            block(x)
    why = "conv2 has stride 2x2, expected 1x1; the projection has stride 2x2, expected 1x1"
    name = "bottleneck 1x64x6x8 -> 32 -> 128, stride 2x2 with a projection, bfloat16"
    assert whole_block.verdicts() == {name: why}
    (row,) = fastres.report(block).rows
    assert row.separate == why and f"evaluated by separate convolutions: {why}" in str(fastres.report(block))
    fastres.fuse(block)
    assert fastres.report(block).rows[0].separate is None
    whole_block.forget()


def test_unserved_channels_say_why(emulator):
    """A geometry that is right, in sizes or a dtype that no kernel has; one that has is told apart."""
    block = fastres.fuse(eval_cases.ready(fnn.Bottleneck(128, 32)), fold=True)
    whole_block.forget()
    with torch.no_grad(), fastres.backend("emulator"):
        block(torch.randn(1, 128, 4, 4, dtype=torch.bfloat16))
        (why,) = whole_block.verdicts().values()
        assert fastres.report(block).rows[0].separate == why and "64 and 128 channels inside are served, not 32" in why
        served = fastres.fuse(eval_cases.ready(fnn.Bottleneck(256, 64)), fold=True)
        served(torch.randn(1, 256, 4, 4, dtype=torch.bfloat16))
        assert fastres.report(served).rows[0].separate is None
        served.float()(torch.randn(1, 256, 4, 4))
        assert "bfloat16 and float16 are served, not float32" in fastres.report(served).rows[0].separate
    whole_block.forget()


class FakeGpu:
    """A tensor's stand-in: what `kernels_for` looks at."""

    device, dtype = torch.device("cuda", 0), torch.bfloat16

    def numel(self):
        return 1


@pytest.mark.parametrize(("times", "served"), [((10.0, 20.0), True), ((20.0, 10.0), False)])
def test_automatic_choice(monkeypatch, times, served):
    """Right and faster, or separate convolutions: decided once, and never while a graph is captured."""
    shape, asked = SHAPES[0], []
    kernels = type("K", (), {"name": "cuda", "why_not_bottleneck": staticmethod(lambda *a: [])})()
    monkeypatch.setattr(dispatch, "load", lambda name: kernels)
    monkeypatch.setattr(whole_block, "check", lambda *a: asked.append("check") or "")
    monkeypatch.setattr(whole_block, "microseconds", lambda f: asked.append("time") or times[asked.count("time") - 1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    whole_block.forget()
    ask = lambda: whole_block.kernels_for(FakeGpu(), shape, lambda: None, lambda k: None)  # noqa: E731
    assert ask() is None and not asked
    assert "while a CUDA graph was captured" in whole_block.why_separate(FakeGpu(), shape)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(2):
        assert (ask() is kernels) == served
    assert asked == ["check", "time", "time"]
    (verdict,) = whole_block.verdicts().values()
    assert ("separate convolutions take 10 us, one kernel 20 us" == verdict) == (not served)
    assert whole_block.why_separate(FakeGpu(), shape) == verdict
    whole_block.forget()


def test_a_wrong_kernel_is_switched_off(monkeypatch):
    kernels = type("K", (), {"name": "cuda", "why_not_bottleneck": staticmethod(lambda *a: [])})()
    monkeypatch.setattr(dispatch, "load", lambda name: kernels)
    monkeypatch.setattr(whole_block, "check", lambda *a: "differs on integers in 1.00% of the output")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    whole_block.forget()
    with pytest.warns(RuntimeWarning, match="the one-kernel bottleneck .* is switched off on cuda:0: differs on"):
        assert whole_block.kernels_for(FakeGpu(), SHAPES[0], None, None) is None
    assert whole_block.kernels_for(FakeGpu(), SHAPES[0], None, None) is None  # silently now
    whole_block.forget()


def test_check_catches(emulator):
    """The verification finds one wrong element, and one that was never written."""
    shape = SHAPES[0]

    class Wrong:
        pack_bottleneck = staticmethod(fragments.bottleneck)

        def __init__(self, value):
            self.value = value

        def bottleneck_eval(self, x, weights, bias, mid, projected, out):
            emulator.bottleneck_eval(x, weights, bias, mid, projected, out)
            out[0, 5, 6, 7] = self.value

    for value in (float("nan"), 7.5):
        assert whole_block.check(Wrong(value), CPU, torch.bfloat16, shape)


# ---- what it moves


def test_traffic(emulator):
    """Units of mid elements a pixel: 4 in and 4 out reach DRAM, where separate convolutions move 16. No halo read, and
    no read of weights, waits for a bank."""
    shape = BottleneckShape(1, 28, 28, 256, 64, 256, False)
    x, w1, w2, w3, _, bias = block_trials.bottleneck_data(shape, CPU, torch.bfloat16, True)
    weights, out = fragments.bottleneck(w1, w2, w3), torch.empty_like(x)
    emulator.module.meter(True)
    emulator.bottleneck_eval(x, weights, bias, 64, False, out)
    counted = emulator.module.meter(False)
    unit = 28 * 28 * 64 * 2
    activations = counted["loaded_once"] + counted["stored"] - 2 * shape.weights - 4 * bias.numel()
    assert activations == pytest.approx(8 * unit, rel=0.01)
    assert counted["stored"] == counted["stored_once"] == 4 * unit
    # From L2 what the model says, and for each of four tiles, here a block of threads each: two chunks of weights taken
    # in vain, and the biases once a lane (lanes that read one address share it on a GPU, not in this count).
    biases = 256 * 4 * 64 // 4 + 256 * 4 * 64 // 4 + 7 * 32 * 4 * 256 // 4
    assert counted["loaded"] == block_model.loaded_bytes(shape) + 4 * (2 * 8192 + biases)
    assert counted["loaded_once"] + counted["stored"] == pytest.approx(block_model.memory_bytes(shape), rel=0.001)
    assert counted["matrix_conflicts"] == counted["load_conflicts"] == 0
    # As in the basic block: eight lanes store to two pixels, whose pitch is the one that the reads need.
    assert counted["store_conflicts"] == 4 * 16 * 16 * 64 // 64 < 0.03 * counted["wavefronts"]
    assert counted["wavefronts"] > 0


# ---- planted faults: each is found, whatever it does to the values


FAULTS = {
    "none": ("", "", ""),
    "barrier": ("fragments.cuh", "        sync_block();\n", ""),
    "pitch": ("bottleneck_eval.cuh", "const int pixel = (kRowsPerWarp * warp + i) * kHalo",
              "const int pixel = (kRowsPerWarp * warp + i) * (kHalo - 1)"),
    "tap": ("taps.cuh", "r * row + t * kPitch", "r * row + (t + 1) % 3 * kPitch"),
    "padding": ("bottleneck_eval.cuh", "if (from[i].p[e] < 0) packed", "if (from[i].p[e] < -1) packed"),
    "wait": ("fragments.cuh", "copy_async_wait<kStages - 2>();", "copy_async_wait<kStages - 1>();"),
    "drain": ("bottleneck_eval.cuh", "    weights.finish();\n", ""),
}  # fmt: skip
CAUGHT_AS = {"barrier": "race", "pitch": "race", "wait": "race", "drain": "asynchronous copies in flight"}


RARE = ("padding", "wait", "drain")  # caught too, at the price of a compilation each


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(fault, tmp_path):
    if fault in RARE and not os.environ.get("FASTRES_FULL"):
        pytest.skip("set FASTRES_FULL=1")
    library = build_planted(tmp_path, "selftest_block.cu", *FAULTS[fault])
    shape = BottleneckShape(1, 16, 15, 64, 64, 64, False)
    x, w1, w2, w3, projection, bias = block_trials.bottleneck_data(shape, CPU, torch.bfloat16, True)
    out = torch.full_like(x, float("nan"))
    expected = block_trials.bottleneck_expected(x, w1, w2, w3, projection, bias).to(torch.bfloat16)
    weights = fragments.bottleneck(w1, w2, w3)
    error = call_planted(library, x, shape.N, shape.H, shape.W, shape.C, weights, bias, out, 3)
    right = torch.equal(out, expected)
    if fault == "none":
        assert error == "" and right
    elif CAUGHT_AS.get(fault):
        assert CAUGHT_AS[fault] in error
    else:
        assert error == "" and not right
