"""The bottleneck's version for sm_90 (tensor copies, warpgroup products), on the emulator: right values, every edge,
the choice between it and the portable one, planted faults that are each found."""

from __future__ import annotations

import os
from contextlib import nullcontext

import eval_cases
import pytest
import torch
from emulated import build_planted, call_planted

import fastres
from fastres import dispatch, whole_block
from fastres import nn as fnn
from fastres.backends import cuda, fragments, hopper_kernels, planes
from fastres.backends.block_kernels import BottleneckShape
from fastres.backends.one_pass import Chip
from fastres.block_trials import bottleneck_data, bottleneck_expected
from fastres.codegen import block_model, hopper_model

CPU = torch.device("cpu")
H100 = Chip("H100", 132, 227 * 1024, 228 * 1024)

# One tile exactly and the least of one; tiles cut on either side, more of them than warpgroups, so that the ring and
# the phases of its barriers run on; more slices of x than stages; a projection; 128 channels inside.
SHAPES = (
    BottleneckShape(1, 8, 16, 64, 64, 64, False),
    BottleneckShape(1, 1, 1, 64, 64, 64, False),
    BottleneckShape(2, 9, 35, 64, 64, 64, False),
    BottleneckShape(1, 7, 19, 192, 64, 192, False),
    BottleneckShape(1, 10, 17, 64, 64, 128, True),
    BottleneckShape(1, 15, 9, 128, 128, 128, False),
)


def arguments(shape, dtype, whole):
    x, w1, w2, w3, projection, bias = bottleneck_data(shape, CPU, dtype, whole)
    out = torch.full((shape.N, shape.H, shape.W, shape.K), float("nan"), dtype=dtype).permute(0, 3, 1, 2)
    return x, (w1, w2, w3, projection), bias, out


def run(kernels, shape, dtype=torch.bfloat16, whole=True):
    """(output, what it should be in float64)"""
    x, weights, bias, out = arguments(shape, dtype, whole)
    kernels.bottleneck_eval(x, kernels.pack_bottleneck(*weights), bias, shape.mid, shape.projected, out)
    return out, bottleneck_expected(x, *weights, bias)


@pytest.fixture
def hopper(emulator):
    """The version for sm_90 on an emulated chip of one multiprocessor: one block takes all tiles."""
    emulator.module.set_chip("sm_90a", 1)
    return emulator.hopper


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_right(hopper, shape, dtype):
    """Integers to the bit, normal values within the bounds of the verification."""
    hopper.set_seed(SHAPES.index(shape))
    out, truth = run(hopper, shape, dtype)
    assert torch.equal(out, truth.to(dtype))
    out, truth = run(hopper, shape, dtype, whole=False)
    limit = 4 * torch.finfo(dtype).eps + 2 * (9 * shape.mid) ** 0.5 * torch.finfo(torch.float32).eps
    assert ((out.double() - truth).abs() <= limit * truth.abs().max()).all()


def test_verification(hopper):
    """As it decides on a GPU."""
    assert whole_block.check(hopper, CPU, torch.float16, SHAPES[0]) == ""


@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[4]], ids=str)
def test_bits(emulator, shape):
    """The same whatever the order of threads and however many blocks; on integers those of the portable kernel."""
    found = []
    for seed, multiprocessors in ((3, 1), (1, 3), (41, 8)):
        emulator.set_seed(seed)
        emulator.module.set_chip("sm_90a", multiprocessors)
        found.append(run(emulator.hopper, shape, whole=False)[0])
    assert all(torch.equal(out, found[0]) for out in found)
    x, weights, bias, out = arguments(shape, torch.bfloat16, True)
    emulator.bottleneck_eval(x, fragments.bottleneck(*weights), bias, shape.mid, shape.projected, out)
    assert torch.equal(out, run(emulator.hopper, shape)[0])


@pytest.mark.parametrize("tap", range(9))
def test_taps(hopper, tap):
    """A 3x3 of one tap moves the image by one pixel, with zeros from outside although relu(bias) is not zero."""
    x, weights, bias, expected = eval_cases.moving_bottleneck(64, 9, 17, tap)
    out = torch.full_like(x, float("nan"))
    hopper.bottleneck_eval(x, planes.bottleneck(*weights), bias, 64, False, out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[5]], ids=str)
def test_nan_and_infinity(hopper, shape):
    """A NaN spreads as far as its 3x3 neighbourhood, over the border of tiles; no pixel beyond is touched."""
    for bad in (float("nan"), float("inf")):
        x, weights, bias, out = arguments(shape, torch.bfloat16, False)
        x[-1, 3, 7, 8] = bad
        hopper.bottleneck_eval(x, planes.bottleneck(*weights), bias, shape.mid, False, out)
        touched = ~out.isfinite().all(1)
        assert touched[-1, 6:9, 7:9].any() and not touched[:, :6].any() and not touched[:, :, :7].any()
        expected = bottleneck_expected(x, *weights, bias).to(torch.bfloat16)
        assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())


