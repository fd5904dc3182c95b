"""The CPU's Winograd convolutions and inference stem: every instruction set against float64, any number of threads."""

import pytest
import torch
from torch.nn import functional as F

from fastres.backends import cpu, cpu_conv, cpu_winograd
from fastres.inference import cpu_executor
from fastres.inference.plan import Conv, GlobalAvgPool, Segment, Stem
from fastres.ops.params import out_size

pytestmark = pytest.mark.skipif(cpu._module is None, reason=f"fastres._cpu is not built: {cpu._missing}")
CL = torch.channels_last
# N, C, K, H, W, padding: tails of panels, blocks and tiles, images smaller than a tile, no border and a wide one.
SHAPES = [
    (2, 16, 32, 8, 8, (1, 1)),
    (1, 5, 7, 9, 11, (1, 1)),
    (3, 33, 50, 7, 7, (1, 1)),
    (2, 64, 20, 6, 5, (0, 0)),
    (1, 17, 65, 3, 3, (0, 0)),
    (2, 20, 13, 1, 1, (1, 1)),
    (1, 40, 33, 13, 29, (2, 0)),
    (5, 24, 96, 2, 3, (1, 1)),
    (7, 48, 40, 14, 14, (1, 1)),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = [(out, stride) for stride, outs in cpu_winograd.OUTS.items() for out in outs]
#: How many times as far from float64 as direct sums of as many terms.
SPREAD = {(2, 1): 2, (3, 1): 3, (4, 1): 4, (5, 1): 8, (7, 1): 40, (2, 2): 2, (4, 2): 2}


# Dilation: residues of one tile, of several and of none, other ones in rows than in columns, pixels left over.
DILATED = [
    ((2, 17, 33, 9, 14, (2, 2)), (2, 2)),
    ((1, 20, 40, 13, 11, (4, 3)), (4, 3)),
    ((1, 16, 32, 5, 6, (7, 6)), (7, 6)),
    ((3, 5, 7, 23, 9, (0, 1)), (3, 1)),
    ((1, 33, 20, 31, 30, (2, 0)), (1, 2)),
]


def operands(shape, dtype=torch.float32, integers=False, stride=1, dilation=(1, 1)):
    N, C, K, H, W, padding = shape
    make = (lambda *s: 4.0 * torch.randint(-3, 4, s)) if integers else torch.randn
    out = N, K, *(out_size(n, 3, stride, p, d) for n, p, d in zip((H, W), padding, dilation, strict=True))
    x, residual = (make(*s).to(dtype).to(memory_format=CL) for s in ((N, C, H, W), out))
    return x, make(K, C, 3, 3), make(K), residual, padding


def ours(kind, x, w, bias, residual, padding, relu=False):
    (out, stride), dtype = kind, x.dtype
    y = torch.full(truth(x, w, None, None, padding, stride=stride).shape, float("nan"), dtype=dtype)
    packed, y = cpu_winograd.pack(w, out, stride), y.to(memory_format=CL)
    return cpu_winograd.fprop(x, packed, len(w), padding, out, bias, residual, relu, y, stride)


def truth(x, w, bias, residual, padding, relu=False, stride=1):
    y = F.conv2d(x.double(), w.double(), None if bias is None else bias.double(), stride, padding)
    y = y if residual is None else y + residual.double()
    return y.relu() if relu else y


@pytest.mark.parametrize("kind", KINDS)
def test_values(isa, kind):
    for shape in SHAPES:
        for dtype in DTYPES:
            case = operands(shape, dtype, stride=kind[1])
            expected = truth(*case, stride=kind[1])
            got = ours(kind, *case)
            limit = SPREAD[kind] * 4 * (9 * shape[1]) ** 0.5 * torch.finfo(torch.float32).eps
            error = (got.double() - expected).abs().max()
            assert error <= (limit + torch.finfo(dtype).eps / 2) * expected.abs().max(), f"{shape} {dtype}: {error}"


@pytest.mark.parametrize("out", cpu_winograd.OUTS[1])
def test_dilation(isa, out):
    threads = torch.get_num_threads()
    for shape, dilation in DILATED:
        for dtype in DTYPES:
            x, w, bias, residual, padding = operands(shape, dtype, dilation=dilation)
            y = F.conv2d(x.double(), w.double(), bias.double(), 1, padding, dilation)
            expected, packed = (y + residual.double()).relu(), cpu_winograd.pack(w, out)
            limit = SPREAD[out, 1] * 4 * (9 * shape[1]) ** 0.5 * torch.finfo(torch.float32).eps
            results = []
            try:
                for n in (1, 2, 3):
                    torch.set_num_threads(n)
                    place = residual.clone()
                    cpu_winograd.fprop(x, packed, len(w), padding, out, bias, place, True, place, dilation=dilation)
                    results.append(place)
            finally:
                torch.set_num_threads(threads)
            error = (results[0].double() - expected).abs().max()
            assert error <= (limit + torch.finfo(dtype).eps / 2) * expected.abs().max(), f"{shape} {dtype}: {error}"
            assert all(torch.equal(results[0], r) for r in results[1:]), shape


@pytest.mark.parametrize("stride", cpu_winograd.OUTS)
def test_integers_are_exact_with_every_epilogue(isa, stride):
    """The 2x2 transforms halve twice at most: multiples of 4 stay integers."""
    for shape in SHAPES:
        x, w, bias, residual, padding = operands(shape, integers=True, stride=stride)
        for relu in (False, True):
            for b in (None, bias):
                for r in (None, residual):
                    got = ours((2, stride), x, w, b, r, padding, relu)
                    assert torch.equal(got.double(), truth(x, w, b, r, padding, relu, stride)), (shape, relu)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_a_layer_are_near_those_of_direct_sums(isa, kind):
    x, w, _, _, padding = operands((1, 256, 64, 14, 14, (1, 1)), stride=kind[1])
    x = x.relu()
    expected = truth(x, w, None, None, padding, stride=kind[1])
    usual = ((kind[1],) * 2, padding, (1, 1), 1)
    direct = cpu_conv.fprop(x, w.contiguous(memory_format=CL), usual)
    errors = [
        float((y.double() - expected).norm() / expected.norm()) for y in (ours(kind, x, w, None, None, padding), direct)
    ]
    assert errors[0] <= {(7, 1): 28.0, (5, 1): 5.0, (4, 1): 3.0, (3, 1): 1.6}.get(kind, 1.3) * errors[1], errors


@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_matter_and_sums_go_where_the_residual_lies(isa, kind):
    threads, (out, stride) = torch.get_num_threads(), kind
    for shape in SHAPES:
        x, w, bias, residual, padding = operands(shape, stride=stride)
        packed, results = cpu_winograd.pack(w, out, stride), []
        try:
            for n in (1, 2, 3, 4, 7):
                torch.set_num_threads(n)
                results.append(ours(kind, x, w, bias, residual, padding, True))
                place = residual.clone()
                cpu_winograd.fprop(x, packed, len(w), padding, out, bias, place, True, place, stride)
                results.append(place)
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(results[0], r) for r in results[1:]), shape


