"""The convolution kernels on Triton's CPU interpreter; test_triton_conv.py runs this file with TRITON_INTERPRET=1.

float32 and float16: the interpreter truncates bfloat16. Tiles are far smaller than those that serve, so that images of
a few pixels have whole tiles and ragged ones; what a tile's size does to a GPU is not for the interpreter to say.
"""

from __future__ import annotations

import conv_cases
import pytest
import torch
from conv_cases import HOOKS, PROBLEMS, case
from fastres.triton_kernels import conv_gather, conv_wgrad
from fastres.triton_kernels.conv_configs import ConvConfig

from fastres.backends import triton_conv

F32, F16 = torch.float32, torch.float16
KINDS = ("fprop", "dgrad", "wgrad")
#: Problems on which every set of hooks is tried by itself: ragged, whole channel blocks (descriptors serve), flattened,
#: strided with empty classes.
HOOKED = ("3x3", "3x3 whole blocks", "1x1", "1x1 stride 2")


@pytest.fixture(autouse=True)
def few_slabs(monkeypatch):
    """Images this small would make one slab; two or three show that slabs meet."""
    monkeypatch.setattr(conv_wgrad, "MIN_STEPS", 1)
    monkeypatch.setattr(conv_wgrad, "MAX_SLABS", 2)


def check(c, **options):
    truth, peer = conv_cases.expected(c), conv_cases.expected(c, c.dtype)
    for config in conv_cases.configs(c, **options):
        conv_cases.judge(c, config, conv_cases.run(c, config), truth, peer)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_problem_bare_and_with_everything(kind, name):
    check(case(kind, name, (), F32, seed=1))
    check(case(kind, name, HOOKS[kind][-1], F32, seed=2))


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("kind, hooks", [(kind, hooks) for kind in KINDS for hooks in HOOKS[kind][1:-1]])
def test_every_hook(kind, hooks, name):
    check(case(kind, name, hooks, F32, seed=3))


@pytest.mark.parametrize("name", ("3x3", "1x1", "3x3 stride 2 odd", "groups 2", "stem"))
@pytest.mark.parametrize("kind", KINDS)
def test_float16(kind, name):
    check(case(kind, name, HOOKS[kind][-1], F16, seed=4))
    hooks = {"fprop": ("bias", "stats"), "dgrad": ("act", "reduce", "y"), "wgrad": ()}[kind]
    check(case(kind, name, hooks, F16, seed=5))


@pytest.mark.parametrize("kind", KINDS)
def test_other_tiles(kind):
    """Whole channel blocks, several tiles of pixels."""
    check(case(kind, "3x3 whole blocks", HOOKS[kind][-1], F32, seed=6), all_tiles=True)
    check(case(kind, "3x3", (), F16, seed=7), all_tiles=True)


@pytest.mark.parametrize("name", ("3x3", "3x3 stride 2 odd", "1x1", "1x1 stride 2", "dilation 2", "groups 2", "stem"))
@pytest.mark.parametrize("kind", KINDS)
def test_integers_are_exact(kind, name):
    bare = {"fprop": ("bias",), "dgrad": ("act", "y"), "wgrad": ()}[kind]
    for hooks, dtype in ((bare, F16), (HOOKS[kind][-1], F32)):
        c = case(kind, name, hooks, dtype, "integers", seed=8)
        want = conv_cases.expected(c)
        for config in conv_cases.configs(c):
            conv_cases.same(c, config, conv_cases.run(c, config), want)


