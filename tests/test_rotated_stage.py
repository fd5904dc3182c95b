"""The rotated unit of a stage in one CUDA kernel, on the emulator: values at every edge, traffic, planted faults."""

from __future__ import annotations

import dataclasses
import os

import eval_cases
import pytest
import torch
from emulated import build_planted, call_planted
from torch import nn

from fastres import dispatch, rotated, whole_block
from fastres.backends import fragments, rotated_kernels
from fastres.backends.one_pass import Chip
from fastres.backends.rotated_kernels import RotatedShape
from fastres.codegen import rotated_model

CPU = torch.device("cpu")
A100, L4 = Chip("A100", 108, 163 * 1024, 164 * 1024), Chip("L4", 58, 99 * 1024, 100 * 1024)

# One tile and less; tiles cut on either side; more tiles than blocks, so that the stream of weights and the halo copied
# ahead run on; without the next block.
SHAPES = (
    RotatedShape(1, 8, 32, 64, 64, True),
    RotatedShape(1, 1, 1, 64, 64, True),
    RotatedShape(3, 15, 29, 64, 64, False),
    RotatedShape(2, 9, 35, 64, 128, True),
    RotatedShape(1, 40, 9, 64, 192, True),
    RotatedShape(1, 5, 43, 128, 128, True),
    RotatedShape(2, 7, 17, 128, 64, False),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_right(emulator, shape, dtype):
    """The verification itself, with one block of threads: tiles in turn."""
    emulator.module.set_chip("sm_80", 1)
    emulator.set_seed(SHAPES.index(shape))
    assert rotated.check(emulator, CPU, dtype, shape) == ""


def run(kernels, h, residual, w2, w3, w1, bias):
    """(out, next), into buffers full of NaN."""
    out = torch.full_like(residual, float("nan"))
    following = None if w1 is None else torch.full_like(h, float("nan"))
    kernels.rotated_stage(h, residual, fragments.rotated(w2, w3, w1), bias, out, following)
    return out, following


def test_same_bits(emulator):
    """Whatever the order of threads and however many blocks."""
    arguments = rotated.data(SHAPES[3], CPU, torch.bfloat16, False)
    found = []
    for seed, multiprocessors in ((0, 1), (1, 3), (41, 7)):
        emulator.set_seed(seed)
        emulator.module.set_chip("sm_90a", multiprocessors)
        found.append(run(emulator, *arguments))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("tap", range(9))
def test_taps(emulator, tap):
    """A 3x3 of one tap moves the image by one pixel, zeros coming in from outside; the next conv1 copies."""
    C, H, W = 64, 9, 33
    random = torch.Generator().manual_seed(tap)
    h, residual = (
        torch.randn(1, C, H, W, generator=random).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    one = torch.eye(C, dtype=torch.bfloat16)[:, :, None, None]
    w2 = torch.zeros(C, C, 3, 3, dtype=torch.bfloat16)
    w2[:, :, tap // 3, tap % 3] = one[:, :, 0, 0]
    out, following = run(emulator, h, residual, w2, one, one, torch.zeros(3 * C))
    moved = nn.functional.pad(torch.relu(h), (1, 1, 1, 1))[:, :, tap // 3 :, tap % 3 :][:, :, :H, :W]
    assert torch.equal(out, torch.relu(moved.double() + residual.double()).to(torch.bfloat16))
    assert torch.equal(following, out)


def test_nan_and_infinity(emulator):
    """A NaN spreads as far as its 3x3 neighbourhood, in out and in next."""
    for bad in (float("nan"), float("inf")):
        h, *rest = rotated.data(SHAPES[3], CPU, torch.bfloat16, False)
        h[1, 3, 8, 24] = bad
        for found, truth in zip(run(emulator, h, *rest), rotated.expected(h, *rest), strict=True):
            touched = ~found.isfinite().all(1)
            assert touched[1, 7:, 23:26].any() and not touched[0].any() and touched.sum() <= 6
            expected = truth.to(torch.bfloat16)
            assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isinf(), expected.isinf())


def test_check_catches(emulator):
    """The verification finds one wrong element of either output, and one that was never written."""

    class Wrong:
        def __init__(self, which, value):
            self.which, self.value = which, value

        def rotated_stage(self, h, residual, weights, bias, *made):
            emulator.rotated_stage(h, residual, weights, bias, *made)
            made[self.which][0, 5, 6, 7] = self.value

    for which, name in ((0, "out"), (1, "next")):
        for value in (float("nan"), 7.5):
            assert rotated.check(Wrong(which, value), CPU, torch.bfloat16, SHAPES[0]).startswith(f"{name}: ")


# ---- tiles


@pytest.mark.parametrize(
    ("H", "W", "mid", "expected", "tiles"),
    [(56, 56, 64, (28, 8), 14), (28, 28, 64, (14, 16), 4), (28, 28, 128, (4, 32), 7), (56, 56, 128, (14, 8), 28)],
)
def test_tiles(H, W, mid, expected, tiles):
    shape = RotatedShape(1, H, W, mid, 4 * mid, True)
    assert (shape.tile, shape.tiles) == (expected, tiles)


def test_tiles_fit():
    for mid in (64, 128):
        config = rotated_kernels.rotated_config(RotatedShape(1, 1, 1, mid, 64, True))
        for H in (0, 1, 7, 14, 57, 800, 1333):
            for W in (0, 1, 8, 31, 200, 334, 5000):
                rows, columns = rotated_kernels.tile(H, W, mid)
                assert columns % 8 == 0 and rows >= 1
                assert rows * columns <= config.pixels and (rows + 2) * (columns + 2) <= config.halo


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "dtype", "chip", "words"),
    [
        ({}, torch.bfloat16, L4, ""),
        ({"mid": 128, "next": False}, torch.float16, L4, ""),
        ({}, torch.float32, A100, "bfloat16 and float16 are served, not float32"),
        ({"mid": 256}, torch.float16, A100, "64 and 128 channels inside are served, not 256"),
        ({"K": 96}, torch.float16, A100, "multiples of 64 channels are served, not 96"),
        ({"H": 1 << 20}, torch.float16, A100, "no side 2\\*\\*20 or more"),
        ({"mid": 128}, torch.float16, Chip("small", 1, 64 * 1024, 64 * 1024), "80064 bytes of shared memory"),
    ],
)
def test_why_not(change, dtype, chip, words):
    reasons = rotated_kernels.why_not_rotated(dataclasses.replace(SHAPES[0], **change), dtype, chip)
    eval_cases.check_reasons(reasons, words)


def test_bad_input(emulator):
    h, residual, w2, w3, w1, bias = rotated.data(SHAPES[0], CPU, torch.bfloat16, True)
    weights = fragments.rotated(w2, w3, w1)

    def call(match, kind=ValueError, **change):
        made = dict(out=torch.full_like(residual, 7), next=torch.full_like(h, 7))
        a = dict(h=h, residual=residual, weights=weights, bias=bias) | made | change
        with pytest.raises(kind, match=f"rotated_stage: .*{match}"):
            emulator.rotated_stage(**a)
        assert all((t == 7).all() for t in made.values())

    call("h must be float32, bfloat16 or float16", TypeError, h=h.double())
    call("h must be dense channels_last", h=h.contiguous())
    call("residual must have shape", residual=residual[:, :, :, 1:])
    call("residual must be a tensor", TypeError, residual=None)
    call("next must have shape", next=residual[:, :, 1:])
    call("out must not overlap", out=residual)
    call("next must not overlap", next=h)
    call("weights must be contiguous torch.bfloat16", weights=weights[:-256])
    call("bias must be contiguous torch.float32", next=None, weights=fragments.rotated(w2, w3))
    with pytest.raises(ValueError, match="rotated_stage: tile_w is a multiple of 8 up to 256, got 12"):
        emulator.module.rotated_stage(1, 16, 16, 1, 8, 8, 64, 64, 8, 12, 16, 16, 16, 16, 0)
    with pytest.raises(ValueError, match="rotated_stage: a tile and its halo fit into shared memory, got 612"):
        emulator.module.rotated_stage(1, 16, 16, 1, 32, 32, 64, 64, 32, 16, 16, 16, 16, 16, 0)


def test_empty(emulator):
    h = torch.empty(0, 64, 14, 14, dtype=torch.float16).to(memory_format=torch.channels_last)
    _, _, w2, w3, w1, bias = rotated.data(SHAPES[0], CPU, torch.float16, True)
    run(emulator, h, torch.empty_like(h), w2, w3, w1, bias)


# ---- what it moves


@pytest.mark.parametrize("following", [True, False], ids=["next", "last"])
def test_traffic(emulator, following):
    """Units of mid elements a pixel that reach DRAM: 1 and 4 in, 4 and 1 out, where separate convolutions move 16. No
    halo read and no read of weights waits for a bank."""
    shape = RotatedShape(1, 28, 28, 64, 256, following)
    arguments = rotated.data(shape, CPU, torch.bfloat16, True)
    emulator.module.meter(True)
    run(emulator, *arguments)
    counted = emulator.module.meter(False)
    unit = 28 * 28 * 64 * 2
    activations = counted["loaded_once"] + counted["stored"] - 2 * shape.weights - 4 * shape.biases
    assert activations == pytest.approx((9 + following) * unit, rel=0.01)
    assert counted["stored"] == counted["stored_once"] == (4 + following) * unit
    assert counted["loaded_once"] + counted["stored"] == pytest.approx(rotated_model.memory_bytes(shape), rel=0.001)
    # Biases count once a lane here (lanes that read one address share it on a GPU); the rest is what the model says,
    # and for each tile, here a block of threads each, two chunks of weights taken in vain.
    warps = 7  # of eight have pixels: 7 x 32 of a tile
    biases = 32 * 4 * (64 // 8 * 2 * warps + 256 // 32 * 8 * warps + following * 2 * 8 * 8)
    extra = counted["loaded"] - rotated_model.loaded_bytes(shape) - shape.tiles * 2 * 8192
    assert 0 <= extra <= shape.tiles * biases * 8 / 7
    assert counted["matrix_conflicts"] == counted["load_conflicts"] == 0
    assert counted["wavefronts"] > 0


# ---- the automatic choice


class FakeGpu:
    """A tensor's stand-in: what `kernels_for` looks at."""

    device, dtype = torch.device("cuda", 0), torch.bfloat16

    def numel(self):
        return 1


@pytest.mark.parametrize(("times", "served"), [((10.0, 20.0), True), ((20.0, 10.0), False)])
def test_automatic_choice(monkeypatch, times, served):
    """Right and faster than block by block, where each block may ask for its own verdict meanwhile."""
    shape = rotated.RunShape(2, SHAPES[0])
    block = whole_block.BottleneckShape(1, 8, 32, 64, 64, 64, False)
    kernels = type("K", (), {"name": "cuda", "why_not_run": staticmethod(lambda *a: []),
                             "why_not_bottleneck": staticmethod(lambda *a: [])})()  # fmt: skip
    asked, left = [], list(times)
    monkeypatch.setattr(dispatch, "load", lambda name: kernels)
    monkeypatch.setattr(rotated, "check_run", lambda *a: asked.append(a[3]) or "")
    monkeypatch.setattr(whole_block, "check", lambda *a: asked.append(a[3]) or "is wrong")
    monkeypatch.setattr(whole_block, "microseconds", lambda f: f() or left.pop(0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    whole_block.forget()
    one_by_one = lambda: whole_block.kernels_for(FakeGpu(), block, None, None) and None  # noqa: E731
    with pytest.warns(RuntimeWarning, match="the one-kernel bottleneck"):
        assert (rotated.kernels_for(FakeGpu(), shape, one_by_one, lambda k: None) is kernels) == served
    assert (rotated.kernels_for(FakeGpu(), shape, one_by_one, lambda k: None) is kernels) == served
    assert asked == [shape, block]
    whole_block.forget()


# ---- planted faults: each is found, whatever it does to the values

# Of "early": the halo is overwritten before the barrier behind conv2.
SHARE = "            loaded += share;\n        }\n"
FAULTS = {
    "none": ("", "", ""),
    "commit": ("rotated_stage.cuh", "        copy_async_commit();", "        //"),
    "tap": ("taps.cuh", "r * row + t * kPitch", "r * row + (t + 1) % 3 * kPitch"),
    "early": ("rotated_stage.cuh", "        int stage = weights.take() + lane;\n        if (loaded",
              "        int stage = 0;\n        if (loaded",
              SHARE, SHARE + "        stage = weights.take() + lane;\n"),
    "padding": ("rotated_stage.cuh", "y >= 0 && y < s.H && x >= 0 && x < s.W", "y >= 0 && y < s.H && x < s.W"),
}  # fmt: skip
CAUGHT_AS = {"commit": "race", "early": "race"}
RARE = ("early", "padding", "tap")  # caught too, at the price of a compilation each


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(fault, tmp_path):
    if fault in RARE and not os.environ.get("FASTRES_FULL"):
        pytest.skip("set FASTRES_FULL=1")
    library = build_planted(tmp_path, "selftest_rotated.cu", *FAULTS[fault])
    shape = RotatedShape(2, 9, 35, 64, 64, True)
    h, residual, w2, w3, w1, bias = rotated.data(shape, CPU, torch.bfloat16, True)
    out, following = torch.full_like(residual, float("nan")), torch.full_like(h, float("nan"))
    sizes, weights = (shape.N, shape.H, shape.W, shape.K, *shape.tile), fragments.rotated(w2, w3, w1)
    error = call_planted(library, *sizes, h, residual, weights, bias, out, following, 3)
    truths = rotated.expected(h, residual, w2, w3, w1, bias)
    right = all(torch.equal(a, t.to(torch.bfloat16)) for a, t in zip((out, following), truths, strict=True))
    if fault == "none":
        assert error == "" and right
    elif fault in CAUGHT_AS:
        assert CAUGHT_AS[fault] in error
    else:
        assert not right
