"""The CPU's convolutions by products of pairs of bfloat16: the instruction where it runs, two products in its place
on the other instruction sets, against float64."""

import pytest
import torch
import torchvision
from test_cpu_conv import SHAPES as DENSE
from test_cpu_grouped import SHAPES as GROUPED
from test_cpu_winograd import STEMS
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

import fastres
from fastres.backends import cpu, cpu_conv, cpu_winograd
from fastres.inference import cpu_executor, cpu_weights
from fastres.inference.cpu_weights import DIRECT, PAIRS, Choice
from fastres.inference.plan import Conv, Segment, Stem

pytestmark = pytest.mark.skipif(cpu._module is None, reason=f"fastres._cpu is not built: {cpu._missing}")
CL = torch.channels_last
#: N, C, K, H, W, R, S, stride, padding, dilation, groups: of the tests of the same kernels on floats.
CASES = [(*shape, 1) for shape in DENSE] + [(N, C, C, *rest, groups) for N, C, groups, *rest in GROUPED]


@pytest.fixture
def isa(isa):
    if not cpu_conv.pairs_unit():
        pytest.skip(f"{isa}: this processor has no products of pairs of bfloat16 (AVX512-BF16)")
    return isa


def cases():
    for case in CASES:
        C, K, groups = case[1], case[2], case[-1]
        if cpu_conv.groups_serve((K, C // groups, *case[5:7]), groups, True):
            yield case


def operands(case, integers=False):
    """A float32 weight of bfloat16 values, so that float64 sees what the kernel does."""
    N, C, K, H, W, R, S, *geometry = case
    make = (lambda *s: torch.randint(-8, 9, s).float()) if integers else torch.randn
    x, w, bias = make(N, C, H, W).bfloat16().to(memory_format=CL), make(K, C // geometry[-1], R, S), make(K)
    w = w.bfloat16().float()
    residual = make(*F.conv2d(x.float(), w, None, *geometry).shape).bfloat16().to(memory_format=CL)
    return x, w, bias, residual, tuple(geometry)


def ours(x, w, bias, residual, g, relu=False, y=None):
    if y is None:
        y = torch.full(F.conv2d(x.float(), w, None, *g).shape, float("nan"), dtype=x.dtype).to(memory_format=CL)
    packed = cpu_conv.pack(w, g[3], pairs=True)
    return cpu_conv.fprop(x, w.to(x.dtype), g, bias, residual, relu, y, packed, pairs=True)


def truth(x, w, bias, residual, g, relu=False):
    y = F.conv2d(x.double(), w.double(), None if bias is None else bias.double(), *g)
    y = y if residual is None else y + residual.double()
    return y.relu() if relu else y


def test_x_in_place_or_laid_out(isa):
    """Of groups, as in test_cpu_grouped."""
    for case in cases():
        if case[-1] == 1:
            continue
        x, w, bias, residual, g = operands(case)
        assert torch.equal(ours(x, w, bias, None, g), ours(x, w, bias, torch.zeros_like(residual), g)), case


def test_every_width_of_a_group_is_among_the_cases():
    widths = {case[1] // case[-1] for case in cases() if case[-1] > 1}
    assert widths >= {2, 4, 8, 16, 32, 64} if cpu.isa() == "avx512" else widths >= {2, 4, 8, 32, 64}


def test_values(isa):
    for case in cases():
        x, w, bias, residual, g = operands(case)
        expected = truth(x, w, bias, residual, g)
        magnitude = F.conv2d(x.double().abs(), w.double().abs(), None, *g)
        limit = 4 * (w[0].numel() + 2) ** 0.5 * torch.finfo(torch.float32).eps * magnitude
        limit = limit + torch.finfo(torch.bfloat16).eps / 2 * expected.abs() + 1e-6
        assert ((ours(x, w, bias, residual, g).double() - expected).abs() <= limit).all(), case


def test_integers_are_exact_with_every_epilogue(isa):
    for case in cases():
        x, w, bias, residual, g = operands(case, integers=True)
        poison = [torch.full((1 << 16,), float("nan")) for _ in range(8)]  # borders must be written
        del poison
        for relu in (False, True):
            for b in (None, bias):
                for r in (None, residual):
                    expected = truth(x, w, b, r, g, relu).bfloat16()
                    assert torch.equal(ours(x, w, b, r, g, relu), expected), (case, relu)
        place = residual.clone()
        assert torch.equal(ours(x, w, None, place, g, False, place), truth(x, w, None, residual, g).bfloat16()), case


def test_both_of_a_pair_count_and_weights_are_rounded_to_nearest(isa):
    x = torch.zeros(1, 32, 4, 4).bfloat16().contiguous(memory_format=CL)
    w = torch.randn(32, 32, 1, 1)
    g = ((1, 1), (0, 0), (1, 1), 1)
    for c in range(32):
        x.zero_()[:, c] = 1
        expected = w[:, c].bfloat16()[None].expand(1, 32, 1, 1).expand(1, 32, 4, 4)
        assert torch.equal(ours(x, w, None, None, g), expected), c


def test_threads_do_not_matter(isa):
    threads = torch.get_num_threads()
    for case in cases():
        x, w, bias, residual, g = operands(case)
        results = []
        try:
            for n in (1, 2, 3, 7):
                torch.set_num_threads(n)
                results.append(ours(x, w, bias, residual, g))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(results[0], r) for r in results[1:]), case


def test_large_layers_in_strips(isa):
    """More rows than a strip, more panels than a group."""
    sizes = [
        (9, 64, 288, 30, 30, 3, 3, (1, 1), (1, 1), (1, 1), 1),
        (4, 512, 96, 29, 31, 1, 1, (1, 1), (0, 0), (1, 1), 1),
    ]
    for case in sizes if isa == "avx512" else sizes[1:]:
        x, w, bias, residual, g = operands(case, integers=True)
        assert torch.equal(ours(x, w, bias, residual, g, True), truth(x, w, bias, residual, g, True).bfloat16()), case


def test_a_nan_reaches_its_own_group_only(isa):
    for case in cases():
        N, C, K, H, W, *_, groups = case
        if groups == 1:
            continue
        x, w, *_, g = operands(case)
        x[:, 5] = float("nan")
        expected = truth(x, w, None, None, g).isnan()
        assert torch.equal(ours(x, w, None, None, g).isnan(), expected), case


def test_stem(isa, monkeypatch):
    monkeypatch.setattr(cpu_weights, "PAIRED", {cpu_conv.pairs_unit()})
    for K, R, rows, padding, *pool, H, W in STEMS:
        conv = Conv(torch.randn(K, 3, R, R).bfloat16().double(), torch.randn(K).double(), (rows, 2), (padding,) * 2)
        segment = cpu_executor.CpuSegment(Segment((Stem("stem", conv, *pool),)), torch.bfloat16, "exact")
        for N in (1, 3):
            x = torch.randn(N, 3, H, W).bfloat16().to(memory_format=CL)
            if N == 3:
                x[1, :, H // 2, W // 2] = float("nan")
            y = F.conv2d(x.double(), conv.weight, conv.bias, conv.stride, conv.padding).relu()
            expected, got = F.max_pool2d(y, *pool), segment.run(x)
            assert "pairs" in segment.kernels(tuple(x.shape))[0].kernel
            assert torch.equal(got.isnan(), expected.isnan()), (K, R, H, W)
            limit = 4 * (3 * R * R) ** 0.5 * torch.finfo(torch.float32).eps + torch.finfo(torch.bfloat16).eps / 2
            error = (got.double() - expected).nan_to_num().abs().max()
            assert error <= limit * expected.nan_to_num().abs().max(), f"{K} {R} {H} {W}: {error}"


@pytest.mark.parametrize("precision", ["highest", "exact"])
@pytest.mark.parametrize(
    ("block", "options"),
    [(Bottleneck, {}), (BasicBlock, {}), (Bottleneck, {"groups": 4, "width_per_group": 16})],
    ids=["bottleneck", "basic", "groups"],
)
def test_networks(isa, monkeypatch, block, options, precision):
    torch.manual_seed(0)
    model = torchvision.models.ResNet(block, [2, 1, 1, 1], num_classes=10, **options).eval()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 1.5)
    monkeypatch.setattr(cpu_weights, "PAIRED", {cpu_conv.pairs_unit()})
    # Pairs wherever they serve: in software they would win no contest.
    monkeypatch.setattr(
        cpu_executor.CpuSegment, "_measured", lambda self, shape, kinds: {p: Choice(min(k)) for p, k in kinds.items()}
    )
    x = torch.randn(2, 3, 49, 41)
    session = fastres.optimize(model, (x,), dtype=torch.bfloat16, precision=precision)
    report = session.report(measure=False)
    assert {row.executor for row in report.rows} == {"cpu"}, str(report)
    assert all(
        "pairs" in row.kernel and "winograd" not in row.kernel for row in report.rows if row.op != "global_avg_pool"
    )
    with torch.no_grad():
        expected = model.double()(x.bfloat16().double())
    assert (session(x).double() - expected).norm() / expected.norm() <= 10 * torch.finfo(torch.bfloat16).eps


def test_where_they_serve(monkeypatch):
    conv = Conv(torch.randn(64, 64, 3, 3).double(), torch.zeros(64).double(), (1, 1), (1, 1))
    packed = cpu_weights.Packed(conv)
    monkeypatch.setattr(cpu_weights.cpu_matrix, "unit", lambda: "")
    for unit, direct in (("", DIRECT), ("slow", DIRECT), ("model", DIRECT), ("full", PAIRS)):
        monkeypatch.setattr(cpu_conv, "pairs_unit", lambda unit=unit: unit)
        assert packed.kinds(torch.bfloat16, "highest") == (direct, *cpu_winograd.OUTS[1])
        assert packed.kinds(torch.bfloat16, "exact") == (direct,)
        for dtype in (torch.float32, torch.float16):
            assert packed.kinds(dtype, "exact") == (DIRECT,)
    assert packed.kinds(torch.float32, "highest") == (DIRECT, 2, 3, 4, 5), "no rough tile in float32"


def test_bad_input():
    x, w = torch.zeros(1, 32, 4, 4).bfloat16().to(memory_format=CL), torch.zeros(32, 32, 1, 1)
    g, narrow = ((1, 1), (0, 0), (1, 1), 1), w.bfloat16()
    packed, wide = cpu_conv.pack(w, pairs=True), x.float()
    for error, match, call in (
        (TypeError, "pack: w: got torch.bfloat16", lambda: cpu_conv.pack(narrow, pairs=True)),
        (ValueError, "pairs: got x of torch.float32", lambda: cpu_conv.fprop(wide, w, g, packed=packed, pairs=True)),
        (ValueError, "fprop: pairs: got x of torch.bfloat16", lambda: cpu_conv.fprop(x, narrow, g, pairs=True)),
        (ValueError, "packed: got 512 elements", lambda: cpu_conv.fprop(x, narrow, g, packed=packed)),
        (ValueError, "w: got shape .* with 32 groups", lambda: cpu_conv.pack(w[:, :1], 32, pairs=True)),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
