"""The forward convolution in CUDA C++, on the emulator: right, on every edge, what it moves, faults it would show."""

from __future__ import annotations

import copy
import ctypes
import os
import shutil
import types
from dataclasses import replace

import conv_cases
import pytest
import torch
from conv_cases import case
from emulated import CSRC, build_emulated
from torch import nn

import fastres
from fastres import dispatch, riding, testing, tuning, tuning_check, tuning_trial
from fastres import nn as fnn
from fastres.backends import cuda_conv
from fastres.backends.cuda_conv import TILES
from fastres.backends.one_pass import Chip
from fastres.problem import HOOKS, ConvProblem, ConvRequest

BF16, F16 = torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
KERNELS = types.SimpleNamespace(parts=cuda_conv.conv_parts, conv_fprop=cuda_conv.conv_fprop)

#: What every backend is tried on, as far as the channels go in eights, and what trips this kernel.
PROBLEMS = {name: p for name, p in conv_cases.PROBLEMS.items() if not (p.C % (8 * p.groups) or p.K % (8 * p.groups))}
PROBLEMS |= {
    # More steps than stages, tiles of pixels and channels in a row, each ragged; channels that end within a step.
    "several tiles": ConvProblem(1, 13, 11, 40, 136, 3, 3, padding=(1, 1)),
    "long": ConvProblem(3, 13, 15, 16, 72, 1, 1),
    "deep 1x1": ConvProblem(1, 9, 15, 264, 64, 1, 1),
    "groups 2 ragged": ConvProblem(1, 9, 8, 48, 80, 3, 3, padding=(1, 1), groups=2),
    "groups 3, all mixed": ConvProblem(2, 8, 9, 24, 72, 3, 2, (2, 1), (1, 2), (1, 2), groups=3),
    "7x7 stride 2": ConvProblem(1, 13, 12, 8, 16, 7, 7, (2, 2), (3, 3)),
    "1x7": ConvProblem(1, 5, 9, 16, 24, 1, 7, padding=(0, 3)),
    "mostly padding": ConvProblem(2, 3, 2, 16, 16, 3, 3, padding=(4, 3)),
    "one pixel each": ConvProblem(150, 1, 1, 16, 24, 3, 3, padding=(1, 1)),
}
#: Fewer steps than stages, many steps, groups, strides.
HOOKED = ("1x1 stride 2", "several tiles", "groups 2 ragged")
FPROP_HOOKS = [hooks for hooks in conv_cases.HOOKS["fprop"] if "prologue" not in hooks]
FPROP_HOOKS += [("residual",), ("relu", "residual"), ("bias", "relu")]
EVERYTHING = ("bias", "relu", "residual")


@pytest.fixture(autouse=True)
def emulated(emulator):
    return emulator


def make(name: str, hooks=(), dtype=BF16, values="normal", seed=0):
    return case("fprop", name, hooks, dtype, values, seed, PROBLEMS)


def run(c, config):
    return conv_cases.run(c, config, module=KERNELS)


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


# ---- what is refused


def request_of(hooks=(), dtype="bfloat16", kind="fprop", **sizes) -> ConvRequest:
    return ConvRequest(kind, replace(PROBLEMS["several tiles"], **sizes), dtype, hooks, -1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"dtype": "float32"}, "bfloat16 and float16 are served, not float32"),
        ({"kind": "dgrad"}, "fprop is served, not dgrad"),
        ({"hooks": ("prologue", "stats")}, "as they are: no prologue"),
        ({"hooks": ("relu", "stats")}, "without ReLU and residual"),
        ({"C": 36}, "multiples of 8, got 36 and 136"),
        ({"groups": 2, "C": 48, "K": 56}, "multiples of 8, got 24 and 28"),
        ({"R": 8, "S": 9, "padding": (4, 4)}, "up to 7 taps an axis are served, not 8x9"),
        ({"N": 0}, "a tensor is empty"),
        ({"H": 2**13, "W": 2**13}, "spans of x must have fewer than"),
        ({"N": 2**24}, "out fewer than 2\\*\\*31 pixels"),
        ({"K": 2**20, "C": 2**10}, "w must have fewer than"),
    ],
)
def test_why_not(change, words):
    request = request_of(**change)
    reasons, found = cuda_conv.why_not(request), cuda_conv.conv_candidates(request)
    assert bool(found) == (not words)
    if words:
        with pytest.raises(ValueError, match=words):
            raise ValueError("; ".join(reasons))


