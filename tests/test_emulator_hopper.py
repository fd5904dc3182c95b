"""The emulator's asynchronous hardware of sm_90: copies and products against plain indexing and float64, and planted
faults (a missing wait or fence, a wrong swizzle or stride) that each must be found."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

EMULATOR = Path(__file__).resolve().parents[1] / "csrc" / "emulator"
SEEDS = (0, 1, 2)
FLAWS = (
    "none", "no wait", "one thread waits", "too many bytes", "no empty wait", "no proxy fence", "no product fence",
    "no product wait", "overwrites", "uninitialised", "unannounced init", "extra arrival", "lanes differ",
)  # fmt: skip
FLAW = {name: i for i, name in enumerate(FLAWS)}
#: Mode of a descriptor or tensor map -> 16-byte units in a row of its pattern.
NONE, B128, B64, B32 = 0, 1, 2, 3
SPAN = {NONE: 1, B32: 2, B64: 4, B128: 8}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    named = os.environ.get("CXX", "").split()
    cxx = next((path for c in [*named[:1], "c++", "g++", "clang++"] if (path := shutil.which(c))), None)
    if cxx is None:
        pytest.skip("no C++ compiler (CXX, c++, g++, clang++) to build the emulator's selftest")
    path = tmp_path_factory.mktemp("selftest") / "hopper.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    defines = ["-DFASTRES_EMULATE", "-DFASTRES_BACKEND=emulator"]
    files = [EMULATOR / "selftest_hopper.cu", *(f for f in sorted(EMULATOR.glob("*.cpp")) if f.name != "module.cpp")]
    command = [cxx, *flags, *defines, "-x", "c++", *map(str, files), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, f"{' '.join(command)}\n{done.stderr}"
    return ctypes.CDLL(str(path))


def call(function, *args, seed: int = 0) -> str:
    message = ctypes.create_string_buffer(1024)
    given = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in args]
    status = function(*given, ctypes.c_int64(seed), message, ctypes.c_size_t(len(message)))
    assert status in (0, 1) and (status == 1) == bool(message.value)
    return message.value.decode()


def _swizzled(i: int, mode: int) -> int:
    """Where 16-byte unit i of an aligned region lies: columns of each 128 bytes are exchanged by its number."""
    row = i // 8 % 8
    return i ^ {NONE: 0, B128: row, B64: row // 2, B32: row // 4}[mode]


# ---- tensor copies


def load(library, x, box, at, mode=NONE, flaw="none", seed=0, shift=0):
    """The chunks that a box of ``x`` (outermost dimension first, as are ``box`` and ``at``) becomes, and the error."""
    inner, rank = x.element_size(), x.dim()
    sizes = torch.Size(box).numel()
    out = torch.full((sizes * inner // 16, 16 // inner), -1, dtype=x.dtype)
    array = ctypes.c_int64 * rank
    dims, strides = array(*reversed(x.shape)), array(*(s * inner for s in reversed(x.stride())))
    error = call(library.hopper_load, ctypes.c_void_p(x.data_ptr() + shift), rank, inner, dims, strides,
                 array(*reversed(box)), mode, (ctypes.c_int * rank)(*reversed(at)), ctypes.c_int64(out.shape[0]),
                 FLAW[flaw], out, seed=seed)  # fmt: skip
    return out, error


def boxed(x, box, at):
    """The box by indexing, zeros outside."""
    out = torch.zeros(box, dtype=x.dtype)
    for index in itertools.product(*map(range, box)):
        place = tuple(a + i for a, i in zip(at, index, strict=True))
        if all(0 <= p < n for p, n in zip(place, x.shape, strict=True)):
            out[index] = x[place]
    return out


SHAPES = {1: (64,), 2: (11, 32), 3: (5, 6, 16), 4: (3, 5, 6, 16), 5: (2, 3, 5, 4, 8)}
BOXES = {1: (24,), 2: (9, 8), 3: (3, 4, 8), 4: (2, 3, 4, 8), 5: (1, 2, 3, 3, 8)}


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_boxes(library, rank, dtype):
    """Inside, over each border, and outside altogether; 16-byte inner boxes; strides with gaps."""
    shape, box = SHAPES[rank], BOXES[rank]
    wide = torch.arange(2 * torch.Size(shape).numel(), dtype=dtype).reshape(*shape[:-1], 2 * shape[-1]) + 1
    x = wide[..., : shape[-1]] if rank > 1 else wide[: shape[-1]]
    corners = {tuple(0 for _ in shape), tuple(-2 for _ in shape), tuple(n - 1 for n in shape), (999,) * rank}
    for at in corners:
        out, error = load(library, x, box, at)
        assert not error, error
        assert torch.equal(out.reshape(box), boxed(x, box, at)), at


@pytest.mark.parametrize("mode", [B32, B64, B128])
def test_swizzled_boxes(library, mode):
    columns = SPAN[mode] * 8
    x = torch.arange(40 * 64, dtype=torch.int32).reshape(40, 64).to(torch.int16)
    out, error = load(library, x, (24, columns), (3, 8), mode)
    assert not error, error
    plain = x[3:27, 8 : 8 + columns].reshape(-1, 8)
    if columns == 64:
        plain = torch.cat([x[3:27, 8:], torch.zeros(24, 8, dtype=torch.int16)], 1).reshape(-1, 8)
    expected = torch.empty_like(plain)
    for i, chunk in enumerate(plain):
        expected[_swizzled(i, mode)] = chunk
    assert torch.equal(out, expected) and not torch.equal(out, plain)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("flaw", "words"),
    [
        ("no wait", "race"),
        ("one thread waits", "race"),
        ("too many bytes", "deadlock, barrier_wait"),
        ("uninitialised", "element 0 is no barrier"),
        ("unannounced init", "race|no barrier"),
        ("extra arrival", "more than the 1 arrivals"),
    ],
)
def test_faults_of_copies(library, flaw, words, seed):
    x = torch.arange(64 * 64, dtype=torch.int32).reshape(64, 64)
    _, error = load(library, x, (64, 16), (0, 0), flaw=flaw, seed=seed)
    assert "emulated kernel load_box" in error and any(word in error for word in words.split("|")), error


def test_layouts_that_the_driver_refuses(library):
    x = torch.zeros(64, 64, dtype=torch.int16)
    for box, mode, words in (((8, 4), NONE, "a row of the box must be a multiple of 16 bytes"),
                             ((8, 64), B64, "must not be longer than the swizzle's"),
                             ((257, 8), NONE, "sizes of the box must be 1..256")):  # fmt: skip
        assert words in load(library, x, box, (0, 0), mode)[1]
    assert "strides must be multiples of 16" in load(library, x[:, :60].contiguous(), (8, 8), (0, 0))[1]
    assert "the address must be a multiple of 16 bytes" in load(library, x, (8, 8), (0, 0), shift=2)[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_pipeline(library, seed):
    """Phases wrap around; a stage is loaded again only when all threads have left it."""
    x, out = torch.randn(5, 256, 4, generator=torch.Generator().manual_seed(1)), torch.empty(256)
    error = call(library.hopper_pipeline, x, FLAW["none"], out, seed=seed)
    assert not error, error
    expected = torch.zeros(256)
    for step, j in itertools.product(x.roll(-7, 1), range(4)):
        expected += step[:, j]
    assert torch.equal(out, expected)
    error = call(library.hopper_pipeline, x, FLAW["no empty wait"], out, seed=seed)
    assert "race" in error and "another thread read" in error, error


@pytest.mark.parametrize("seed", SEEDS)
def test_tensor_store(library, seed):
    x, out = torch.randn(9, 64), torch.full((9, 64), 7.0)
    arguments = (ctypes.c_int64(9), ctypes.c_int64(64))
    error = call(library.hopper_there_and_back, x, out, *arguments, FLAW["none"], seed=seed)
    assert not error, error
    expected = torch.full((9, 64), 7.0)
    expected[2:9, :28] = x[2:9, :28] + 1
    assert torch.equal(out, expected)
    error = call(library.hopper_there_and_back, x, out, *arguments, FLAW["no proxy fence"], seed=seed)
    assert "without a fence_async" in error, error
    error = call(library.hopper_there_and_back, x, out, *arguments, FLAW["no wait"], seed=seed)
    assert "returns with stores or products that it has not waited for" in error, error


# ---- warpgroup products


def k_major(x: torch.Tensor, mode: int) -> tuple[torch.Tensor, int, int, int]:
    """An image of x ``[mn, k]`` in 16-byte units, and in bytes leading, stride, and the step of 16 along k.

    A row of the pattern holds 8, 4 or 2 units along k; without swizzle each unit along k is a plane of all rows.
    """
    mn, k = x.shape
    units = x.reshape(mn, k // 8, 8)
    span = SPAN[mode]
    if mode == NONE:
        image = units.transpose(0, 1).reshape(-1, 8).clone()
        return image, 16 * mn, 128, 2 * 16 * mn
    assert k == 8 * span, "one row of the pattern"
    image = torch.full((mn * span, 8), float("nan"), dtype=x.dtype)
    for r, c in itertools.product(range(mn), range(span)):
        image[_swizzled(r * span + c, mode)] = units[r, c]
    return image, 16, 8 * span * 16, 32


def mn_major(x: torch.Tensor, mode: int) -> tuple[torch.Tensor, int, int, int]:
    """The same with neighbours along mn side by side."""
    mn, k = x.shape
    units = x.T.reshape(k, mn // 8, 8)  # [k, unit along mn, 8]
    span = SPAN[mode]
    image = torch.full((mn * k // 8, 8), float("nan"), dtype=x.dtype)
    for kk, u in itertools.product(range(k), range(mn // 8)):
        # Blocks of `span` units x 8 k; those along k side by side, then along mn.
        block = u // span * (k // 8) + kk // 8
        image[_swizzled(block * 8 * span + kk % 8 * span + u % span, mode)] = units[kk, u]
    along_k, along_mn = 8 * span * 16, k // 8 * 8 * span * 16
    leading, stride = (along_k, along_mn) if mode == NONE else (along_mn, along_k)
    return image, leading, stride, 2 * along_k


def multiply(
    library, a, b, mode=B128, transposed=(False, False), flaw="none", seed=0, change=None, narrow=False, k=None
):
    """d = a b^T of a ``[64, k]`` and b ``[N, k]`` through the descriptors, ``change`` applied to their fields."""
    build = [mn_major if t else k_major for t in transposed]
    left, *of_a, step_a = build[0](a, mode)
    right, *of_b, step_b = build[1](b, mode)
    at_b = -(-len(left) // 64) * 64
    image = torch.full((at_b + len(right), 8), float("nan"), dtype=a.dtype)
    image[: len(left)], image[at_b:] = left, right
    fields = dict(zip(("a", "a_leading", "a_stride"), (0, *of_a), strict=True))
    fields |= dict(zip(("b", "b_leading", "b_stride"), (at_b * 16, *of_b), strict=True))
    fields |= {"a_step": step_a, "b_step": step_b, "swizzle": mode, "base_offset": 0, "steps": a.shape[1] // 16}
    fields |= change or {}
    names = ("a", "a_leading", "a_stride", "b", "b_leading", "b_stride", "a_step", "b_step")
    out = torch.full((64, b.shape[0]), -1.0)
    error = call(library.hopper_products, int(a.dtype == torch.float16), int(narrow), *map(int, transposed), image,
                 ctypes.c_int64(len(image)), (ctypes.c_uint32 * 8)(*(fields[n] for n in names)),
                 (ctypes.c_int * 3)(fields["swizzle"], fields["base_offset"], fields["steps"]), FLAW[flaw], out,
                 seed=seed)  # fmt: skip
    return out, error


#: Columns of K that one row of the pattern holds.
K = {NONE: 32, B32: 16, B64: 32, B128: 64}


def operands(k=64, N=64, dtype=torch.bfloat16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(64, k, generator=g).to(dtype), torch.randn(N, k, generator=g).to(dtype)


def near(out, a, b):
    expected = a.double() @ b.double().T
    return ((out.double() - expected).abs() <= 1e-6 * expected.abs().amax() * a.shape[1] ** 0.5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", list(itertools.product((False, True), repeat=2)), ids=["kk", "km", "mk", "mm"])
@pytest.mark.parametrize("mode", [NONE, B32, B64, B128], ids=["none", "32", "64", "128"])
def test_products(library, mode, transposed, dtype):
    """Against float64, in every layout; K steps within a row of the pattern. One seed each: the layouts are many."""
    a, b = operands(K[mode], dtype=dtype)
    out, error = multiply(library, a, b, mode, transposed, seed=mode)
    assert not error, error
    assert near(out, a, b)


def test_narrow_product_and_integers(library):
    a, b = (t.mul(4).round() for t in operands(64, N=8))
    out, error = multiply(library, a, b, B128, narrow=True)
    assert not error and torch.equal(out, a.float() @ b.float().T)


@pytest.mark.parametrize("mode", [NONE, B128], ids=["planar", "128"])
def test_shifted_start(library, mode):
    """The layouts that a resident halo tile lives on: a start moved by whole rows reads the rows from there on."""
    a, b = torch.randn(80, K[mode], generator=torch.Generator().manual_seed(3)).to(torch.bfloat16), operands(K[mode])[1]
    image, leading, stride, step = k_major(a, mode)
    right, *of_b, step_b = k_major(b, mode)
    at_b = -(-len(image) // 64) * 64
    whole = torch.full((at_b + len(right), 8), float("nan"), dtype=a.dtype)
    whole[: len(image)], whole[at_b:] = image, right
    for rows in (1, 3, 7, 8, 9, 16):
        out = torch.empty(64, 64)
        start = 16 * SPAN[mode] * rows
        fields = (ctypes.c_uint32 * 8)(start, leading, stride, 16 * at_b, *of_b, step, step_b)
        modes = (ctypes.c_int * 3)(mode, 0, K[mode] // 16)
        error = call(library.hopper_products, 0, 0, 0, 0, whole, ctypes.c_int64(len(whole)), fields, modes, 0, out)
        assert not error and near(out, a[rows : rows + 64], b), f"{rows} rows"


@pytest.mark.parametrize(
    ("mode", "transposed", "change"),
    [
        (B128, (False, False), {"swizzle": B64}),
        (B128, (False, False), {"swizzle": NONE}),
        (B64, (False, False), {"swizzle": B128}),
        (B128, (False, False), {"a_stride": 512}),
        (B128, (False, False), {"b_stride": 512}),
        (B128, (False, False), {"base_offset": 3}),
        (B128, (False, False), {"a_step": 64}),
        (NONE, (False, False), {"a_leading": 512}),
        (NONE, (False, False), {"b_leading": 128}),
        (NONE, (True, True), {"a_leading": 512}),
        (NONE, (True, True), {"a_stride": 128}),
        (B32, (True, True), {"b_leading": 256}),
    ],
)
def test_wrong_descriptors_are_seen(library, mode, transposed, change):
    """A wrong swizzle, leading or stride offset, base offset or step reads other elements, or none at all."""
    a, b = operands(K[mode])
    right, error = multiply(library, a, b, mode, transposed)
    assert not error and near(right, a, b)
    wrong, error = multiply(library, a, b, mode, transposed, change=change)
    assert error or not near(wrong, a, b)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("flaw", "words"),
    [
        ("no proxy fence", "wrote without a fence_async"),
        ("no product fence", "without a warpgroup_fence"),
        ("overwrites", "race|without a fence_async"),
        ("lanes differ", "different descriptors"),
    ],
)
def test_faults_of_products(library, flaw, words, seed):
    _, error = multiply(library, *operands(), flaw=flaw, seed=seed)
    assert "emulated kernel products" in error and any(word in error for word in words.split("|")), error


def test_accumulators_in_flight_are_nan(library):
    out, error = multiply(library, *operands(), flaw="no product wait")
    assert not error and out.isnan().all()
