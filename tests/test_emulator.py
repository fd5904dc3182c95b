"""The emulator itself: planted faults are found and named, sound kernels do not depend on the order of threads.

That the CUDA kernels compute the right thing on it is the business of the per-op tests.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastres import dispatch, verify

CSRC = Path(__file__).resolve().parents[1] / "csrc"
THREADS, WARP = 256, 32
SEEDS = (0, 1, 2, 41)

FUNCTIONS = sorted({name for names in dispatch.LAUNCHES.values() for name in names})


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """``csrc/emulator/selftest.cu`` and the emulator, compiled as they are for the module."""
    named = os.environ.get("CXX", "").split()
    cxx = next((path for c in [*named[:1], "c++", "g++", "clang++"] if (path := shutil.which(c))), None)
    if cxx is None:
        pytest.skip("no C++ compiler (CXX, c++, g++, clang++) to build the emulator's selftest")
    path = tmp_path_factory.mktemp("selftest") / "selftest.so"
    emulator = CSRC / "emulator"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    defines = ["-DFASTRES_EMULATE", "-DFASTRES_BACKEND=emulator"]
    files = [emulator / "selftest.cu", *(f for f in sorted(emulator.glob("*.cpp")) if f.name != "module.cpp")]
    command = [cxx, *flags, *defines, "-x", "c++", *map(str, files), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, f"{' '.join(command)}\n{done.stderr}"
    return ctypes.CDLL(str(path))


@pytest.fixture
def run(library):
    """``run(name, in, out, seed)``: the error of the kernel, or an empty string."""

    def call(name: str, source=None, out=None, seed: int = 0) -> str:
        source = torch.ones(THREADS) if source is None else source
        out = torch.empty(THREADS) if out is None else out
        message = ctypes.create_string_buffer(1024)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (source, out)]
        size = ctypes.c_size_t(len(message))
        status = library.selftest(name.encode(), *pointers, ctypes.c_int64(seed), message, size)
        assert status in (0, 1), f"no kernel {name}"
        assert (status == 1) == bool(message.value)
        return message.value.decode()

    return call


def line_of(text: str, nth: int = 0) -> int:
    lines = (CSRC / "emulator" / "selftest.cu").read_text().splitlines()
    return [i for i, line in enumerate(lines, 1) if text in line][nth]


@pytest.mark.parametrize("seed", SEEDS)
def test_block_sum(run, seed):
    source = torch.arange(5 * THREADS, dtype=torch.float32)
    out = torch.full((5,), float("nan"))
    assert run("block_sum", source, out, seed) == ""
    assert torch.equal(out, source.reshape(5, THREADS).sum(1))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kernel", ["no_barrier", "no_second_barrier"])
def test_missing_barrier(run, kernel, seed):
    error = run(kernel, seed=seed)
    assert f"emulated kernel {kernel}, block (0, 0), thread" in error
    assert "race" in error and "since the last barrier" in error
    declared = {"no_barrier": line_of("SHARED(float, part", 1), "no_second_barrier": line_of("SHARED(float, value", 0)}
    assert f"selftest.cu:{declared[kernel]}" in error


@pytest.mark.parametrize("seed", SEEDS)
def test_partial_warp(run, seed):
    error = run("half_warp_shuffle", seed=seed)
    assert "kernel half_warp_shuffle, block (0, 0): lanes of warp 0 wait at shuffle_xor" in error
    assert f"selftest.cu:{line_of('v = shuffle_xor(v, 1);')}" in error
    assert "lane 16 has returned" in error
    assert "wait at ballot" in (error := run("half_warp_ballot", seed=seed)) and "lane 7 has returned" in error


def test_partial_block(run):
    error = run("half_block_barrier")
    assert "kernel half_block_barrier" in error
    assert "128 threads wait at the barrier" in error and "128 have returned" in error
    first, second = (line_of("        sync_block();", i) for i in (1, 2))
    error = run("two_barriers")
    assert "wait at different barriers" in error
    assert f"selftest.cu:{first}" in error and f"selftest.cu:{second}" in error


@pytest.mark.parametrize("seed", SEEDS)
def test_uneven_warps(run, seed):
    source = torch.rand(THREADS, generator=torch.Generator().manual_seed(0))
    expected = source.clone()
    for warp in range(THREADS // WARP):
        for i in range(warp):
            v = expected[warp * WARP : (warp + 1) * WARP].clone()
            expected[warp * WARP : (warp + 1) * WARP] = v + v[torch.arange(WARP) ^ (1 + i)]
    out = torch.empty(THREADS)
    assert run("uneven_warps", source, out, seed) == ""
    assert torch.equal(out, expected)


def test_shared_memory_is_poisoned(run):
    out = torch.zeros(THREADS)
    assert run("unwritten", out=out) == ""
    assert out[0::2].isnan().all() and (out[1::2] == 1).all()


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("out_of_range", "index 256 of 256 in the shared array"),
        ("too_much_shared", "static shared memory 49600 bytes, at most 49152"),
        ("misaligned", "misaligned vector load"),
        ("grid_too_wide", "grid 2147483648 x 1"),
        ("grid_too_high", "grid 1 x 65536"),
    ],
)
def test_faults(run, kernel, words):
    error = run(kernel)
    assert f"emulated kernel {kernel}" in error and words in error
    # The machine is sound again afterwards.
    assert run("block_sum", torch.ones(5 * THREADS), torch.empty(5)) == ""


def test_empty_grid(run):
    assert run("empty_grid") == ""


def test_ballot(run):
    source = torch.randn(THREADS, generator=torch.Generator().manual_seed(3))
    out = torch.empty(THREADS)
    assert run("votes", source, out, 5) == ""
    words = out.view(torch.int32).reshape(-1, WARP)
    bits = (words[:, :1] >> torch.arange(WARP, dtype=torch.int32)) & 1
    assert (words == words[:, :1]).all()
    assert torch.equal(bits.bool().flatten(), source > 0)


def test_order_follows_the_seed(run):
    orders = []
    for seed in (0, 0, 1):
        out = torch.zeros(7 * THREADS + 1)
        assert run("turns", out=out, seed=seed) == ""
        assert sorted(out[:-1].tolist()) == list(range(7 * THREADS))
        orders.append(out)
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    for order in orders:  # one block after the other, in any order
        turns = (order[:-1].reshape(7, THREADS) // THREADS).unique(dim=1)
        assert turns.shape == (7, 1) and sorted(turns.flatten().tolist()) == list(range(7))


def test_sixteen_bit_floats(run):
    """Rounding of the scalar models equals torch's, for every 16-bit value and its neighbourhood."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype, half in ((torch.bfloat16, 0), (torch.float16, 1)):
        values = every.view(dtype).float()
        up = torch.nextafter(values, torch.tensor(float("inf")))
        middle = (values.double() + up.to(dtype).nextafter(torch.tensor(float("inf"), dtype=dtype)).double()) / 2
        for source in (values, up, middle.float()):
            out = torch.empty(2 * THREADS)
            got = torch.empty(len(source))
            for at in range(0, len(source), THREADS):
                assert run("round_trip", source[at : at + THREADS].contiguous(), out) == ""
                got[at : at + THREADS] = out[half * THREADS :][:THREADS]
            torch.testing.assert_close(got, source.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


# ---- cooperative grids


@pytest.fixture
def chip(library):
    """``chip(name, multiprocessors)``: the GPU that launches are checked against."""
    yield lambda name, count: library.selftest_chip(name.encode(), count)
    assert library.selftest_chip(b"sm_90a", 4) == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_grid_barrier(run, seed):
    source, out = torch.arange(8, dtype=torch.float32), torch.full((16,), float("nan"))
    assert run("grid_sum", source, out, seed) == ""
    assert torch.equal(out, torch.cat([source, torch.full((8,), 28.0)]))


@pytest.mark.parametrize("seed", range(8))
def test_missing_grid_barrier(run, seed):
    """Some block sums up before another has written: NaN, whatever the order."""
    out = torch.full((16,), float("nan"))
    assert run("no_grid_barrier", torch.ones(8), out, seed) == ""
    assert out[8:].isnan().any()


@pytest.mark.parametrize("seed", SEEDS)
def test_grid_barrier_that_is_not_reached(run, seed):
    assert "block (2, 0) has returned, other blocks wait at the grid barrier" in run("one_block_leaves", seed=seed)
    assert "wait at different barriers" in run("half_block_at_grid_barrier", seed=seed)
    error, lines = run("two_grid_barriers", seed=seed), [line_of("        sync_grid();", i) for i in (1, 2)]
    assert "block (1, 0) waits at" in error and all(f"selftest.cu:{line}" in error for line in lines)
    error = run("grid_barrier_in_an_ordinary_launch", seed=seed)
    assert "a grid barrier in a launch that is not cooperative" in error


def test_cooperative_launch_is_refused(run, chip):
    def small():
        return run("grid_sum", torch.ones(8), torch.empty(16))

    assert "too many blocks for a cooperative launch, at most 2 on each of 4" in run("nine_blocks")
    assert "at most 1 on each of 4 multiprocessors of sm_90a" in run("five_large_blocks")
    assert run("four_large_blocks", torch.ones(4), torch.empty(8)) == "" and small() == ""
    assert "232449 bytes of dynamic shared memory, at most 232448 on sm_90a" in run("block_too_large")
    assert chip("sm_90a", 3) == 0 and "on each of 3" in small()
    assert chip("sm_89", 4) == 0 and "122880 bytes of dynamic shared memory, at most 101376" in run("five_large_blocks")
    assert small() == ""
    assert chip("sm_75", 4) == chip("sm_90a", 0) == chip("sm_90a", 33) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_dynamic_shared_memory(run, seed):
    source, out = torch.full((1,), 100 * 1024 / 4), torch.empty(THREADS)
    assert run("dynamic_memory", source, out, seed) == ""
    assert torch.equal(out, (torch.arange(THREADS) + 1.0) % THREADS)
    assert "race" in run("dynamic_memory_race", seed=seed)
    assert "index" in (error := run("dynamic_memory_too_small", source, out, seed)) and "of 256 in the shared" in error


# ---- the CUDA kernels on the emulator


@pytest.mark.parametrize("C", [64, 20])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_order_does_not_matter(emulator, function, C):
    """Bit-equal outputs whatever the order of blocks and threads."""
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        for label, args, outputs in verify._cases(function, torch.device("cpu"), dtype, C, 131, 3):
            runs = []
            for seed in SEEDS:
                emulator.set_seed(seed)
                buffers = {key: verify._poisoned(buffer) for key, buffer in outputs.items()}
                getattr(emulator, function)(**args, **buffers)
                runs.append(buffers)
            for again in runs[1:]:
                for key, buffer in again.items():
                    same = torch.equal(buffer.view(torch.uint8), runs[0][key].view(torch.uint8))
                    assert same, f"{function} ({label}): {key} depends on the order of threads"


@pytest.mark.parametrize("C", [64, 33, 264, 2048])
def test_wide_and_tall(emulator, C):
    """Several channel blocks, more rows than one turn of a block, tiles without rows."""
    for M, T in ((300, None), (1100, 5), (3, 7)):
        for function in FUNCTIONS:
            wrong = verify.check(function, emulator, torch.device("cpu"), torch.bfloat16, C, M, T)
            assert not wrong, f"C={C} M={M} T={T}: {wrong}"


def test_float64_is_refused(emulator):
    x = torch.zeros(8, dtype=torch.float64)
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16 on 'emulator', got torch.float64"):
        emulator.add_relu_fwd(x, x, 8, x.clone(), None)
    request = dispatch.Request("add_relu", torch.device("cpu"), torch.float64)
    assert emulator.why_not(request) == ["float32, bfloat16 and float16 are served, not float64"]


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, None])
def test_bad_seed(emulator, seed):
    with pytest.raises(ValueError, match="seed must be an integer in"):
        emulator.set_seed(seed)