def test_candidates(emulated, monkeypatch):
    """The tile that wastes least comes first; those that a chip cannot hold do not come."""
    monkeypatch.setattr(emulated, "chip", lambda device: Chip("A100", 108, 163 * 1024, 164 * 1024))
    for sizes, first in (
        (dict(N=256, H=56, W=56, C=64, K=64), "|64|"),
        (dict(N=256, H=14, W=14, C=256, K=256), "|128|32"),
        (dict(N=1, H=7, W=7, C=512, K=512), "|32|"),  # as many tiles as there can be
        (dict(N=32, H=28, W=28, C=64, K=64, groups=2), "|32|"),
    ):
        best = cuda_conv.conv_candidates(request_of(**sizes))[0]
        assert first in str(best), f"{sizes}: {best}"
    monkeypatch.setattr(emulated, "chip", lambda device: Chip("small", 1, 64 * 1024, 64 * 1024))
    few = cuda_conv.conv_candidates(request_of(K=512))
    assert few and all(c.shared + c.moments <= 64 * 1024 for c in few)


def test_bad_input(emulated):
    c = make("several tiles", EVERYTHING, seed=7)
    x, p = c.args["x"], c.problem
    out = torch.full(c.shapes["out"], 7.0, dtype=BF16).to(memory_format=torch.channels_last)

    def call(match, kind=ValueError, **change):
        with pytest.raises(kind, match=f"conv_fprop: .*{match}"):
            cuda_conv.conv_fprop(**{**c.args, "out": out, "config": TILES[0]} | change)
        assert (out == 7).all()

    call("x must have four dimensions", x=x[0])
    call("bfloat16 and float16 are served, not float64", x=x.double())
    call("x must be dense channels_last", x=x.contiguous())
    call("w must be torch.bfloat16", w=c.args["w"].half())
    call("w must have shape", w=c.args["w"][:, :32])
    call("out must have shape", out=out[:, :128])
    call("residual must have shape", residual=c.args["residual"][:, :128])
    call("must be aligned to 16 bytes", x=conv_cases.placed(torch.cat((x, x)))
         .as_strided(x.shape, x.stride(), conv_cases.GUARD + 1))  # fmt: skip
    call("bias must be contiguous float32", bias=c.args["bias"].to(BF16))
    call("part must be contiguous float32 \\[3, 2, 136\\]", residual=None, relu=False, part=torch.zeros(3, 4, p.K))
    call("without ReLU and residual", part=torch.zeros(3, 2, p.K))
    call("stat must be None", stat=torch.zeros(5, p.C))
    call("config must be one of", config=replace(TILES[0], BM=96))
    call("relu must be a bool", relu=2)
    call("out must not overlap residual", residual=out)
    with pytest.raises(ValueError, match="conv_fprop: tile is 0..5, got 6"):
        emulated.module.conv_fprop(1, 16, 1, 1, 1, 8, 16, 8, 1, 1, *[1, 1, 0, 0, 1, 1, 1], 0, 0, 0, 0, 16, 6, 0)
    with pytest.raises(ValueError, match="conv_fprop: w is aligned to 16 bytes, got 18"):
        emulated.module.conv_fprop(1, 16, 1, 1, 1, 8, 18, 8, 1, 1, *[1, 1, 0, 0, 1, 1, 1], 0, 0, 0, 0, 16, 0, 0)


def test_a_bias_of_any_alignment():
    c = make("several tiles", ("bias",), seed=8)
    bias = torch.zeros(c.problem.K + 1)[1:].copy_(c.args["bias"])
    assert bias.data_ptr() % 16
    conv_cases.judge(c, TILES[0], run(conv_cases.with_args(c, bias=bias), TILES[0]))


# ---- who is served


@pytest.fixture
def asked(monkeypatch):
    """What a forced emulator was asked for: request -> backend that serves."""
    found, choose = {}, tuning.choose

    def spy(request):
        choice = choose(request)
        found[str(request).partition(" of ")[0]] = choice.backend
        return choice

    monkeypatch.setattr(tuning, "choose", spy)
    tuning.forget()
    yield found
    tuning.forget()


@DTYPES
def test_a_folded_convolution_is_one_launch(asked, dtype):
    g = testing.generator(0)
    x = torch.randn(2, 32, 7, 6, generator=g).to(dtype)
    w, bias = torch.randn(48, 32, 3, 3, generator=g).to(dtype) / 17, torch.randn(48, generator=g)
    residual = torch.randn(2, 48, 7, 6, generator=g).to(dtype)
    with fastres.backend("emulator"):
        out = fastres.conv_bias_act(x, w, bias, padding=(1, 1), residual=residual, relu=True)
        fastres.conv_bias_act(x.float(), w.float(), bias, padding=(1, 1))
    assert asked == {"fprop + bias, relu, residual": "emulator", "fprop + bias, relu": "library"}
    truth = torch.relu(nn.functional.conv2d(x.double(), w.double(), bias.double(), padding=1) + residual.double())
    verdict = testing.within_budget(out, truth.to(dtype), truth, terms=9 * 32)
    assert verdict, verdict.message


