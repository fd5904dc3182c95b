"""The CPU's own convolutions: every instruction set against float64, any geometry, any number of threads."""

import os
import subprocess
import sys

import pytest
import torch

import fastres
from fastres import convolution
from fastres.backends import cpu, cpu_conv
from fastres.problem import problem_of

pytestmark = pytest.mark.skipif(cpu._module is None, reason=f"fastres._cpu is not built: {cpu._missing}")
CL = torch.channels_last
# N, C, K, H, W, R, S, stride, padding, dilation: tails of every panel and tile, rows of 1 to 15 pixels, pairs of rows,
# empty borders, taps that miss the image, residues of a stride that no tap reaches, taps that reach over much of it.
SHAPES = [
    (2, 16, 6, 9, 11, 3, 3, (1, 1), (1, 1), (1, 1)),
    (1, 5, 7, 8, 8, 3, 3, (2, 2), (1, 1), (1, 1)),
    (3, 33, 50, 7, 9, 3, 3, (1, 1), (2, 2), (2, 2)),
    (2, 64, 20, 6, 5, 1, 1, (1, 1), (0, 0), (1, 1)),
    (2, 3, 64, 23, 21, 7, 7, (2, 2), (3, 3), (1, 1)),
    (2, 20, 13, 9, 9, 1, 1, (2, 2), (0, 0), (1, 1)),
    (2, 17, 19, 5, 6, 1, 5, (1, 3), (0, 4), (1, 1)),
    (3, 18, 33, 7, 7, 3, 3, (1, 1), (1, 1), (1, 1)),
    (1, 32, 64, 15, 29, 3, 3, (1, 1), (1, 1), (1, 1)),
    (2, 4, 5, 1, 1, 1, 1, (1, 1), (0, 0), (1, 1)),
    (2, 8, 9, 6, 6, 2, 2, (3, 3), (0, 0), (1, 1)),
    (1, 24, 40, 5, 7, 1, 1, (1, 1), (1, 2), (1, 1)),
    (5, 40, 300, 3, 2, 3, 3, (1, 1), (1, 1), (1, 1)),
    (2, 20, 37, 33, 31, 3, 3, (1, 1), (12, 24), (12, 24)),
    (2, 1100, 33, 9, 32, 3, 3, (1, 1), (6, 24), (6, 24)),
    (3, 40, 70, 5, 4, 3, 3, (1, 1), (4, 3), (4, 3)),
    (1, 300, 40, 21, 17, 3, 2, (2, 1), (7, 0), (7, 9)),
]
KINDS = ("fprop", "dgrad", "wgrad")
ISAS = cpu.available_isas() if cpu._module is not None else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(dtype):
    return lambda *s: torch.randn(s).to(dtype)


def integers(dtype):
    return lambda *s: torch.randint(-3, 4, s).to(dtype)


def operands(shape, values, contiguous=CL):
    N, C, K, H, W, R, S, *g = shape
    p = problem_of((N, C, H, W), (K, C, R, S), (*g, 1))
    x, dy = values(N, C, H, W).to(memory_format=CL), values(N, K, p.P, p.Q).to(memory_format=CL)
    return x, values(K, C, R, S).to(memory_format=contiguous), dy, (*g, 1)


def ours(kind, x, w, dy, g):
    if kind == "fprop":
        return cpu_conv.fprop(x, w, g, y=torch.full_like(dy, float("nan")))
    return cpu_conv.dgrad(dy, x.shape, w, g) if kind == "dgrad" else cpu_conv.wgrad(dy, x, w, g)


def truth(kind, x, w, dy, g):
    x, w, dy = x.double(), w.double(), dy.double()
    if kind == "fprop":
        return torch.ops.aten.convolution(x, w, None, *g[:3], False, (0, 0), 1)
    which = [kind == "dgrad", kind == "wgrad", False]
    return torch.ops.aten.convolution_backward(dy, x, w, None, *g[:3], False, (0, 0), 1, which)[0 if which[0] else 1]