# ---- what is refused, what is chosen


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"C": 256, "K": 256}, ""),
        ({"K": 256, "projected": True}, ""),
        ({"mid": 128, "C": 512, "K": 512}, ""),
        ({"C": 320, "K": 320}, "239616 bytes of shared memory, 232192 are left"),
        ({"mid": 256}, "channels inside are served, not 256"),
        ({"N": 1 << 19, "H": 1 << 9, "W": 1 << 9}, "fewer than 2\\*\\*30 tiles"),
    ],
)
def test_why_not(change, words):
    shape = BottleneckShape(**{**dict(N=1, H=14, W=14, C=64, mid=64, K=64, projected=False), **change})
    reasons = hopper_kernels.why_not(shape, torch.bfloat16, H100)
    eval_cases.check_reasons(reasons, words)


def test_refused(emulator):
    """On other chips, by name; for other shapes than the portable one; bad arguments as there."""
    hopper = emulator.hopper
    emulator.module.set_chip("sm_100", 1)
    assert hopper.why_not_bottleneck(CPU, torch.bfloat16, SHAPES[0]) == ["sm_90a is needed, got sm_100"]
    assert emulator.why_not_bottleneck(CPU, torch.bfloat16, SHAPES[0]) == []
    with pytest.raises(RuntimeError, match="bottleneck_hopper: the GPU is not of compute capability 9.0"):
        emulator.module.bottleneck_hopper(1, 16, 1, 1, 1, 64, 64, 64, 0, 16, 16, 16, 0)
    emulator.module.set_chip("sm_90a", 1)
    wide = BottleneckShape(1, 1, 1, 320, 64, 320, False)
    assert "239616 bytes" in hopper.why_not_bottleneck(CPU, torch.bfloat16, wide)[0]
    with pytest.raises(ValueError, match="bottleneck_hopper: tile and weights take at most 232192 bytes .* got 239616"):
        emulator.module.bottleneck_hopper(1, 16, 1, 1, 1, 320, 64, 320, 0, 16, 16, 16, 0)
    assert "not float32" in hopper.why_not_bottleneck(CPU, torch.float32, SHAPES[0])[0]
    x, weights, bias, out = arguments(SHAPES[0], torch.bfloat16, True)
    with pytest.raises(ValueError, match="weights must be contiguous"):
        hopper.bottleneck_eval(x, planes.bottleneck(*weights)[8:], bias, 64, False, out)
    assert out.isnan().all()
    with pytest.raises(ValueError, match="multiples of 16 and 32"):
        planes.planes(torch.zeros(16, 16))


