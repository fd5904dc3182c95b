"""Grouped convolutions on the CPU: every instruction set against float64, any geometry, any number of threads."""

import pytest
import torch
from torch.nn import functional as F

from fastres.backends import cpu, cpu_conv

pytestmark = pytest.mark.skipif(cpu._module is None, reason=f"fastres._cpu is not built: {cpu._missing}")
CL = torch.channels_last
# N, C = K, groups, H, W, R, S, stride, padding, dilation. Groups of 1, 2, 4, 8 and 16 channels in a vector, of a panel
# and of several; rows of one to several tiles and buffers; three taps at strides of 1 and 2, other taps and strides;
# borders wider than the taps, taps that miss the image, rows that no tap reads; tiles that read x where it lies, of one
# row and two, that come out even and that do not.
SHAPES = [
    (2, 128, 32, 9, 8, 3, 3, (1, 1), (1, 1), (1, 1)),
    (1, 64, 16, 5, 61, 3, 3, (1, 1), (1, 1), (1, 1)),
    (3, 32, 4, 7, 45, 3, 3, (2, 2), (1, 1), (1, 1)),
    (2, 64, 8, 7, 7, 3, 3, (2, 2), (1, 1), (1, 1)),
    (1, 64, 4, 15, 29, 3, 3, (1, 1), (1, 1), (1, 1)),
    (2, 32, 2, 11, 33, 3, 3, (2, 2), (0, 1), (1, 1)),
    (2, 64, 64, 6, 17, 3, 3, (1, 1), (1, 1), (1, 1)),
    (1, 32, 16, 9, 10, 3, 3, (2, 1), (1, 1), (1, 1)),
    (2, 96, 6, 5, 6, 3, 3, (1, 1), (1, 1), (1, 1)),
    (1, 64, 16, 9, 11, 3, 3, (1, 1), (2, 2), (2, 2)),
    (2, 128, 2, 9, 30, 3, 3, (1, 1), (7, 20), (7, 20)),
    (1, 64, 8, 13, 9, 3, 3, (2, 3), (1, 3), (2, 1)),
    (2, 64, 16, 6, 7, 1, 1, (1, 1), (0, 0), (1, 1)),
    (1, 32, 8, 10, 9, 2, 5, (4, 3), (0, 4), (1, 1)),
    (3, 32, 8, 1, 1, 3, 3, (1, 1), (1, 1), (1, 1)),
    (1, 32, 4, 2, 3, 7, 7, (1, 1), (3, 3), (1, 1)),
    (2, 64, 2, 6, 7, 1, 1, (1, 1), (0, 0), (1, 1)),
    (1, 256, 4, 7, 5, 3, 3, (1, 1), (1, 1), (1, 1)),
    (9, 64, 2, 3, 7, 3, 3, (2, 2), (1, 1), (1, 1)),
    (2, 64, 16, 14, 14, 3, 3, (1, 1), (1, 1), (1, 1)),
    (2, 64, 8, 15, 15, 3, 3, (2, 2), (1, 1), (1, 1)),
    (1, 64, 4, 1, 4, 3, 3, (1, 1), (1, 1), (1, 1)),
    (2, 32, 32, 6, 10, 3, 3, (1, 1), (0, 0), (1, 1)),
    (1, 64, 32, 8, 16, 3, 3, (2, 2), (1, 1), (1, 1)),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def operands(shape, dtype=torch.float32, integers=False):
    N, C, groups, H, W, R, S, *g = shape
    make = (lambda *s: torch.randint(-3, 4, s)) if integers else torch.randn
    x = make(N, C, H, W).to(dtype).to(memory_format=CL)
    w = make(C, C // groups, R, S).to(dtype)
    residual = make(*F.conv2d(x.float(), w.float(), None, *g, groups).shape).to(dtype).to(memory_format=CL)
    return x, w, (*g, groups), make(C).float(), residual


def ours(x, w, g, bias=None, residual=None, relu=False):
    y = torch.full(F.conv2d(x.float(), w.float(), None, *g).shape, float("nan"), dtype=x.dtype).to(memory_format=CL)
    return cpu_conv.fprop(x, w, g, bias, residual, relu, y, cpu_conv.pack(w, g[3]))


def truth(x, w, g, bias=None, residual=None, relu=False):
    y = F.conv2d(x.double(), w.double(), None if bias is None else bias.double(), *g)
    y = y if residual is None else y + residual.double()
    return y.relu() if relu else y


def test_values(isa):
    for shape in SHAPES:
        for dtype in DTYPES:
            x, w, g, bias, residual = operands(shape, dtype)
            expected = truth(x, w, g, bias, residual)
            got = ours(x, w, g, bias, residual)
            limit = 4 * (w[0].numel() + 2) ** 0.5 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 2
            error = (got.double() - expected).abs().max()
            assert error <= limit * expected.abs().max(), f"{shape} {dtype}: {error}"


def test_integers_are_exact_with_every_epilogue(isa):
    for shape in SHAPES:
        x, w, g, bias, residual = operands(shape, integers=True)
        poison = [torch.full((1 << 16,), float("nan")) for _ in range(8)]  # the buffer's border must be written
        del poison
        for relu in (False, True):
            for b in (None, bias):
                for r in (None, residual):
                    got = ours(x, w.to(memory_format=CL) if relu else w, g, b, r, relu)
                    assert torch.equal(got.double(), truth(x, w, g, b, r, relu)), (shape, relu, b is None, r is None)
        y = residual.clone(memory_format=torch.preserve_format)
        cpu_conv.fprop(x, w, g, None, y, False, y, cpu_conv.pack(w, g[3]))  # the residual's place is y's
        assert torch.equal(y.double(), truth(x, w, g, None, residual)), shape


def test_x_in_place_or_laid_out(isa):
    """Two ways, the same sums: x is laid out where something is added to y."""
    for shape in SHAPES:
        x, w, g, bias, residual = operands(shape)
        assert torch.equal(ours(x, w, g, bias), ours(x, w, g, bias, torch.zeros_like(residual))), shape


def test_threads_do_not_matter(isa):
    threads = torch.get_num_threads()
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            x, w, g, bias, _ = operands(shape, dtype)
            results = []
            try:
                for n in range(1, 8):
                    torch.set_num_threads(n)
                    results.append(ours(x, w, g, bias))
            finally:
                torch.set_num_threads(threads)
            assert all(torch.equal(results[0], r) for r in results[1:]), (shape, dtype)


def test_layers_of_resnext_in_bands():
    """More rows than a band, on the best instruction set."""
    for C, groups, size, stride in ((128, 32, 56, 1), (256, 32, 56, 2), (512, 32, 28, 2)):
        x, w, g, bias, _ = operands((3, C, groups, size, size, 3, 3, (stride, stride), (1, 1), (1, 1)), integers=True)
        assert torch.equal(ours(x, w, g, bias, relu=True).double(), truth(x, w, g, bias, relu=True))


def test_a_nan_reaches_its_own_group_only(isa):
    """No operand of one group enters the sums of another, not even multiplied by zero."""
    for C, groups in ((64, 16), (64, 8), (64, 4), (64, 64), (64, 32), (64, 2)):
        x, w, g, *_ = operands((1, C, groups, 5, 6, 3, 3, (1, 1), (1, 1), (1, 1)))
        x[:, 5] = float("nan")
        touched = ours(x, w, g).isnan().any(dim=3).any(dim=2)[0]
        width = C // groups
        assert touched.nonzero().flatten().tolist() == list(range(5 // width * width, (5 // width + 1) * width))


def test_groups_that_are_not_served_say_so():
    x, w = torch.empty(1, 60, 8, 8), torch.empty(60, 10, 3, 3)
    g = ((1, 1), (1, 1), (1, 1), 6)
    assert "6 groups of 10 channels" in cpu_conv.why_not(x, w, g, grouped=True)[0]
    with pytest.raises(ValueError, match="6 groups"):
        cpu_conv.pack(w, 6)
    w = torch.empty(64, 8, 3, 3)
    assert cpu_conv.why_not(torch.empty(1, 64, 8, 8), w, (*g[:3], 8), grouped=True) == []
    assert "8 groups of 8 channels" in cpu_conv.why_not(torch.empty(1, 64, 8, 8), w, (*g[:3], 8))[0]
    with pytest.raises(ValueError, match="8 groups, expected .* of one group"):
        cpu_conv.fprop(torch.empty(1, 64, 8, 8).contiguous(memory_format=CL), w, (*g[:3], 8))
