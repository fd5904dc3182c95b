"""Convolutions of small images: taps that meet nothing but padding are left out, and nothing else is."""

from __future__ import annotations

import itertools

import pytest
import torch
from session_cases import alternating, distance, narrow, pixels, truth
from torch.nn.functional import conv2d

import fastres
from fastres.backends import cpu, cpu_conv
from fastres.inference.cpu_executor import CpuSegment
from fastres.inference.cpu_weights import DIRECT, Packed
from fastres.inference.fitting import fit
from fastres.inference.plan import Conv

built = pytest.mark.skipif(cpu._module is None, reason=f"fastres._cpu is not built: {cpu._missing}")
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def cases():
    kernels, images = [(1, 1), (2, 2), (3, 3), (3, 1), (5, 3)], [(1, 1), (1, 4), (2, 2), (3, 1), (4, 5), (7, 2)]
    for kernel, image in itertools.product(kernels, images):
        for stride, padding, dilation in itertools.product(((1, 1), (2, 2), (3, 1)), (0, 1, 2), ((1, 1), (2, 3))):
            reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
            if all(i + 2 * padding >= r for i, r in zip(image, reach, strict=True)):
                yield kernel, image, stride, (padding, padding), dilation


def operands(kernel, image, stride, padding, dilation):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, *kernel, generator=generator, dtype=torch.float64)
    bias = torch.randn(3, generator=generator, dtype=torch.float64)
    return Conv(weight, bias, stride, padding, dilation), pixels(2, *image, channels=4).double()


def needed(conv: Conv, x) -> list[list[int]]:
    """The rows and columns of taps that some pixel of x meets: there the weight has a gradient."""
    weight = conv.weight.clone().requires_grad_()
    conv2d(torch.ones_like(x), weight, None, *conv.geometry).sum().backward()
    live = weight.grad[0, 0] != 0
    return [live.any(1).nonzero().flatten().tolist(), live.any(0).nonzero().flatten().tolist()]


def test_the_same_function():
    """And between the first and the last tap that meets a pixel no tap is lost; one outside is kept only where padding
    would not be the same on both sides."""
    fits, joins, minimal = 0, 0, 0
    for case in cases():
        conv, x = operands(*case)
        found = fit(conv.weight.shape, conv.geometry, x.shape[2:])
        if found is None:
            continue
        fits, joins = fits + 1, joins + found.joined
        fitted = found.conv(conv)
        nhwc = x.permute(0, 2, 3, 1)
        same_memory = nhwc.reshape(len(x), -1, 1, 1) if found.joined else x
        assert found.shape(tuple(x.shape)) == tuple(same_memory.shape)
        expected = conv2d(x, conv.weight, conv.bias, *conv.geometry)
        got = conv2d(same_memory, fitted.weight, fitted.bias, *fitted.geometry)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, msg=str(case))
        for span, live in zip((found.rows, found.columns), needed(conv, x), strict=True):
            assert not live or (span.first <= live[0] and live[-1] < span.first + span.taps), case
            minimal += bool(live) and (span.first, span.taps) == (live[0], live[-1] - live[0] + 1)
    assert fits >= 70 and joins >= 10 and minimal >= 1.9 * fits, (fits, joins, minimal)