def test_other_gpus_and_builds(monkeypatch):
    """What a real device answers."""
    device, built = torch.device("cuda", 0), [True]
    monkeypatch.setattr(cuda.cuda, "module", type("M", (), {"has_sm90a": staticmethod(lambda: built[0])}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert cuda.cuda.not_hopper(device) == ""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert cuda.cuda.not_hopper(device) == "compute capability 9.0 is needed, got 10.0"
    built[0] = False
    assert "no code for sm_90a" in cuda.cuda.not_hopper(device)


class FakeGpu:
    """A tensor's stand-in: what `kernels_for` looks at."""

    device, dtype = torch.device("cuda", 0), torch.bfloat16

    def numel(self):
        return 1


class Version:
    name, version = "cuda", "sm_90a"

    def __init__(self, time, wrong="", reasons=(), hopper=None):
        self.time, self.wrong, self.reasons, self.hopper = time, wrong, list(reasons), hopper

    def why_not_bottleneck(self, *_):
        return self.reasons


@pytest.mark.parametrize(
    ("portable", "special", "separate", "served"),
    [
        (Version(20), Version(10), 30, 1),
        (Version(10), Version(20), 30, 0),
        (Version(20), Version(10), 5, None),
        (Version(20), Version(10, reasons=["another chip"]), 30, 0),
        (Version(20, reasons=["no"]), Version(10), 30, 1),
        (Version(20), Version(10, wrong="differs"), 30, 0),
        (Version(20, wrong="differs"), Version(10, wrong="differs too"), 30, None),
    ],
)
def test_automatic_choice(monkeypatch, portable, special, separate, served):
    """The fastest version that is right, if it is faster than separate convolutions."""
    portable.hopper = special
    monkeypatch.setattr(dispatch, "load", lambda name: portable)
    monkeypatch.setattr(whole_block, "check", lambda kernels, *_: kernels.wrong)
    monkeypatch.setattr(whole_block, "microseconds", lambda run: run())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    whole_block.forget()
    wrong = portable.wrong or special.wrong
    expected = pytest.warns(RuntimeWarning, match="switched off on cuda:0: differs") if wrong else nullcontext()
    with expected:
        chosen = whole_block.kernels_for(FakeGpu(), SHAPES[0], lambda: separate, lambda k: k.time)
    assert chosen is (None if served is None else (portable, special)[served])
    (why,) = whole_block.verdicts().values()
    assert (why == "") == (served is not None)
    if portable.wrong and special.wrong:
        assert why == "differs; differs too"
    whole_block.forget()


def test_modules_use_it(emulator, monkeypatch):
    """A folded block of fastres.nn packs for the version that serves it."""
    emulator.module.set_chip("sm_90a", 2)
    torch.manual_seed(0)
    block = eval_cases.ready(fnn.Bottleneck(256, 64))
    x = torch.randn(1, 256, 5, 6, dtype=torch.bfloat16)
    with torch.no_grad(), fastres.backend("emulator"):
        portable = block(x)
        monkeypatch.setattr(whole_block, "versions", lambda kernels, shape: [kernels.hopper])
        calls = []
        invoke = emulator.invoke
        monkeypatch.setattr(emulator, "invoke", lambda fn, *a: (calls.append(fn), invoke(fn, *a)))
        out = block(x)
    assert calls == ["bottleneck_hopper"]
    torch.testing.assert_close(out, portable, rtol=2**-6, atol=2**-6 * portable.abs().max().item())


# ---- what it moves


def test_traffic(hopper):
    """4 units in and 4 out reach DRAM. Weights come once a block, and no store waits for a bank."""
    shape = BottleneckShape(1, 16, 32, 256, 64, 256, False)
    x, weights, bias, out = arguments(shape, torch.bfloat16, True)
    packed = planes.bottleneck(*weights)
    hopper.module.meter(True)
    hopper.bottleneck_eval(x, packed, bias, 64, False, out)
    counted = hopper.module.meter(False)
    unit = 16 * 32 * 64 * 2
    assert counted["stored"] == counted["stored_once"] == 4 * unit
    assert counted["loaded_once"] + counted["stored"] == pytest.approx(block_model.memory_bytes(shape), rel=0.001)
    # Of each of 4 tiles the halo inside of the image, x again for the shortcut, the weights once; the biases once a
    # lane (lanes that read one address share it on a GPU, not in this count).
    biases = 4 * 128 * (2 * 32 + 8 * 8 + 4 * 2 * 32)
    assert counted["loaded"] == hopper_model.loaded_bytes(shape, blocks=1) + biases
    assert counted["store_conflicts"] == 0 and counted["wavefronts"] > 0


# ---- planted faults: each is found, whatever it does to the values

BLOCK, PIPELINE = "bottleneck_hopper.cuh", "hopper_pipeline.cuh"
FENCE, MEET = "        fence_async();\n", "sync_group(meeting, kMembers);"
TAP, OUTSIDE, BYTES = "* P::kHaloW + tap % 3;", " || w < 0 || w >= s.W) packed", "kGroups, P::kHaloPixels * kSliceRow"
LEADING = "matrix_descriptor(left, P::kPlane * kUnit"
#: file, what is right there, what is wrong; words of the error, "": other values.
FAULTS = {
    "none": (BLOCK, "", "", ""),
    "wait": (PIPELINE, "        barrier_wait(full_, first_ + stage, phases_ >> stage & 1);\n", "", "race"),
    "fence": (BLOCK, FENCE, "", "without a fence_async"),
    "leading": (BLOCK, LEADING, LEADING + " + 16", ""),
    "stride": (PIPELINE, "kRowStride = kHaloW * kUnit", "kRowStride = (kHaloW - 1) * kUnit", ""),
    "tap": (BLOCK, TAP, TAP.replace("tap %", "(tap + 1) %"), ""),
    "padding": (BLOCK, OUTSIDE, OUTSIDE.replace(" || w >= s.W", ""), ""),
    "empty": (PIPELINE, "        barrier_wait(empty_, stage_, phase_);\n", "", "race|more than the 1 arrivals"),
    "meeting": (BLOCK, FENCE + f"        {MEET}\n", FENCE, "race"),
    "reuse": (BLOCK, MEET + "  // the last tile's taps have been read", "", "race"),
    "settle": (BLOCK, "    warpgroup_wait<0>();\n    settle(d);\n    if constexpr", "    if constexpr", ""),
    "announce": (PIPELINE, BYTES, BYTES + " - 16", "race|more than the 1 arrivals|deadlock"),
}
COMMON = ("none", "wait", "fence", "leading")  # the others are caught too, at the price of a compilation each


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(fault, tmp_path):
    if fault not in COMMON and not os.environ.get("FASTRES_FULL"):
        pytest.skip("set FASTRES_FULL=1")
    file, sound, faulty, words = FAULTS[fault]
    library = build_planted(tmp_path, "selftest_hopper_block.cu", file if sound else "", sound, faulty)
    C = 64 if fault == "reuse" else 128  # with more slices than stages the ring alone keeps the warps together
    shape = BottleneckShape(1, 17, 33, C, 64, C, False)
    x, weights, bias, out = arguments(shape, torch.bfloat16, True)
    expected = bottleneck_expected(x, *weights, bias).to(torch.bfloat16)
    packed = planes.bottleneck(*weights)
    error = call_planted(library, x, shape.N, shape.H, shape.W, shape.C, packed, bias, out, 3)
    right = torch.equal(out, expected)
    if fault == "none":
        assert error == "" and right
    elif words:
        assert any(word in error for word in words.split("|")), error
    else:
        assert error or not right