@pytest.fixture
def restore_isa():
    before = cpu.isa()
    yield
    cpu.set_isa(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", ISAS)
def test_values(restore_isa, isa, kind):
    cpu.set_isa(isa)
    for shape in SHAPES:
        for dtype in DTYPES:
            case = operands(shape, normal(dtype))
            expected = truth(kind, *case)
            got = ours(kind, *case)
            # One fp32 sum of the terms, and one rounding to the dtype of the result (float32 for a weight gradient).
            p = problem_of(case[0].shape, case[1].shape, case[3])
            terms = {"fprop": p.C * p.R * p.S, "dgrad": p.K * p.R * p.S, "wgrad": p.N * p.P * p.Q}[kind]
            limit = 4 * terms**0.5 * torch.finfo(torch.float32).eps + torch.finfo(got.dtype).eps / 2
            error = (got.double() - expected).abs().max()
            assert error <= limit * expected.abs().max(), f"{shape} {dtype}: {error}"


@pytest.mark.parametrize("isa", ISAS)
def test_taps_on_padding_are_left_out(restore_isa, isa):
    """What a tap of NaN spoils is what it meets: elsewhere it is no product with zero."""
    cpu.set_isa(isa)
    for H, W, rows, columns in ((33, 31, 12, 24), (9, 32, 6, 24), (16, 48, 1, 40)):
        x, w = torch.randn(2, 20, H, W).to(memory_format=CL), torch.randn(37, 20, 3, 3).to(memory_format=CL)
        w[:, :, 0, 2] = float("nan")  # reads upwards and to the right
        got = cpu_conv.fprop(x, w, ((1, 1), (rows, columns), (rows, columns), 1))
        meets = torch.zeros_like(got, dtype=torch.bool)
        meets[:, :, rows:, : W - columns] = True
        assert torch.equal(got.isnan(), meets), (H, W)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", ISAS)
def test_integers_are_exact_and_threads_do_not_matter(restore_isa, isa, kind):
    cpu.set_isa(isa)
    threads = torch.get_num_threads()
    for shape in SHAPES:
        case = operands(shape, integers(torch.float32))
        assert torch.equal(ours(kind, *case).double(), truth(kind, *case)), shape
        case = operands(shape, normal(torch.float32))
        results = []
        try:
            for n in (1, 2, 3, 7):
                torch.set_num_threads(n)
                results.append(ours(kind, *case))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(results[0], r) for r in results[1:]), shape


@pytest.mark.parametrize("isa", ISAS)
def test_epilogue_and_weights_in_any_layout(restore_isa, isa):
    cpu.set_isa(isa)
    for shape in SHAPES:
        x, w, dy, g = operands(shape, integers(torch.float32), torch.contiguous_format)
        bias = torch.randint(-9, 9, (w.shape[0],)).float()
        for relu in (False, True):
            for residual in (None, dy):
                got = cpu_conv.fprop(x, w, g, bias, residual, relu)
                expected = truth("fprop", x, w, dy, g) + bias[:, None, None] + (0 if residual is None else residual)
                assert torch.equal(got.double(), expected.relu() if relu else expected), (shape, relu)
                again = cpu_conv.fprop(x, w, g, bias, residual, relu, packed=cpu_conv.pack(w))
                assert torch.equal(again, got)
        assert torch.equal(cpu_conv.dgrad(dy, x.shape, w, g).double(), truth("dgrad", x, w, dy, g))


def test_a_border_multiplies_zero_and_not_what_lay_there(restore_isa):
    """Strips are laid out over memory that holds NaN: a border left unwritten would show."""
    for isa in ISAS:
        cpu.set_isa(isa)
        for shape in SHAPES[:4]:
            case = operands(shape, integers(torch.float32))
            poison = [torch.full((1 << 20,), float("nan")) for _ in range(8)]
            del poison
            for kind in KINDS:
                assert torch.equal(ours(kind, *case).double(), truth(kind, *case)), (isa, kind, shape)


def test_large_layers_in_strips_and_slabs(restore_isa):
    """More rows than a strip, more panels than a group, more images than a slab: on the best instruction set."""
    shapes = [
        (9, 64, 288, 30, 30, 3, 3, (1, 1), (1, 1), (1, 1)),
        (4, 512, 96, 29, 31, 1, 1, (1, 1), (0, 0), (1, 1)),
        (6, 96, 512, 28, 28, 3, 3, (2, 2), (1, 1), (1, 1)),
    ]
    for shape in shapes:
        case = operands(shape, integers(torch.float32))
        for kind in KINDS:
            assert torch.equal(ours(kind, *case).double(), truth(kind, *case)), (kind, shape)


def test_convolution_takes_ours_where_it_wins(monkeypatch):
    x, w, dy, g = operands(SHAPES[0], integers(torch.float32))
    calls = []
    for kind in KINDS:
        plain = getattr(cpu_conv, kind)
        monkeypatch.setattr(cpu_conv, kind, lambda *a, _kind=kind, _plain=plain: calls.append(_kind) or _plain(*a))
    for wins in (True, False):
        monkeypatch.setattr(cpu_conv, "wins", lambda *a, _wins=wins: _wins)
        assert torch.equal(convolution.fprop(x, w, None, g).double(), truth("fprop", x, w, dy, g))
        assert torch.equal(convolution.dgrad(dy, x, w, g).double(), truth("dgrad", x, w, dy, g))
        assert torch.equal(convolution.wgrad(dy, x, w, g, False)[0].double(), truth("wgrad", x, w, dy, g))
        assert calls == (list(KINDS))
    monkeypatch.setattr(cpu_conv, "wins", lambda *a: True)
    convolution.wgrad(dy, x, w, g, True)  # with a bias the library does both
    with fastres.backend("reference"):
        convolution.fprop(x, w, None, g)
    convolution.dgrad(dy.contiguous(), x, w, g)
    assert calls == list(KINDS)


