"""The emulator's tensor-core collectives against float64, its asynchronous copies, and what it counts.

Expected registers follow the tables of the PTX ISA ("Matrix fragments for mma", "ldmatrix", "stmatrix").
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from emulated import CSRC, build_emulated

THREADS, WARP, WARPS = 256, 32, 8
SEEDS = (0, 1, 41)
COUNTS = ("loaded", "stored", "loaded_once", "stored_once", "wavefronts", "matrix", "load", "store")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build_emulated(CSRC / "emulator" / "selftest_mma.cu", tmp_path_factory.mktemp("mma") / "selftest.so")


def aligned(n: int) -> np.ndarray:
    """n words of NaN at a multiple of 64 bytes."""
    words = np.full(n + 16, 0x7FC00000, np.uint32)
    return words[(-words.ctypes.data // 4) % 16 :][:n]


@pytest.fixture
def run(library):
    """``run(name, source, n, seed)``: (error, n output words, counts)."""

    def call(name: str, source: np.ndarray, n: int, seed: int = 0):
        held, out = aligned(source.size * source.itemsize // 4), aligned(n)
        held[:] = np.ascontiguousarray(source).view(np.uint32).reshape(-1)
        message, counts = ctypes.create_string_buffer(1024), (ctypes.c_int64 * len(COUNTS))()
        pointers = [ctypes.c_void_p(t.ctypes.data) for t in (held, out)]
        size = ctypes.c_size_t(len(message))
        status = library.selftest(name.encode(), *pointers, ctypes.c_int64(seed), message, size, counts)
        assert status in (0, 1), f"no kernel {name}"
        return message.value.decode(), out, dict(zip(COUNTS, counts, strict=True))

    return call


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << 16, shape, dtype=np.uint16)


def registers(matrices, transposed: bool):
    """[..., 8, 8] as the 16-bit pairs [..., 32 lanes, 2] that a warp holds."""
    lane = np.arange(WARP)
    row, column = lane[:, None] // 4 + np.zeros(2, int), lane[:, None] % 4 * 2 + np.arange(2)
    return matrices[..., column, row] if transposed else matrices[..., row, column]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_matrix_loads(run, n, transposed, seed):
    rows = numbers(WARPS, 4, 8, 8)
    error, out, _ = run(f"load x{n}{' trans' * transposed}", rows, THREADS * n, seed)
    assert error == ""
    got = out.view(np.uint16).reshape(WARPS, WARP, n, 2).transpose(0, 2, 1, 3)
    assert np.array_equal(got, registers(rows[:, :n], transposed))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_matrix_stores(run, n, transposed):
    matrices = numbers(WARPS, n, 8, 8)
    held = registers(matrices, transposed).transpose(0, 2, 1, 3)
    error, out, _ = run(f"store x{n}{' trans' * transposed}", held, THREADS * 4)
    assert error == ""
    got = out.view(np.uint16).reshape(WARPS, 4, 8, 8)
    assert np.array_equal(got[:, :n], matrices) and not got[:, n:].any()


def test_matrix_load_needs_the_whole_warp(run):
    error, _, _ = run("half warp", numbers(THREADS, 8), THREADS)
    assert "wait at load_matrix" in error and "has returned" in error


KINDS = {"bf16": (16, torch.bfloat16), "f16": (16, torch.float16), "tf32": (8, torch.float32), "int8": (32, torch.int8)}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_products(run, kind, seed):
    k, dtype = KINDS[kind]
    random = torch.Generator().manual_seed(seed)
    shapes = ((WARPS, 16, k), (WARPS, k, 8), (WARPS, 16, 8))
    if dtype == torch.int8:
        a, b = (torch.randint(-128, 128, shape, generator=random, dtype=dtype) for shape in shapes[:2])
        c = torch.randint(-(1 << 20), 1 << 20, shapes[2], generator=random, dtype=torch.int32)
        words = [t.view(torch.uint8).to(torch.int32) for t in (a, b)]
    else:
        a, b = (torch.randn(shape, generator=random).to(dtype) for shape in shapes[:2])
        c = torch.randn(shapes[2], generator=random)
        if kind == "tf32":
            words = [t.view(torch.int32) for t in (a, b)]
            a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
        else:
            words = [t.view(torch.int16).to(torch.int32) & 0xFFFF for t in (a, b)]
    source = torch.cat([*(w.flatten(1) for w in words), c.view(torch.int32).flatten(1)], 1)
    error, out, _ = run(f"product {kind}", source.numpy(), WARPS * 128, seed)
    assert error == ""
    expected = a.double() @ b.double() + c.double()
    got = torch.from_numpy(out.view(np.int32 if dtype == torch.int8 else np.float32).copy()).reshape(WARPS, 16, 8)
    if dtype == torch.int8:
        assert torch.equal(got.double(), expected)
    else:
        torch.testing.assert_close(got.double(), expected, rtol=2**-23, atol=2**-23)


@pytest.mark.parametrize("seed", SEEDS)
def test_asynchronous_copies(run, seed):
    source = np.random.default_rng(seed).integers(0, 99, (8, THREADS, 4)).astype(np.float32)
    error, out, counts = run("pipeline", source, THREADS, seed)
    assert error == ""
    assert np.array_equal(out.view(np.float32), np.roll(source[:, :, 0].sum(0), -1))
    assert counts["loaded"] == counts["loaded_once"] == source.nbytes
    # What has not landed is NaN, and stays in the sum.
    error, out, _ = run("pipeline, no wait", source, THREADS, seed)
    assert error == "" and np.isnan(out.view(np.float32)).all()
    for barrier in ("after", "before"):
        error, _, _ = run(f"pipeline, no barrier {barrier}", source, THREADS, seed)
        assert "race" in error and "since the last barrier" in error
    error, out, _ = run("copies or zeros", source[0], THREADS * 4, seed)
    expected = np.where(np.arange(THREADS)[:, None] % 3 != 0, source[0], 0)
    assert error == "" and np.array_equal(out.view(np.float32).reshape(THREADS, 4), expected)


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("copy never awaited", "returns with asynchronous copies in flight"),
        ("copy out of range", "index 256 of 256 in the shared array"),
        ("copy misaligned", "misaligned asynchronous copy"),
    ],
)
def test_faulty_copies(run, kernel, words):
    error, _, _ = run(kernel, np.zeros((THREADS + 1, 4), np.float32), THREADS)
    assert words in error
    assert run("stride 1", np.zeros((THREADS, 4), np.float32), THREADS * 4)[0] == ""


def test_bank_conflicts(run):
    """16-byte accesses are served eight lanes at a time, a matrix is eight rows: both take one wavefront at best."""
    rows = numbers(WARPS, 4, 8, 8)
    for pitch, lost in ((9, 0), (8, 7), (2, 1)):
        error, _, counts = run(f"load x4 pitch {pitch}", rows, THREADS * 4)
        assert error == "" and counts["matrix"] == lost * 4 * WARPS
        assert counts["wavefronts"] == (1 + lost) * 4 * WARPS
    for stride, lost in ((1, 0), (2, 1), (8, 7), (9, 0)):
        error, out, counts = run(f"stride {stride}", rows, THREADS * 4)
        assert error == "" and np.array_equal(out, rows.view(np.uint32).reshape(-1))
        assert counts["load"] == counts["store"] == lost * 4 * WARPS
        assert counts["loaded"] == counts["stored"] == counts["loaded_once"] == counts["stored_once"] == THREADS * 16
    error, _, counts = run("broadcast", rows, THREADS * 4)
    assert error == "" and counts["load"] == 0 and counts["wavefronts"] == 4 * WARPS
