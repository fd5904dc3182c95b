"""The forward convolution in CUDA C++, on the emulator: right, on every edge, what it moves, faults it would show."""

from __future__ import annotations

import ctypes
import os
import shutil

import conv_cases
import pytest
import torch
from conv_cases import case
from cuda_conv_cases import BF16, DTYPES, EVERYTHING, F16, FPROP_HOOKS, HOOKED, PROBLEMS, make, run
from emulated import CSRC, build_emulated

from fastres import tuning_check
from fastres.backends import cuda_conv
from fastres.backends.cuda_conv import TILES
from fastres.problem import ConvProblem, ConvRequest


@pytest.fixture(autouse=True)
def emulated(emulator):
    return emulator


# ---- right


@pytest.mark.parametrize("config", TILES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_integers_are_exact(emulated, name, config):
    """Bit for bit, with everything that can ride along; statistics of the very output."""
    number = list(PROBLEMS).index(name)
    emulated.set_seed(number)
    dtype = (BF16, F16)[(number + TILES.index(config)) % 2]
    for hooks in (EVERYTHING, ("stats",)):
        c = make(name, hooks, dtype, "integers", seed=1)
        ours = run(c, config)
        conv_cases.same(c, config, ours, conv_cases.expected(c))
        if "part" in ours:
            conv_cases.judge_part(c, config, ours)


@DTYPES
@pytest.mark.parametrize("hooks", FPROP_HOOKS, ids=str)
@pytest.mark.parametrize("name", HOOKED)
def test_every_hook(name, hooks, dtype):
    """Within the error budget against float64."""
    c = make(name, hooks, dtype, seed=2)
    truth, peer = conv_cases.expected(c), conv_cases.expected(c, dtype)
    request = ConvRequest("fprop", c.problem, str(dtype).removeprefix("torch."), tuple(sorted(hooks)), -1)
    found = cuda_conv.conv_candidates(request)
    for config in {found[0], found[-1]}:
        conv_cases.judge(c, config, run(c, config), truth, peer)


@pytest.mark.parametrize("config", TILES, ids=str)
def test_the_verification_itself(config):
    """What a GPU's tuning asks of each tile before it serves, more tiles than are left of ``part`` among it."""
    problem = ConvProblem(1400, 3, 3, 8, 16, 1, 1)
    for hooks in (("stats",), EVERYTHING):
        request = ConvRequest("fprop", problem, "bfloat16", hooks, -1)
        assert tuning_check.failure(request, cuda_conv, config) == ""


def test_many_tiles_are_merged():
    config = next(c for c in TILES if c.BM == 64)
    problem = ConvProblem(1, 2, 64 * 130, 8, 8, 1, 1)
    assert cuda_conv._tiles(problem, config) == 260 and cuda_conv.conv_parts("fprop", problem, config) == 87
    c = case("fprop", "wide", ("bias", "stats"), BF16, "huge_mean", 3, {"wide": problem})
    ours = run(c, config)
    conv_cases.judge_part(c, config, ours)
    assert (ours["part"][0] == 64 * 3).sum() == 86 * 8, "groups of three tiles, two in the last"


@DTYPES
@pytest.mark.parametrize("config", TILES, ids=str)
def test_statistics_of_a_large_mean(config, dtype):
    c = make("several tiles", ("bias", "stats"), dtype, "huge_mean", seed=11)
    ours = run(c, config)
    assert ours["out"].double().mean() > 30 * ours["out"].double().std(), "the mean is not large"
    conv_cases.judge_part(c, config, ours)


@pytest.mark.parametrize("config", TILES, ids=str)
def test_a_constant_channel_has_no_variance(config):
    c = make("several tiles", ("bias", "stats"), seed=12)
    bias = torch.linspace(-1300, 1300, c.problem.K).to(BF16).float()
    c = conv_cases.with_args(c, w=conv_cases.placed(torch.zeros_like(c.args["w"])), bias=bias)
    n, mean, m2 = run(c, config)["part"]
    rounding = 16 * torch.finfo(torch.float32).eps * bias.abs()
    assert ((mean - bias).abs() <= rounding).all() and (m2 <= n * rounding**2).all()


@pytest.mark.parametrize("name", ("3x3 no padding", "dilation 2", "stride 4, dilation 2"))
def test_one_tap_shifts_the_image(name):
    """Weights that are the identity at one tap and zero elsewhere: bit for bit the input, moved."""
    c = make(name, (), BF16, seed=9)
    p = c.problem
    for tap in range(p.R * p.S):
        w = torch.zeros_like(c.args["w"])
        w[range(p.K), range(p.C), tap // p.S, tap % p.S] = 1
        c = conv_cases.with_args(c, w=conv_cases.placed(w))
        want = conv_cases.expected(c)
        assert all(t.any() for t in want.values())
        config = TILES[tap % len(TILES)]
        conv_cases.same(c, config, run(c, config), want)


def test_nan_and_infinity():
    """They spread as far as their neighbourhood, and pass the ReLU."""
    c = make("several tiles", EVERYTHING, seed=4)
    for bad in (float("nan"), float("inf")):
        x = c.args["x"].clone()
        x[0, 7, 12, 4] = bad
        args = {**c.args, "x": conv_cases.placed(x), "residual": conv_cases.placed(c.args["residual"])}
        args["residual"][0, 3, 5, 6] = bad
        for config in TILES[:2]:
            out = torch.empty(c.shapes["out"], dtype=BF16).to(memory_format=torch.channels_last)
            cuda_conv.conv_fprop(**args, out=out, config=config)
            want = conv_cases.expected(conv_cases.with_args(c, **args))["out"]
            assert torch.equal(out.isnan(), want.isnan()) and torch.equal(out.isinf(), want.isinf())
            assert not out.isfinite().all() and out[0, 7:, :3].isfinite().all()


@pytest.mark.parametrize("config", TILES, ids=str)
def test_same_bits(emulated, config):
    """Whatever the order of blocks and threads."""
    c, first = make("several tiles", ("bias", "stats"), F16, seed=5), None
    for seed in (0, 1, 41):
        emulated.set_seed(seed)
        ours = run(c, config)
        first = ours if first is None else first
        assert all(torch.equal(ours[name], first[name]) for name in first)


# ---- what it moves


def _loaded(p: ConvProblem, BM: int, BN: int) -> int:
    """Bytes that tiles load of a 3x3 of stride 1: their pixels' taps but for those in the padding, all weights."""
    rows, columns = -(-p.N * p.P * p.Q // BM), -(-p.K // BN)
    taps = sum(0 <= i + r - 1 < p.H for i in range(p.P) for r in range(3))
    taps *= sum(0 <= i + s - 1 < p.W for i in range(p.Q) for s in range(3))
    return 2 * (columns * p.N * taps * p.C + rows * p.elements[1])


@pytest.mark.parametrize("config", TILES, ids=str)
def test_traffic(emulated, config):
    """No operand waits for a bank; every tile reads its patches and weights
    once, and the output is written once."""
    c = make("several tiles", (), seed=6)
    p = c.problem
    emulated.module.meter(True)
    run(c, config)
    counted = emulated.module.meter(False)
    assert counted["matrix_conflicts"] == counted["load_conflicts"] == counted["store_conflicts"] == 0
    assert counted["wavefronts"] > 0
    x, w, y = p.elements
    sector = 32  # what is counted once is whole sectors
    assert counted["stored"] == 2 * y and 2 * y <= counted["stored_once"] < 2 * y + 2 * sector
    assert counted["loaded"] == _loaded(p, config.BM, config.BN)
    assert 2 * (x + w) <= counted["loaded_once"] < 2 * (x + w) + 4 * sector


# ---- planted faults: each is found, whatever it does to the values


FAULTS = {
    "none": ("", ""),
    "barrier": ("            sync_block();\n            if (step", "            if (step"),
    "wait": ("copy_async_wait<kStages - 2>", "copy_async_wait<kStages - 1>"),
    "tap": ("(r_ * s_.S + t_) * s_.CI + c_", "(r_ * s_.S + (t_ + 1) % s_.S) * s_.CI + c_"),
    "border": ("x + t * d < size", "x + t * d <= size"),
    "swizzle": ("weight_unit(channel, matrix % 2)", "pixel_unit(channel, matrix % 2)"),
    "conflicts": ("unit ^ (kUnits == 8 ? row & 7", "unit ^ (kUnits == 8 ? row & 3"),
    "column order": ("row % 2 + matrix / 2 * 2", "row % 2 + matrix / 2 * 4"),
    "wrap": ("stage = stage + 1 == kStages ? 0", "stage = stage + 2 == kStages ? 0"),
    "channels": ("const bool there = c_ < left_;", "const bool there = true;"),
    "last pixels": ("inside_[i] = m < s.M ? bits : 0u;", "inside_[i] = bits;"),
    "rows of weights": ("there && i * Tile::kRowsAtOnce < rows_left_", "there"),
    "store": ("if (there && row < rows) {", "if (there) {"),
    "moments' barrier": ("        sync_block();\n        const int k", "        const int k"),
    "moments' rows": ("sum += conv_row(i, h, lane) < rows ?", "sum += true ?"),
}  # fmt: skip
CAUGHT_AS = {"barrier": "race", "wait": "race", "wrap": "", "moments' barrier": "race"}
#: In every run; the others are caught too, at the price of a compilation each.
COMMON = ("none", "barrier", "tap", "conflicts")


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(fault, tmp_path):
    if fault not in COMMON and not os.environ.get("FASTRES_FULL"):
        pytest.skip("set FASTRES_FULL=1")
    sound, faulty = FAULTS[fault]
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc, ignore=shutil.ignore_patterns("cpu"))
    source = csrc / "cuda" / "conv_fprop.cuh"
    text = source.read_text()
    assert not sound or text.count(sound) == 1, f"{text.count(sound)} places to plant it"
    source.write_text(text.replace(sound, faulty) if sound else text)
    library = build_emulated(csrc / "emulator" / "selftest_conv.cu", tmp_path / "conv.so", csrc=csrc)
    p = ConvProblem(1, 9, 8, 72, 136, 3, 3, padding=(1, 1))
    c = case("fprop", "fault", ("bias", "stats"), BF16, "integers", 0, {"fault": p})
    beside = 64 * p.K  # a fault may write a whole tile beside the output
    whole = torch.full((2 * beside + p.elements[2],), float("nan"), dtype=BF16)
    out = whole[beside:-beside].view(p.N, p.P, p.Q, p.K).permute(0, 3, 1, 2)
    part = torch.full((3, 2, p.K), float("nan"))
    message, counts = ctypes.create_string_buffer(1024), (ctypes.c_int64 * 2)()
    x, w, *others = (ctypes.c_void_p(t.data_ptr()) for t in (c.args["x"], c.args["w"], c.args["bias"], part, out))
    size = ctypes.c_size_t(len(message))
    status = library.selftest(
        x, p.N, p.H, p.W, p.C, w, p.K, *others, ctypes.c_int64(3), message, size, counts
    )  # fmt: skip
    error = message.value.decode()
    assert (status == 0) == (error == "")
    seen = [name for name, wrong in (
        ("values", not torch.equal(out, conv_cases.expected(c)["out"].to(BF16))),
        ("written beside", not (whole[:beside].isnan().all() and whole[-beside:].isnan().all())),
        ("conflicts", counts[0] != 0),
        ("read beside", counts[1] != _loaded(p, 64, 128)),
        ("part", _part_is_wrong(c, part, out)),
    ) if wrong]  # fmt: skip
    if fault == "none":
        assert error == "" and seen == []
    else:
        assert error or seen
        assert CAUGHT_AS.get(fault, "") in error
        assert fault != "conflicts" or seen == ["conflicts"]


def _part_is_wrong(c, part, out) -> bool:
    try:
        conv_cases.judge_part(c, "selftest", {"part": part, "out": out})
    except AssertionError:
        return True
    return False