def test_where_they_win():
    x = torch.empty(8, 64, 14, 14).to(memory_format=CL)
    w = torch.empty(64, 64, 3, 3)
    g = ((1, 1), (1, 1), (1, 1), 1)
    assert not cpu_conv.wins("fprop", x.double(), w.double(), g)
    assert not cpu_conv.wins("fprop", x, torch.empty(64, 32, 3, 3), (*g[:3], 2))
    assert not cpu_conv.wins("wgrad", x[:, :3], w[:, :3], g)
    assert "64 groups" in cpu_conv.why_not(x, w[:, :1], (*g[:3], 64))[0]
    assert cpu_conv.narrow_ratio(torch.bfloat16) > 0
    if cpu.isa() == "avx512":
        assert all(cpu_conv.wins(kind, x, w, g) for kind in KINDS)


def test_bad_input():
    x, w, dy, g = operands(SHAPES[0], normal(torch.float32))
    wide = torch.zeros(2, 16, 12, 12)
    cases = [
        (TypeError, "w: got torch.float32 for torch.float64", lambda: cpu_conv.fprop(x.double(), w, g)),
        (ValueError, "x: got strides", lambda: cpu_conv.fprop(x.contiguous(), w, g)),
        (ValueError, "w: got shape", lambda: cpu_conv.fprop(x, w[:, :3], g)),
        (ValueError, "y: got shape", lambda: cpu_conv.fprop(x, w, g, y=dy[:1])),
        (ValueError, "bias: got", lambda: cpu_conv.fprop(x, w, g, bias=torch.zeros(5))),
        (ValueError, "packed: got 7 elements", lambda: cpu_conv.fprop(x, w, g, packed=torch.zeros(7))),
        (ValueError, "residual: got shape", lambda: cpu_conv.fprop(x, w, g, residual=dy[:, :2])),
        (ValueError, "dy: got shape", lambda: cpu_conv.dgrad(dy[:1], x.shape, w, g)),
        (ValueError, "dy: got strides", lambda: cpu_conv.wgrad(dy.contiguous(), x, w, g)),
        (ValueError, "x: got 1 x 1, smaller", lambda: cpu_conv.fprop(x[..., :1, :1], w, (g[0], (0, 0), g[2], 1))),
        (ValueError, "taps, expected at most", lambda: cpu_conv.fprop(x, wide, (g[0], (9, 9), g[2], 1))),
    ]  # fmt: skip
    for error, match, call in cases:
        with pytest.raises(error, match=match):
            call()


def test_the_pool_keeps_memory_and_gives_it_back():
    cpu.release_memory()
    before = cpu.memory_info()["in_use"]
    t = cpu.empty((4, 64, 56, 56), torch.float32)
    assert t.is_contiguous(memory_format=CL) and t._base is None and t.stride() == (56 * 56 * 64, 1, 56 * 64, 64)
    address = t.data_ptr()
    assert address % 4096 == 0 and cpu.memory_info()["in_use"] - before >= t.nbytes
    view = t[1:]
    del t
    assert cpu.memory_info()["in_use"] > before  # a view keeps it
    view.fill_(3)
    del view
    assert cpu.memory_info()["in_use"] == before
    again = cpu.empty((4, 64, 56, 56), torch.float32)
    assert again.data_ptr() == address
    rest = [cpu.empty((4, 64, 56, 56), torch.float32) for _ in range(3)]
    spans = sorted((r.data_ptr(), r.data_ptr() + r.nbytes) for r in (again, *rest))
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
    del rest[1], again
    assert cpu.empty((3, 64, 56, 56), torch.float32).data_ptr() == address  # the lowest gap that is large enough
    rest.clear()
    cpu.release_memory()
    info = cpu.memory_info()
    assert info == {"in_use": before, "peak": before}


def test_outputs_from_the_pool_are_ordinary_tensors():
    block = fastres.fuse(torch.nn.Sequential(torch.nn.Identity(), *_residual_block()))
    x = torch.randn(2, 64, 48, 48).to(memory_format=CL).requires_grad_()
    out = block(x)
    out.add_(1).relu_()  # in place behind an autograd.Function
    out.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    import pickle

    y = out.detach()
    assert torch.equal(pickle.loads(pickle.dumps(y)), y) and torch.equal(y.clone(), y)


def _residual_block():
    from torchvision.models.resnet import BasicBlock

    return [BasicBlock(64, 64)]


def test_a_sanitizer_sees_a_read_beyond_a_buffer():
    """Under `make sanitize-cpu`: a kernel that is told of more pixels than there are ends the process."""
    if "asan" not in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer is not loaded (make sanitize-cpu)")
    code = (
        "import torch\nfrom fastres import _cpu\n"
        "x, w, y = torch.zeros(4 * 4 * 32), torch.zeros(32 * 32), torch.zeros(9 * 4 * 32)\n"
        "sizes = (1, 9, 4, 32, 32, 9, 4, 1, 1, 1, 1, 0, 0, 1, 1, 1)\n"
        "_cpu.conv_fprop(0, x.data_ptr(), w.data_ptr(), 32, 1, 1, 0, False, sizes, 0, 0, 0, y.data_ptr(), 1)\n"
        "print('survived')\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "survived" not in done.stdout
    assert "ERROR: AddressSanitizer: heap-" in done.stderr and "conv_direct.cpp" in done.stderr