@pytest.mark.parametrize("kind", KINDS)
def test_a_pixel_reaches_its_neighbours_only(isa, kind):
    out, stride = kind
    x, w, _, _, padding = operands((1, 16, 16, 11, 11, (1, 1)), stride=stride)
    x[:, :, 5, 6] = float("nan")
    got = ours(kind, x, w, None, None, padding)
    reached, spoiled = got.isnan().all(1)[0], got.isnan().any(1)[0]
    assert torch.equal(reached, spoiled) and bool(
        (reached | ~truth(x, w, None, None, padding, stride=stride).isnan().any(1)[0]).all()
    )
    # A tile is made of sums of all of its input: a NaN is seen in no tile but those that read the pixel.
    for i in range(0, len(spoiled), out):
        for j in range(0, len(spoiled), out):
            reads = all(s <= p + 1 <= s + stride * (out - 1) + 2 for s, p in ((i * stride, 5), (j * stride, 6)))
            assert bool(spoiled[i : i + out, j : j + out].any()) <= reads


def test_what_cannot_be_served_says_why():
    x, w = torch.empty(1, 8, 9, 9), torch.empty(8, 8, 3, 3)
    usual = ((1, 1), (1, 1), (1, 1), 1)
    assert cpu_winograd.why_not(x, w, usual) == []
    assert "5 x 5 taps" in cpu_winograd.why_not(x, torch.empty(8, 8, 5, 5), usual)[0]
    assert cpu_winograd.why_not(x, w, ((2, 2), *usual[1:])) == []
    for stride in ((2, 1), (3, 3)):
        assert f"stride {stride}" in cpu_winograd.why_not(x, w, (stride, *usual[1:]))[0]
    assert cpu_winograd.why_not(x, w, (*usual[:2], (2, 3), 1)) == []
    assert "dilation (2, 2)" in cpu_winograd.why_not(x, w, ((2, 2), (1, 1), (2, 2), 1))[0]
    assert "2 groups" in cpu_winograd.why_not(x, torch.empty(8, 4, 3, 3), (*usual[:3], 2))[0]
    for bad, what in (
        ((w, 6), "out: got 6"),
        ((w, 3, 2), "out: got 3"),
        ((w, 2, 3), "stride: got 3"),
        ((w.half(), 2), "w: got torch.float16"),
        ((w[:, :, :2], 2), "w: got"),
    ):
        with pytest.raises(ValueError, match=what):
            cpu_winograd.pack(*bad)
    packed = cpu_winograd.pack(w, 4)
    dense = x.contiguous(memory_format=CL)
    with pytest.raises(ValueError, match="packed: got torch.float32"):
        cpu_winograd.fprop(dense, packed, 8, (1, 1), 2)
    with pytest.raises(ValueError, match="x: got strides"):
        cpu_winograd.fprop(x, packed, 8, (1, 1), 4)
    with pytest.raises(ValueError, match="x: got 1 x 9, smaller"):
        cpu_winograd.fprop(dense[:, :, :1], packed, 8, (0, 0), 4)
    with pytest.raises(ValueError, match="bias: got"):
        cpu_winograd.fprop(dense, packed, 8, (1, 1), 4, torch.zeros(9))
    with pytest.raises(ValueError, match=r"dilation: got \(2, 2\), expected \(1, 1\) with stride 2"):
        cpu_winograd.fprop(dense, cpu_winograd.pack(w, 4, 2), 8, (1, 1), 4, stride=2, dilation=(2, 2))