def test_a_training_step(asked):
    """A block whose convolutions gather their statistics; what has no kernel goes to PyTorch."""
    torch.manual_seed(0)
    block = fnn.BasicBlock(16, 16).train().to(memory_format=torch.channels_last)
    found = {}
    for backend, dtype in (("reference", torch.float64), ("reference", BF16), ("emulator", BF16)):
        learner = copy.deepcopy(block).to(dtype)
        x = torch.randn(2, 16, 7, 6, generator=testing.generator(1)).to(dtype, memory_format=torch.channels_last)
        x.requires_grad_()
        for module in learner.modules():
            if isinstance(module, nn.BatchNorm2d) and dtype == BF16:
                module.float()
        with fastres.backend(backend):
            out = learner(x)
            out.backward((torch.arange(out.numel()) % 7 / 7).view(out.shape).to(out.dtype))
        found[backend, dtype] = [out.detach(), x.grad, *(p.grad for p in learner.parameters()),
                                 *(b for b in learner.buffers() if b.is_floating_point())]  # fmt: skip
    assert asked["fprop + stats"] == "emulator" and {v for k, v in asked.items() if k[:5] != "fprop"} == {"library"}
    truth, peer, ours = found.values()
    for i, (t, a, b) in enumerate(zip(truth, peer, ours, strict=True)):
        near, far = ((v.double() - t).norm() / t.norm() for v in (b, a))
        assert near <= 1.5 * far + 1e-4, f"{i}: {near:.3g} from float64, the reference {far:.3g}"


@pytest.fixture
def gpu_0(emulated, monkeypatch, tmp_path):
    """GPU 0 is the emulator, and the tuning has no other candidates."""
    monkeypatch.setenv("FASTRES_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("fastres.tuning_cache.key", lambda device: {"gpu": "Fake GPU", "torch": "1"})
    monkeypatch.setattr(tuning_trial, "device_of", lambda request: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tuning, "_shipped", lambda request: None)
    monkeypatch.setattr(tuning, "_why_not", lambda backend, request: "" if backend == "cuda" else "absent")
    monkeypatch.setattr(cuda_conv, "_kernels", lambda device: emulated)
    monkeypatch.setattr(cuda_conv, "_device", lambda device: torch.device("cpu"))
    tuning.forget()
    yield ConvRequest("fprop", ConvProblem(2, 6, 5, 16, 72, 3, 3, padding=(1, 1)), "bfloat16", ("stats",), 0)
    tuning.forget()


def test_served_where_it_won_or_is_forced(gpu_0, monkeypatch):
    first, *others = cuda_conv.conv_candidates(gpu_0)
    assert [c.config for c in tuning.candidates(gpu_0)[1:]] == [first, *others] and others
    assert tuning.choose(gpu_0) == tuning.LIBRARY, "untuned, PyTorch's call"
    with fastres.backend("cuda"):
        assert tuning.choose(gpu_0) == tuning.Choice("cuda", first), "the likeliest that is right"
    tuning.keep_winner(gpu_0, tuning.Choice("cuda", others[0]), 1.0, 2.0)
    tuning.forget()
    for name in ("", "cuda"):
        monkeypatch.setattr(dispatch, "_forced", name)
        assert tuning.choose(gpu_0) == tuning.Choice("cuda", others[0])
    monkeypatch.setattr(dispatch, "_forced", "triton")
    assert tuning.choose(gpu_0) == tuning.LIBRARY


def test_a_wrong_tile_is_switched_off(gpu_0, monkeypatch):
    first, second, *_ = cuda_conv.conv_candidates(gpu_0)
    inner = cuda_conv.trusted.conv_fprop

    def wrong(x, w, g, out, *, config, **rest):
        inner(x, w, g, out, config=config, **rest)
        if config == first:
            out[-1, -1, -1, -1] += 1

    monkeypatch.setattr(cuda_conv.trusted, "conv_fprop", wrong)
    with fastres.backend("cuda"), pytest.warns(RuntimeWarning, match="cuda fprop .* is switched off for fprop"):
        assert tuning.choose(gpu_0) == tuning.Choice("cuda", second)


def test_emulator_and_gpu_do_not_mix():
    on_gpu, here = request_of(), replace(request_of(), device=0)
    assert tuning._why_not("cuda", on_gpu) == "CUDA tensors only"
    assert tuning._why_not("emulator", here) == "CPU tensors only"
    assert {c.backend for c in tuning.candidates(on_gpu)} == {"library", "emulator"}
    assert set(HOOKS) == {"fprop", "dgrad", "wgrad"} and not cuda_conv.conv_candidates(request_of(kind="wgrad"))
    assert riding._served(torch.empty(0)) is False


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