def test_tiles():
    """By shape alone; at least one, never more than blocks to fill the GPU, no tile without a fair share of rows."""
    tiles = dispatch.load("emulator").tiles
    assert tiles(0, 64) == tiles(1, 64) == 1
    for C in (1, 8, 64, 250, 2048):
        for M in (49, 3136, 802816):
            channel_blocks = -(-C // 256)
            assert 1 <= tiles(M, C) <= -(-528 // channel_blocks)
            assert tiles(M, C) * 16 <= M + 16
    assert tiles(802816, 64) == 528


def test_a_sanitizer_sees_a_read_beyond_a_buffer(emulator):
    """Under `make sanitize`: a kernel that is told of more weights than there are ends the process."""
    if "asan" not in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer is not loaded (make sanitize)")
    code = (
        "import torch\nfrom fastres import _emulator\n"
        "x, weights, bias = torch.zeros(3 * 64), torch.zeros(512), torch.zeros(64)\n"
        "out = torch.zeros(4 * 64, dtype=torch.bfloat16)\n"
        "_emulator.stem_eval(1, x.data_ptr(), 1, 4, 4, 48, 1, 12, 3, weights.data_ptr(), bias.data_ptr(),\n"
        "                    out.data_ptr(), 0)\nprint('survived')\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "survived" not in done.stdout
    assert "ERROR: AddressSanitizer: heap-" in done.stderr and "stem_eval" in done.stderr