@pytest.mark.parametrize(
    ("weight", "geometry", "image", "expected"),
    [
        ((8, 8, 3, 3), ((1, 1), (1, 1), (1, 1), 1), (1, 1), ((1, 1, 1, 0), (1, 1, 1, 0), False)),
        ((8, 8, 3, 3), ((2, 2), (1, 1), (1, 1), 1), (2, 2), ((1, 2, 1, 0), (1, 2, 1, 0), True)),
        ((8, 8, 3, 3), ((1, 1), (1, 1), (1, 1), 1), (1, 9), ((1, 1, 1, 0), (0, 3, 1, 1), False)),
        ((8, 8, 3, 3), ((1, 1), (36, 36), (36, 36), 1), (28, 28), ((1, 1, 1, 0), (1, 1, 1, 0), False)),
        ((8, 8, 7, 7), ((1, 1), (0, 0), (1, 1), 1), (7, 7), ((0, 7, 1, 0), (0, 7, 1, 0), True)),
        ((8, 8, 3, 3), ((1, 1), (1, 1), (1, 1), 1), (2, 2), None),
        ((8, 8, 3, 3), ((2, 2), (1, 1), (1, 1), 1), (4, 4), None),
        ((8, 8, 1, 1), ((1, 1), (0, 0), (1, 1), 1), (1, 1), None),
        ((8, 2, 3, 3), ((1, 1), (1, 1), (1, 1), 4), (1, 1), None),
    ],
    ids=str,
)
def test_what_is_left(weight, geometry, image, expected):
    found = fit(weight, geometry, image)
    assert found == expected, "atrous convolutions beyond the image are of one tap, a full-size kernel joins pixels"


@built
def test_the_same_bits(isa):
    """Direct sums add the products that are left in the same order."""
    torch.manual_seed(0)
    conv = Conv(torch.randn(48, 40, 3, 3), torch.randn(48), padding=(1, 1))
    packed = Packed(conv)
    for H, W in ((1, 1), (1, 9), (4, 1)):
        x = pixels(3, H, W, channels=40).contiguous(memory_format=torch.channels_last)
        used, shape = packed.fitted(tuple(x.shape))
        assert used is packed.fitted(tuple(x.shape))[0] and shape == tuple(x.shape)
        assert used.weight.shape[2:] == (min(H, 2) * 2 - 1, min(W, 2) * 2 - 1)
        whole, part = [
            cpu_conv.fprop(x, p.weight, p.conv.geometry, p.bias, packed=p.get(isa, DIRECT)) for p in (packed, used)
        ]
        assert torch.equal(whole, part), (H, W)


@built
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_networks_of_small_images(isa, kind, dtype, monkeypatch):
    """Whichever kernel was chosen for images of about that many elements, whether they are small or only narrow."""
    monkeypatch.setattr(cpu_conv, "wins", lambda kind, x, w, g: not cpu_conv.why_not(x, w, g))
    monkeypatch.setattr(CpuSegment, "_measured", alternating)
    model = narrow(kind, (16, 32, 32))
    session = fastres.optimize(model, pixels(2, 9, 9), dtype, executor="cpu")
    for size in ((1, 1, 1), (2, 8, 8), (9, 9, 9), (3, 4, 70), (2, 65, 3), (15, 16, 16), (1, 47, 33), (2, 8, 8)):
        x = pixels(*size)
        assert distance(session(x), truth(model, x)) <= LIMIT[dtype], size
    notes = str(session.report((2, 3, 8, 8), measure=False))
    assert "no taps on padding alone" in notes
    assert "no taps on padding alone" not in str(session.report((1, 3, 47, 33), measure=False))


@built
def test_a_measured_choice_and_its_file(tmp_path):
    """Kernels are measured with their weights fitted; a loaded session fits them again, to the same bits."""
    model, x, larger = narrow("basic", (32, 64, 64)), pixels(4, 8, 8), pixels(2, 47, 33)
    session = fastres.optimize(model, x, executor="cpu")
    session(larger)
    loaded = fastres.load(session.save(tmp_path / "small"))
    for input in (x, larger, x):
        assert torch.equal(session(input), loaded(input))
        assert distance(session(input), truth(model, input)) <= LIMIT[torch.float32]


@built
def test_only_the_weights_that_are_used_are_packed():
    conv = Conv(torch.randn(64, 64, 3, 3), torch.zeros(64), padding=(1, 1))
    packed = Packed(conv)
    used, _ = packed.fitted((1, 64, 1, 1))
    used.get(cpu.isa(), DIRECT)
    assert packed.everything() == [packed, used] and not packed.scattered(cpu.isa())
    held = used.bytes()
    packed.keep(cpu.isa(), {4}, torch.float32)  # Winograd's serves what is not fitted
    assert used.bytes() == held
    packed.keep(cpu.isa(), {-1}, torch.float32)
    assert used.bytes() < held