# K, R, stride of the rows, padding, pooling kernel, stride, padding, H, W
STEMS = [
    (64, 7, 2, 3, 3, 2, 1, 56, 60),
    (33, 7, 2, 3, 3, 2, 1, 37, 41),
    (16, 3, 2, 1, 3, 2, 1, 19, 64),
    (20, 5, 1, 0, 2, 2, 0, 17, 23),
    (40, 7, 2, 3, 5, 1, 2, 30, 31),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_stem(isa, dtype):
    for K, R, rows, padding, *pool, H, W in STEMS:
        conv = Conv(torch.randn(K, 3, R, R), torch.randn(K), (rows, 2), (padding, padding))
        node = Stem("stem", conv, *pool)
        for N in (1, 3):
            x = torch.randn(N, 3, H, W).to(dtype).to(memory_format=CL)
            if N == 3:
                x[1, :, H // 2, W // 2] = float("nan")
            segment = cpu_executor.CpuSegment(Segment((node,)), dtype, "highest")
            got, w = segment.run(x), conv.weight
            # Products of pairs and of the matrix unit take weights of bfloat16.
            w = w.to(dtype) if "bf16" in segment.kernels(tuple(x.shape))[0].kernel else w
            y = F.conv2d(x.double(), w.double(), conv.bias.double(), conv.stride, conv.padding).relu()
            expected = F.max_pool2d(y, *pool)
            assert got.shape == expected.shape and torch.equal(got.isnan(), expected.isnan()), (K, R, H, W)
            limit = 4 * (3 * R * R) ** 0.5 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 2
            error = (got.double() - expected).nan_to_num().abs().max()
            assert error <= limit * expected.nan_to_num().abs().max(), f"{K} {R} {H} {W}: {error}"


def test_stem_on_any_number_of_threads(isa):
    threads, results = torch.get_num_threads(), []
    node = Stem("stem", Conv(torch.randn(40, 3, 7, 7), torch.randn(40), (2, 2), (3, 3)))
    x = torch.randn(3, 3, 45, 50).to(memory_format=CL)
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(cpu_executor.CpuSegment(Segment((node,)), torch.float32, "highest").run(x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], r) for r in results[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_global_mean(isa, dtype):
    for shape in ((1, 5, 3, 4), (2, 70, 7, 7), (3, 130, 1, 1)):
        x = torch.randn(shape).to(dtype).to(memory_format=CL)
        segment = cpu_executor.CpuSegment(Segment((GlobalAvgPool("pool", True),)), dtype, "highest")
        expected = x.double().mean((2, 3))
        torch.testing.assert_close(segment.run(x).double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_stem_weights_are_checked():
    with pytest.raises(ValueError, match="w: got"):
        cpu_conv.pack_stem(torch.zeros(8, 4, 7, 7))
