"""The CPU's own weight gradient: every instruction set against float64, any geometry, any number of threads."""

import pytest
import torch

from fastres import convolution
from fastres.backends import cpu, reference
from fastres.ops.params import out_size

pytestmark = pytest.mark.skipif(cpu._module is None, reason=f"fastres._cpu is not built: {cpu._missing}")
CL = torch.channels_last
# N, C, K, H, W, R, S, stride, padding, dilation: tails of both panels, empty borders, taps that miss the image.
SHAPES = [
    (2, 16, 6, 9, 11, 3, 3, (1, 1), (1, 1), (1, 1)),
    (1, 5, 7, 8, 8, 3, 3, (2, 2), (1, 1), (1, 1)),
    (3, 33, 50, 7, 9, 3, 3, (1, 1), (2, 2), (2, 2)),
    (2, 64, 20, 6, 5, 1, 1, (1, 1), (0, 0), (1, 1)),
    (2, 3, 64, 23, 21, 7, 7, (2, 2), (3, 3), (1, 1)),
    (2, 20, 13, 9, 9, 1, 1, (2, 2), (0, 0), (1, 1)),
    (2, 17, 19, 5, 6, 1, 5, (1, 3), (0, 4), (1, 1)),
]
ISAS = cpu.available_isas() if cpu._module is not None else []


def operands(N, C, K, H, W, R, S, stride, padding, dilation, values=torch.randn):
    P, Q = (out_size(*sizes) for sizes in zip((H, W), (R, S), stride, padding, dilation, strict=True))
    x, dy = values(N, C, H, W).to(memory_format=CL), values(N, K, P, Q).to(memory_format=CL)
    return dy, x, torch.full((K, C, R, S), float("nan")).to(memory_format=CL)


def truth(dy, x, dw, stride, padding, dilation):
    args = (dy.double(), x.double(), dw.double(), None, stride, padding, dilation, False, (0, 0), 1)
    return torch.ops.aten.convolution_backward(*args, [False, True, False])[1]


@pytest.fixture
def restore_isa():
    before = cpu.isa()
    yield
    cpu.set_isa(before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(restore_isa, isa, shape):
    cpu.set_isa(isa)
    dy, x, dw = operands(*shape)
    cpu.conv_wgrad(dy, x, *shape[7:], dw)
    expected = truth(dy, x, dw, *shape[7:])
    # One fp32 sum of M products: sqrt(M) roundings at the size of the partial sums.
    terms = dy.shape[0] * dy.shape[2] * dy.shape[3]
    limit = 4 * terms**0.5 * torch.finfo(torch.float32).eps * expected.abs().max()
    torch.testing.assert_close(dw.double(), expected, rtol=0, atol=limit.item())


@pytest.mark.parametrize("isa", ISAS)
def test_integers_are_exact_and_threads_do_not_matter(restore_isa, isa):
    cpu.set_isa(isa)
    shape = SHAPES[2]
    dy, x, dw = operands(*shape, values=lambda *s: torch.randint(-4, 5, s).float())
    cpu.conv_wgrad(dy, x, *shape[7:], dw)
    assert torch.equal(dw.double(), truth(dy, x, dw, *shape[7:]))
    dy, x, dw = operands(*shape)
    cpu.conv_wgrad(dy, x, *shape[7:], dw)
    again = torch.empty_like(dw)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        cpu.conv_wgrad(dy, x, *shape[7:], again)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(dw, again)


def test_the_engine_takes_it_where_it_wins(monkeypatch):
    calls = []
    monkeypatch.setattr(cpu, "wins_wgrad", lambda *operands: True)
    monkeypatch.setattr(cpu, "conv_wgrad", lambda *a: calls.append(a) or a[-1].zero_())
    dy, x, dw = operands(*SHAPES[0])
    g = ((1, 1), (1, 1), (1, 1), 1)
    assert convolution.wgrad(cpu, dy, x, dw, g, False)[0].eq(0).all() and len(calls) == 1
    convolution.wgrad(cpu, dy, x, dw, g, True)  # with a bias the library does both
    convolution.wgrad(reference, dy, x, dw, g, False)
    assert len(calls) == 1


def test_bad_input():
    dy, x, dw = operands(*SHAPES[0])
    geometry = SHAPES[0][7:]
    with pytest.raises(TypeError, match="x: got torch.float64"):
        cpu.conv_wgrad(dy, x.double(), *geometry, dw)
    with pytest.raises(ValueError, match="dy: got strides"):
        cpu.conv_wgrad(dy.contiguous(), x, *geometry, dw)
    with pytest.raises(ValueError, match="dw: got shape"):
        cpu.conv_wgrad(dy, x, *geometry, dw[:3])
    assert dw.isnan().all()
