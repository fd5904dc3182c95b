"""The CPU's convolutions on a matrix unit: the instructions where they run, a model of them on the other instruction
sets, against float64."""

import pytest
import torch
from torch.nn import functional as F

from fastres.backends import cpu, cpu_matrix
from fastres.inference import cpu_executor, cpu_weights
from fastres.inference.plan import Conv, Segment, Stem

pytestmark = pytest.mark.skipif(cpu._module is None, reason=f"fastres._cpu is not built: {cpu._missing}")
CL = torch.channels_last
# N, C, K, H, W, kernel, stride, padding, dilation: x read where it is (with tails of a tile), tails of channels and
# panels, borders that rows share, strides with unused phases, several images in a strip, no border, wide ones.
CASES = [
    (2, 32, 32, 8, 8, 1, 1, 0, 1),
    (1, 64, 40, 7, 7, 1, 1, 0, 1),
    (1, 96, 33, 1, 1, 1, 1, 0, 1),
    (3, 33, 50, 7, 9, 1, 1, 0, 1),
    (2, 64, 32, 9, 8, 1, 2, 0, 1),
    (2, 32, 64, 14, 14, 3, 1, 1, 1),
    (5, 16, 20, 3, 2, 3, 1, 1, 1),
    (1, 40, 32, 13, 29, 3, 2, 1, 1),
    (2, 35, 7, 11, 10, 3, (1, 2), (2, 0), 1),
    (1, 32, 32, 12, 13, 3, (2, 1), 1, (1, 2)),
    (3, 3, 64, 15, 17, 7, 2, 3, 1),
    (1, 8, 16, 5, 9, (1, 3), 1, (0, 1), 2),
    (4, 64, 96, 6, 6, (3, 1), 1, (1, 0), 1),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = cpu.available_isas() if cpu._module is not None else []


@pytest.fixture(params=ISAS)
def isa(request):
    """Compiled for the unit and on a processor without it, kernels run with every instruction trapped."""
    before, trap = cpu.isa(), getattr(cpu._module, "trap_tiles", None)
    cpu.set_isa(request.param)
    trapped = not cpu_matrix.unit() and trap is not None
    try:
        if trapped:
            trap(True)
        if not cpu_matrix.unit():
            pytest.skip(f"{request.param}: this processor has no matrix unit, and FASTRES_TEST_ISAS was not set")
        yield request.param
    finally:
        if trapped:
            trap(False)
        cpu.set_isa(before)


def pair(v):
    return (v, v) if isinstance(v, int) else v


def operands(case, dtype, integers=False):
    """Weights that the dtype's kernel takes as they are, so that float64 sees the same."""
    N, C, K, H, W, *geometry = case
    kernel, stride, padding, dilation = (pair(v) for v in geometry)
    g = torch.Generator().manual_seed(0)
    make = (
        (lambda *s: torch.randint(-8, 9, s, generator=g).float())
        if integers
        else lambda *s: torch.randn(*s, generator=g)
    )
    x, w, bias = make(N, C, H, W).to(dtype).to(memory_format=CL), make(K, C, *kernel), make(K)
    if dtype == torch.bfloat16:
        w = w.to(dtype).float()
    shape = F.conv2d(x.double(), w.double(), None, stride, padding, dilation).shape
    return x, w, bias, make(*shape).to(dtype).to(memory_format=CL), (stride, padding, dilation, 1)


def truth(x, w, bias, residual, geometry, relu=False):
    y = F.conv2d(x.double(), w.double(), None if bias is None else bias.double(), *geometry)
    y = y if residual is None else y + residual.double()
    return y.relu() if relu else y


def ours(x, w, bias, residual, geometry, relu=False):
    return cpu_matrix.fprop(x, cpu_matrix.pack(w, x.dtype), w.shape, geometry, bias, residual, relu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(isa, dtype):
    for case in CASES:
        x, w, bias, residual, g = operands(case, dtype)
        expected = truth(x, w, bias, residual, g)
        got = ours(x, w, bias, residual, g)
        terms = w[0].numel()
        magnitude = F.conv2d(x.double().abs(), w.double().abs(), None, *g)
        lost = 0 if dtype == torch.bfloat16 else 2**-16
        limit = lost * magnitude + 4 * terms**0.5 * torch.finfo(torch.float32).eps * magnitude
        limit = limit + torch.finfo(dtype).eps / 2 * expected.abs()
        assert (got.double() - expected).abs().sub(limit).max() <= 1e-7, case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_exact_with_every_epilogue(isa, dtype):
    for case in CASES:
        x, w, bias, residual, g = operands(case, dtype, integers=True)
        for relu in (False, True):
            for b in (None, bias):
                for r in (None, residual):
                    expected = truth(x, w, b, r, g, relu)
                    assert torch.equal(ours(x, w, b, r, g, relu), expected.to(dtype)), (case, relu)


def test_both_halves_of_a_product_count(isa):
    """Sixteen bits of x, and of w, where a bfloat16 has eight: off by one in their last place would show."""
    for case in CASES:
        x, w, _, _, g = operands(case, torch.float32, integers=True)
        big = 4096 * x + torch.where(x > 0, 17.0, -15.0)
        for a, b in ((big, w.sign()), (x.sign(), 4096 * w + 33)):
            a = a.contiguous(memory_format=CL)
            expected = truth(a, b, None, None, g)
            whole = expected.abs().max() < 2**24
            assert torch.equal(ours(a, b, None, None, g).double(), expected) or not whole, case


def test_threads_do_not_matter_and_sums_go_where_the_residual_lies(isa):
    threads = torch.get_num_threads()
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            x, w, bias, residual, g = operands(case, dtype)
            packed = cpu_matrix.pack(w, dtype)
            try:
                torch.set_num_threads(1)
                expected = cpu_matrix.fprop(x, packed, w.shape, g, bias, residual, True)
                for n in (2, 3, 7):
                    torch.set_num_threads(n)
                    y = residual.clone(memory_format=torch.preserve_format)
                    assert torch.equal(cpu_matrix.fprop(x, packed, w.shape, g, bias, y, True, y), expected), (case, n)
            finally:
                torch.set_num_threads(threads)


def test_strips_and_groups_of_panels(isa):
    """More rows than a strip holds, and more weights than stay in L2 together."""
    for case in ((2, 64, 40, 150, 120, 3, 1, 1, 1), (1, 512, 192, 5, 5, 3, 1, 1, 1)):
        x, w, bias, residual, g = operands(case, torch.bfloat16, integers=True)
        x = x * (torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.2)
        x = x.contiguous(memory_format=CL)
        assert torch.equal(ours(x, w, bias, residual, g), truth(x, w, bias, residual, g).to(x.dtype)), case


def test_infinities_and_nans_reach_what_they_would(isa):
    """And nothing else. An infinity may become a NaN: the halves of a weight may differ in sign."""
    x, w, bias, _, g = operands(CASES[5], torch.float32)
    x[0, 3, 4, 5], x[1, 7, 0, 0] = float("inf"), float("nan")
    got = ours(x, w, bias, None, g)
    expected = F.conv2d(x, w, bias, *g)
    assert torch.equal(got.isfinite(), expected.isfinite())


def test_bad_input(isa):
    x, w, bias, residual, g = operands(CASES[0], torch.float32)
    packed = cpu_matrix.pack(w, x.dtype)
    with pytest.raises(ValueError, match="packed: got .* expected"):
        cpu_matrix.fprop(x, packed[:-1], w.shape, g)
    with pytest.raises(ValueError, match="residual"):
        cpu_matrix.fprop(x, packed, w.shape, g, bias, residual[:, :4])
    with pytest.raises(TypeError, match="pack: dtype"):
        cpu_matrix.pack(w, torch.float64)
    with pytest.raises(ValueError, match="pack: w"):
        cpu_matrix.pack(w.double(), torch.float32)


# N, C, H, W, then (K, kernel, stride) of each convolution; whether a projection leads around them.
BLOCKS = [
    (1, 64, 10, 9, ((32, 1, 1), (32, 3, 1), (64, 1, 1)), False),
    (2, 32, 7, 7, ((64, 1, 1), (64, 3, 1), (32, 1, 1)), False),
    (1, 32, 9, 11, ((32, 1, 1), (32, 3, 2), (96, 1, 1)), True),
    (2, 40, 8, 12, ((32, 1, 2), (64, 3, 1), (50, 1, 1)), True),
    (3, 32, 12, 5, ((64, 3, 1), (32, 3, 1)), False),
    (2, 33, 13, 14, ((32, 3, 2), (48, 3, 1)), True),
    (1, 32, 1, 1, ((32, 1, 1), (32, 3, 1), (32, 1, 1)), False),
    (1, 32, 70, 60, ((32, 3, 1), (32, 3, 1)), False),
    (1, 32, 90, 72, ((64, 1, 1), (64, 3, 2), (128, 1, 1)), True),
    (2, 32, 21, 60, ((32, 5, 1), (32, 3, 1), (32, 3, 1)), False),
]


def block_operands(case, dtype):
    """Integers that stay small, so that every sum is exact."""
    N, C, H, W, main, projected = case
    g = torch.Generator().manual_seed(0)

    def conv(inputs, K, kernel, stride):
        w = torch.randint(-1, 2, (K, inputs, kernel, kernel), generator=g).float()
        w = w * (torch.rand(w.shape, generator=g) < 8 / w[0].numel())
        geometry = ((stride,) * 2, (kernel // 2,) * 2, (1, 1), 1)
        return w, geometry, torch.randint(-2, 3, (K,), generator=g).float()

    x = torch.randint(-2, 3, (N, C, H, W), generator=g).to(dtype).to(memory_format=CL)
    convs = []
    for K, kernel, stride in main:
        convs.append(conv(convs[-1][0].shape[0] if convs else C, K, kernel, stride))
    stride = torch.tensor([s for _, _, s in main]).prod().item()
    return x, convs + [conv(C, main[-1][0], 1, stride)] * projected, projected


def block_truth(x, convs, projected):
    main, y = convs[:-1] if projected else convs, x.double()
    for i, (w, g, bias) in enumerate(main):
        y = F.conv2d(y, w.double(), bias.double(), *g)
        y = y.relu() if i + 1 < len(main) else y
    around = F.conv2d(x.double(), convs[-1][0].double(), convs[-1][2].double(), *convs[-1][1]) if projected else x
    return (y + around.double()).relu()


def our_block(x, convs, projected):
    return cpu_matrix.block(x, [(cpu_matrix.pack(w, x.dtype), w.shape, g, b) for w, g, b in convs], projected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_are_exact_for_any_number_of_threads(isa, dtype):
    threads = torch.get_num_threads()
    for case in BLOCKS:
        x, convs, projected = block_operands(case, dtype)
        expected = block_truth(x, convs, projected)
        assert expected.max() <= 256, "a bfloat16 would round"
        try:
            for n in (1, 2, 5):
                torch.set_num_threads(n)
                assert torch.equal(our_block(x, convs, projected).double(), expected), (case, n)
        finally:
            torch.set_num_threads(threads)


def test_blocks_have_the_bits_of_their_convolutions(isa):
    for case in BLOCKS:
        if case[-1]:
            continue  # a projection's sums are not rounded in between
        for dtype in (torch.float32, torch.bfloat16):
            x, convs, _ = block_operands(case, dtype)
            g = torch.Generator().manual_seed(1)
            x = torch.randn(x.shape, generator=g).to(dtype).to(memory_format=CL)
            convs = [(torch.randn(w.shape, generator=g), geometry, b) for w, geometry, b in convs]
            y = x
            for i, (w, geometry, b) in enumerate(convs):
                residual = x if i + 1 == len(convs) else None
                y = cpu_matrix.fprop(y, cpu_matrix.pack(w, dtype), w.shape, geometry, b, residual, True)
            assert torch.equal(our_block(x, convs, False), y), (case, dtype)


def test_blocks_refuse(isa):
    x, convs, _ = block_operands(BLOCKS[0], torch.float32)
    packed = [(cpu_matrix.pack(w, x.dtype), w.shape, g, b) for w, g, b in convs]
    with pytest.raises(ValueError, match="1 convolutions, expected two or three"):
        cpu_matrix.block(x, packed[:1], False)
    with pytest.raises(ValueError, match="x and y differ in shape"):
        cpu_matrix.block(x, packed[:2], False)
    with pytest.raises(ValueError, match="not 1x1 without borders"):
        cpu_matrix.block(x, [*packed, packed[1]], True)
    with pytest.raises(ValueError, match="got 32 channels|expected"):
        cpu_matrix.block(x, [packed[0], packed[0], packed[2]], False)


# C, K, R, S, stride, padding, pool's kernel, stride and padding, H, W.
STEMS = [
    (3, 64, 7, 7, (2, 2), 3, 3, 2, 1, 37, 41),
    (3, 20, 3, 3, (2, 2), 1, 2, 2, 0, 16, 70),
    (1, 33, 5, 8, (1, 1), 2, 3, 1, 1, 9, 12),
    (4, 32, 1, 1, (1, 3), 0, 3, 2, 0, 20, 23),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stems(isa, dtype, monkeypatch):
    """A NaN reaches the windows that it lies in, and no others: a step reads no pixel but the filter's."""
    monkeypatch.setattr(cpu_weights, "UNITS", {cpu_matrix.unit()})
    monkeypatch.setattr(cpu_weights, "PAIRED", set())
    least = lambda self, shape, kinds: {p: cpu_weights.Choice(min(of_conv)) for p, of_conv in kinds.items()}  # noqa: E731
    monkeypatch.setattr(cpu_executor.CpuSegment, "_measured", least)
    g = torch.Generator().manual_seed(0)
    for C, K, R, S, stride, padding, *pool, H, W in STEMS:
        w = torch.randn(K, C, R, S, generator=g).to(dtype).float()
        node = Stem("stem", Conv(w, torch.randn(K, generator=g), stride, (padding, padding)), *pool)
        for N in (1, 3):
            x = torch.randn(N, C, H, W, generator=g).to(dtype).to(memory_format=CL)
            if N == 3:
                x[1, :, H // 2, W // 2], x[2, 0, 0, W - 1] = float("nan"), float("nan")
            y = F.conv2d(x.double(), w.double(), node.conv.bias.double(), stride, padding).relu()
            expected = F.max_pool2d(y, *pool)
            segment = cpu_executor.CpuSegment(Segment((node,)), dtype, "high")
            got = segment.run(x)
            assert "matrix" in segment.kernels(tuple(x.shape))[0].kernel
            assert got.shape == expected.shape and torch.equal(got.isnan(), expected.isnan()), (C, K, R, S)
            lost = 0 if dtype == torch.bfloat16 else C * R * S * 2**-16 / 8
            limit = lost + 4 * (C * R * S) ** 0.5 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 2
            error = (got.double() - expected).nan_to_num().abs().max()
            assert error <= limit * expected.nan_to_num().abs().max(), f"{C} {K} {R} {S}: {error}"
            threads = torch.get_num_threads()
            torch.set_num_threads(threads + 2)
            again = segment.run(x)
            torch.set_num_threads(threads)
            assert torch.equal(again.nan_to_num(), got.nan_to_num())


# N, C, groups, H, W, kernel, stride: groups of 1 to 32 channels, x read where it is, strides of both kinds.
GROUPED = [
    (2, 128, 32, 14, 13, 3, 1),
    (3, 128, 32, 15, 13, 3, 2),
    (1, 64, 64, 9, 9, 3, 1),
    (5, 64, 2, 7, 7, 3, 1),
    (2, 96, 6, 9, 8, 1, 1),
    (2, 96, 6, 9, 8, 1, 2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups(isa, dtype):
    """Groups that fill panels together: within the dtype's limit of float64, exact integers exact, any threads."""
    for N, C, groups, H, W, kernel, stride in GROUPED:
        g = torch.Generator().manual_seed(0)
        geometry = (pair(stride), pair(kernel // 2), (1, 1), groups)
        for integers in (False, True):

            def make(*shape, g=g, integers=integers):
                return torch.randint(-4, 5, shape, generator=g).float() if integers else torch.randn(shape, generator=g)

            x, bias = make(N, C, H, W).to(dtype).to(memory_format=CL), make(C)
            w = make(C, C // groups, kernel, kernel)
            w = w.to(dtype).float() if dtype == torch.bfloat16 else w
            packed = cpu_matrix.pack(w, dtype, groups)
            got = cpu_matrix.fprop(x, packed, w.shape, geometry, bias, None, True)
            want = F.conv2d(x.double(), w.double(), bias.double(), *geometry).relu()
            if integers:
                assert torch.equal(got.double(), want.to(dtype).double())
                continue
            taps = C // groups * kernel**2
            lost = 0 if dtype == torch.bfloat16 else taps * 2**-16 / 8
            limit = lost + 4 * taps**0.5 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 2
            error = (got.double() - want).abs().max()
            assert error <= limit * want.abs().max(), f"{C} {groups} {kernel} {stride}: {error}"
            threads = torch.get_num_threads()
            torch.set_num_threads(threads + 2)
            again = cpu_matrix.fprop(x, packed, w.shape, geometry, bias, None, True)
            torch.set_num_threads(threads)
            assert torch.equal(again, got)


def test_groups_that_do_not_fill_panels_are_refused():
    w = torch.randn(96, 48, 3, 3)
    with pytest.raises(ValueError, match="groups: got 2 for"):
        cpu_matrix.pack(w, torch.bfloat16, 2)


@pytest.mark.skipif(cpu_matrix.unit() != "instructions", reason="needs a processor with a matrix unit")
def test_the_report_takes_the_units_own_rate():
    device = torch.device("cpu")
    whole = cpu_executor.peak(device, torch.bfloat16, 1, "highest")
    assert whole > 2e11  # a vector unit of 512 bits reaches about 1.5e11 a core
    assert 2 < whole / cpu_executor.peak(device, torch.float32, 1, "high") < 4.5
    assert cpu_executor.peak(device, torch.float32, 1, "highest") is None