@pytest.mark.parametrize("name", ("3x3 no padding", "dilation 2", "stride 4, dilation 2"))
@pytest.mark.parametrize("kind", ("fprop", "dgrad"))
def test_one_tap_shifts_the_image(kind, name):
    """Weights that are the identity at one tap and zero elsewhere: bit for bit the input, moved."""
    c = case(kind, name, (), F16, seed=9)
    p = c.problem
    for tap in range(p.R * p.S):
        w = torch.zeros_like(c.args["w"])
        w[range(p.K), range(p.C), tap // p.S, tap % p.S] = 1
        c = conv_cases.with_args(c, w=conv_cases.placed(w))
        want = conv_cases.expected(c)
        assert all(t.any() for t in want.values())
        for config in conv_cases.configs(c):
            conv_cases.same(c, config, conv_cases.run(c, config), want)


@pytest.mark.parametrize("name", ("3x3 no padding", "3x3 stride 2 odd", "dilation 2", "1x1", "stem"))
def test_one_pixel_of_dy_copies_its_neighbourhood(name):
    """dy that is 1 at one pixel of one channel: dw holds the pixels of x that the taps see there, bit for bit."""
    c = case("wgrad", name, (), F16, seed=10)
    p = c.problem
    for n, k, row, column in ((0, 0, 0, 0), (p.N - 1, p.K - 1, p.P - 1, p.Q - 1), (0, 3, p.P // 2, p.Q // 2)):
        dy = torch.zeros_like(c.args["dy"])
        dy[n, k, row, column] = 1
        c = conv_cases.with_args(c, dy=conv_cases.placed(dy))
        want = conv_cases.expected(c)
        assert want["dw"][k].any()
        for config in conv_cases.configs(c):
            conv_cases.same(c, config, conv_cases.run(c, config), want)


@pytest.mark.parametrize("dtype", (F32, F16))
@pytest.mark.parametrize("name", ("3x3", "1x1", "stem"))
def test_statistics_of_a_large_mean(name, dtype):
    c = case("fprop", name, ("bias", "stats"), dtype, "huge_mean", seed=11)
    for config in conv_cases.configs(c):
        ours = conv_cases.run(c, config)
        assert ours["out"].double().mean() > 30 * ours["out"].double().std(), "the mean is not large"
        conv_cases.judge_part(c, config, ours)


def test_a_constant_channel_has_no_variance():
    c = case("fprop", "3x3", ("bias", "stats"), F32, seed=12)
    c = conv_cases.with_args(c, w=conv_cases.placed(torch.zeros_like(c.args["w"])), bias=c.args["bias"] + 1234.5)
    for config in conv_cases.configs(c):
        n, mean, m2 = conv_cases.run(c, config)["part"]
        # What a sum of up to 64 equal numbers may be off, over 64.
        rounding = 16 * torch.finfo(F32).eps * c.args["bias"].abs()
        assert ((mean - c.args["bias"]).abs() <= rounding).all() and (m2 <= n * rounding**2).all()


def test_padding_is_zero_after_the_prologue():
    """x far below zero under a shift far above: only a prologue on the padding could make anything of it."""
    c = case("fprop", "3x3", ("prologue",), F32, seed=13)
    stat = c.args["stat"]
    stat[0], stat[3], stat[4] = 0, 1, 3
    c = conv_cases.with_args(c, x=conv_cases.placed(torch.full_like(c.args["x"], -5)))
    for config in conv_cases.configs(c):
        assert not conv_cases.run(c, config)["out"].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_twice(kind, monkeypatch):
    monkeypatch.setattr(conv_wgrad, "MAX_SLABS", 3)
    for name in ("3x3", "1x1"):
        c = case(kind, name, HOOKS[kind][1], F32, seed=14)
        for config in conv_cases.configs(c):
            conv_cases.same(c, config, conv_cases.run(c, config), conv_cases.run(c, config))


@pytest.mark.parametrize("name", ("3x3", "3x3 stride 2 odd", "1x1 stride 2", "mixed axes", "stride 4, dilation 2"))
def test_pixels_advance_from_step_to_step(name, monkeypatch):
    """Steps far shorter than an image and steps over several, all in one slab."""
    monkeypatch.setattr(conv_wgrad, "MAX_SLABS", 1)
    c = case("wgrad", name, (), F32, "integers", seed=17)
    want = conv_cases.expected(c)
    for BM in (16, 32):
        config = ConvConfig("wgrad_gather", BM, 32, 32, 4, 2)
        conv_cases.same(c, config, conv_cases.run(c, config), want)


def test_slabs_by_shape_alone(monkeypatch):
    """One slab and several: the sum of an element only regroups; float16 and float32 dw round the same sum."""
    c = case("wgrad", "3x3", (), F16, seed=15)
    for config in conv_cases.configs(c):
        for slabs in (1, 3):
            monkeypatch.setattr(conv_wgrad, "MAX_SLABS", slabs)
            single = conv_cases.run(c, config)["dw"]
            double = conv_cases.run(c, config, dw_dtype=F32)
            conv_cases.judge(c, config, double)
            assert torch.equal(double["dw"].half(), single)


def test_the_split_is_bounded(monkeypatch):
    monkeypatch.undo()
    for steps in (1, 3, 4, 63, 1000, 100_000):
        for tiles, taps in ((1, 1), (9, 9), (64, 1), (600, 9)):
            slabs, per = conv_wgrad._split(steps, tiles, taps)
            assert 1 <= slabs <= conv_wgrad.MAX_SLABS and (slabs - 1) * per < steps <= slabs * per
            assert slabs == 1 or (slabs * tiles <= conv_wgrad.PROGRAMS and per >= conv_wgrad.MIN_STEPS)


@pytest.mark.parametrize("name", ("3x3", "3x3 stride 2 even", "mixed axes"))
@pytest.mark.parametrize("kind", KINDS)
def test_64_bit_offsets_give_the_same_bits(kind, name, monkeypatch):
    """The variant for 2**31 elements and more, on an image that fits this machine."""
    c = case(kind, name, HOOKS[kind][-1], F32, seed=16)
    config = conv_cases.configs(c)[0]
    narrow = conv_cases.run(c, config)
    for module in (conv_gather, conv_wgrad):
        monkeypatch.setattr(module, "WIDE_FROM", 0)
    conv_cases.same(c, config, conv_cases.run(c, config), narrow)


def _empty(kind: str):
    dtype, geometry = F32, ((1, 1), (1, 1), (1, 1), 1)

    def none(C):
        return torch.empty(0, C, 5, 5, dtype=dtype).to(memory_format=torch.channels_last)

    w = torch.full((24, 16, 3, 3), float("nan")).to(memory_format=torch.channels_last)
    return {"fprop": (none(16), w, geometry, none(24)), "dgrad": (none(24), w, geometry, none(16)),
            "wgrad": (none(24), none(16), geometry, w)}[kind]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_no_images(kind):
    """Nothing to write; the gradient of the weights is zero."""
    args = _empty(kind)
    config = ConvConfig("wgrad_gather" if kind == "wgrad" else "gather", 32, 16, 16, 4, 2)
    getattr(triton_conv.kernels(config), f"conv_{kind}")(*args, config=config)
    if kind == "wgrad":
        assert torch.equal(args[-1], torch.zeros_like(args[-1]))


def _meta(*shape):
    return torch.empty(shape, dtype=F16, device="meta")


def test_refusals_name_what_was_given():
    one, none, tile = (1, 1), (0, 0), ConvConfig("gather", 64, 16, 16, 4, 2)
    usual = (one, none, one, 1)
    with pytest.raises(ValueError, match=r"w: got a filter of 33x1, expected at most 32 taps an axis"):
        conv_gather.conv_fprop(_meta(1, 8, 40, 8), _meta(8, 8, 33, 1), usual, _meta(1, 8, 8, 8), config=tile)
    with pytest.raises(ValueError, match=r"x: got 1 x 65536 x 32768 pixels, expected fewer than 2\*\*31 - 64"):
        conv_gather.conv_fprop(_meta(1, 1, 65536, 32768), _meta(1, 1, 1, 1), usual, _meta(1, 1, 65536, 32768),
                               config=tile)  # fmt: skip
    with pytest.raises(ValueError, match=r"w: got 2147483648 elements"):
        conv_gather.conv_dgrad(_meta(1, 65536, 1, 1), _meta(65536, 32768, 1, 1), usual, _meta(1, 32768, 1, 1),
                               config=tile)  # fmt: skip
    wgrad, flat = ConvConfig("wgrad_patch", 32, 16, 16, 4, 2, (2, 4, 4)), ConvConfig("wgrad_patch", 32, 16, 16, 4, 2)
    dy, x, dw = _meta(1, 16, 8, 8), _meta(1, 16, 8, 8), _meta(16, 16, 3, 3)
    with pytest.raises(ValueError, match=r"geometry: got stride \(2, 2\), groups 1, expected stride 1, groups 1 for"):
        conv_wgrad.conv_wgrad(dy, x, ((2, 2), one, one, 1), dw, config=wgrad)
    with pytest.raises(ValueError, match=r"config: got flattened pixels .* for a filter of \(3, 3\) and padding"):
        conv_wgrad.conv_wgrad(dy, x, (one, one, one, 1), dw, config=flat)
    with pytest.raises(ValueError, match=r"dy: got 1 x 65536 x 32768 pixels"):
        conv_wgrad.conv_wgrad(_meta(1, 1, 65536, 32768), x, (one, one, one, 1), dw, config=wgrad)


@pytest.mark.parametrize("name", PROBLEMS)
def test_classes_cover_every_pixel_and_every_tap_once(name):
    """A dgrad's classes partition the pixels of x, and their taps are those of the transposed convolution."""
    p = PROBLEMS[name]
    for size, taps, out, stride, padding, dilation in zip(
        (p.H, p.W), (p.R, p.S), (p.P, p.Q), p.stride, p.padding, p.dilation, strict=True
    ):
        found = set()
        pixels = []
        for count, b, d, c, first, step, n in conv_gather._axis(size, taps, stride, padding, dilation):
            pixels += [i * stride + c for i in range(count)]
            for i in range(count):
                for t in range(n):
                    if 0 <= i + b + t * d < out:
                        found.add((i * stride + c, i + b + t * d, first + t * step))
        assert sorted(pixels) == list(range(size))
        want = {(o * stride - padding + r * dilation, o, r) for o in range(out) for r in range(taps)}
        assert found == {(h, o, r) for h, o, r in want if 0 <= h < size}


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_serve(kind):
    """No problem is without a pointer kernel; no candidate twice, none under the smallest tl.dot."""
    for p in PROBLEMS.values():
        for itemsize in (2, 4):
            found = triton_conv.configs().candidates(kind, p, (), itemsize, (9, 0))
            assert found and any(config.kernel.endswith("gather") for config in found)
            assert len(set(found)) == len(found)
            assert all(min(config.BM, config.BN, config.BK) >= 16 for config in found)


def test_the_interpreter_is_on():
    from fastres.backends import triton

    assert triton.interpreting()
