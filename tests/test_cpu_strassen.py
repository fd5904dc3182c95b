"""The CPU's 1x1 convolutions by Strassen's product: every instruction set against float64, any number of threads."""

import pytest
import torch
from session_cases import distance, narrow, pixels, truth
from torch.nn import functional as F

import fastres
from fastres.backends import cpu, cpu_conv, cpu_strassen
from fastres.inference import cpu_executor
from fastres.inference.cpu_weights import STRASSEN, Choice, Packed
from fastres.inference.plan import Conv

pytestmark = pytest.mark.skipif(cpu._module is None, reason=f"fastres._cpu is not built: {cpu._missing}")
CL = torch.channels_last
# N, C, K, H, W, stride: tails of panels, blocks and tiles; images of pixels that do not come out even, of one and two.
SHAPES = [
    (2, 64, 128, 8, 8, (1, 1)),
    (1, 5, 7, 9, 11, (1, 1)),
    (3, 33, 50, 7, 7, (1, 1)),
    (2, 130, 20, 6, 5, (2, 2)),
    (5, 17, 65, 1, 1, (1, 1)),
    (2, 20, 13, 2, 1, (1, 1)),
    (1, 40, 200, 13, 29, (3, 1)),
    (7, 96, 257, 14, 14, (1, 1)),
    (2, 256, 64, 29, 28, (2, 2)),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = tuple(cpu_strassen.LEAST)
#: How many times as far from float64 as direct sums, by level.
SPREAD = {1: 2.1, 2: 3.6}


def operands(shape, dtype=torch.float32, integers=False):
    N, C, K, H, W, stride = shape
    make = (lambda *s: torch.randint(-3, 4, s).float()) if integers else torch.randn
    out = N, K, *((n - 1) // s + 1 for n, s in zip((H, W), stride, strict=True))
    x, residual = (make(*s).to(dtype).to(memory_format=CL) for s in ((N, C, H, W), out))
    return x, make(K, C, 1, 1), make(K), residual, stride


def ours(levels, x, w, bias, residual, stride, relu=False, y=None):
    packed = cpu_strassen.pack(w, levels)
    return cpu_strassen.fprop(x, packed, len(w), bias, residual, relu, y, stride, levels)


def in_float64(x, w, bias, residual, stride, relu=False):
    y = F.conv2d(x.double(), w.double(), None if bias is None else bias.double(), stride)
    y = y if residual is None else y + residual.double()
    return y.relu() if relu else y


@pytest.mark.parametrize("levels", LEVELS)
def test_values(isa, levels):
    for shape in SHAPES:
        for dtype in DTYPES:
            case = operands(shape, dtype)
            expected = in_float64(*case)
            y = torch.full(expected.shape, float("nan"), dtype=dtype).to(memory_format=CL)
            got = ours(levels, *case, y=y)
            limit = SPREAD[levels] * 4 * shape[1] ** 0.5 * torch.finfo(torch.float32).eps
            error = (got.double() - expected).abs().max()
            assert got is y and got.dtype == dtype
            assert error <= (limit + torch.finfo(dtype).eps / 2) * expected.abs().max(), f"{shape} {dtype}: {error}"


@pytest.mark.parametrize("levels", LEVELS)
def test_integers_are_exact_with_every_epilogue(isa, levels):
    for shape in SHAPES:
        x, w, bias, residual, stride = operands(shape, integers=True)
        for relu in (False, True):
            for b in (None, bias):
                for r in (None, residual):
                    got = ours(levels, x, w, b, r, stride, relu)
                    assert torch.equal(got.double(), in_float64(x, w, b, r, stride, relu)), (shape, relu)


@pytest.mark.parametrize("levels", LEVELS)
def test_errors_of_a_layer_are_near_those_of_direct_sums(isa, levels):
    x, w, _, _, stride = operands((2, 512, 128, 14, 14, (1, 1)))
    x = x.relu()
    expected = in_float64(x, w, None, None, stride)
    direct = cpu_conv.fprop(x, w.contiguous(memory_format=CL), (stride, (0, 0), (1, 1), 1))
    errors = [distance(y, expected) for y in (ours(levels, x, w, None, None, stride), direct)]
    assert errors[0] <= SPREAD[levels] * errors[1], errors


@pytest.mark.parametrize("levels", LEVELS)
def test_threads_do_not_matter_and_sums_go_where_the_residual_lies(isa, levels):
    threads = torch.get_num_threads()
    for shape in SHAPES:
        *case, stride = operands(shape)
        results = []
        try:
            for n in (1, 2, 3, 4, 7):
                torch.set_num_threads(n)
                results.append(ours(levels, *case, stride, True))
                place = case[-1].clone()
                assert ours(levels, *case[:-1], place, stride, True, y=place) is place
                results.append(place)
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(results[0], r) for r in results[1:]), shape


@pytest.mark.parametrize("levels", LEVELS)
def test_images_do_not_meet(isa, levels):
    """A NaN or an infinity may reach other pixels of its image, and no other image."""
    for N, H in ((5, 7), (3, 14)):
        x, w, bias, residual, stride = operands((N, 64, 160, H, H, (1, 1)))
        clean = ours(levels, x, w, bias, residual, stride)
        for value in (float("nan"), float("inf")):
            x[2, 5, H // 2, H - 1] = value
            spoiled = ours(levels, x, w, bias, residual, stride)
            assert bool((~spoiled[2, :, H // 2, H - 1].isfinite()).any())
            others = [i for i in range(N) if i != 2]
            assert torch.equal(spoiled[others], clean[others])


def test_what_cannot_be_served_says_why():
    x, w = torch.empty(1, 8, 9, 9), torch.empty(8, 8, 1, 1)
    usual = ((1, 1), (0, 0), (1, 1), 1)
    assert cpu_strassen.why_not(x, w, usual) == []
    assert cpu_strassen.why_not(x, w, ((2, 3), *usual[1:])) == []
    assert "3 x 3 taps" in cpu_strassen.why_not(x, torch.empty(8, 8, 3, 3), usual)[0]
    assert "padding (1, 0)" in cpu_strassen.why_not(x, w, ((1, 1), (1, 0), (1, 1), 1))[0]
    assert "2 groups" in cpu_strassen.why_not(x, torch.empty(8, 4, 1, 1), (*usual[:3], 2))[0]
    for bad, what in (
        ((w, 3), "levels: got 3"),
        ((w.half(), 1), "w: got torch.float16"),
        ((torch.empty(8, 8, 3, 3), 1), "w: got"),
    ):
        with pytest.raises(ValueError, match=what):
            cpu_strassen.pack(*bad)
    packed, dense = cpu_strassen.pack(w), x.contiguous(memory_format=CL)
    for change, what in (
        ({"levels": 2}, "packed: got torch.float32"),
        ({"bias": torch.zeros(9)}, "bias: got"),
        ({"residual": torch.zeros(1, 8, 9, 8).to(memory_format=CL)}, "residual: got"),
    ):
        with pytest.raises(ValueError, match=what):
            cpu_strassen.fprop(dense, packed, 8, **change)
    with pytest.raises(ValueError, match="x: got strides"):
        cpu_strassen.fprop(x, packed, 8)


def test_where_it_serves(monkeypatch):
    monkeypatch.setattr(cpu_conv, "pairs_unit", lambda: "full")

    def kinds(C, K, dtype=torch.float32, precision="highest", R=1, **more):
        return Packed(Conv(torch.zeros(K, C, R, R), torch.zeros(K)), **more).kinds(dtype, precision)

    assert kinds(256, 512) == (0, *STRASSEN) and kinds(128, 512) == (0, -7) and kinds(64, 512) == (0,)
    assert kinds(256, 512, precision="exact") == kinds(256, 512, pixels=False) == (0,)
    assert not STRASSEN.keys() & {*kinds(256, 512, torch.bfloat16), *kinds(256, 512, R=3)}


@pytest.mark.parametrize("kind", STRASSEN)
def test_sessions(isa, kind, monkeypatch):
    monkeypatch.setattr(cpu_conv, "wins", lambda kind, x, w, g: not cpu_conv.why_not(x, w, g))
    monkeypatch.setattr(cpu_strassen, "LEAST", dict.fromkeys(LEVELS, 32))
    monkeypatch.setattr(
        cpu_executor.CpuSegment,
        "_measured",
        lambda self, shape, kinds: {
            p: Choice(kind, p.error(kind)) if kind in k else Choice(0) for p, k in kinds.items()
        },
    )
    model, x = narrow("bottleneck"), pixels()
    session = fastres.optimize(model, (x,))
    rows = session.report(measure=False).rows
    assert any(str(Choice(kind)) in row.kernel and "strassen's error" in row.note for row in rows), rows
    assert all("strassen" not in row.kernel for row in rows if row.op not in ("bottleneck", "basic_block"))
    assert distance(session(x), truth(model, x)) <= 1e-5
    exact = fastres.optimize(model, (x,), precision="exact")
    assert not any("strassen" in row.kernel for row in exact.report(measure=False).rows)
