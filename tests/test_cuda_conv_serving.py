"""Who gets the CUDA C++ convolution: what it refuses, which tile comes first, when it serves. On the emulator."""

from __future__ import annotations

import copy
from dataclasses import replace

import conv_cases
import pytest
import torch
from cuda_conv_cases import BF16, DTYPES, EVERYTHING, PROBLEMS, make, run
from torch import nn

import fastres
from fastres import dispatch, riding, testing, tuning, tuning_trial
from fastres import nn as fnn
from fastres.backends import cuda_conv
from fastres.backends.cuda_conv import TILES
from fastres.backends.one_pass import Chip
from fastres.problem import HOOKS, ConvProblem, ConvRequest


@pytest.fixture(autouse=True)
def emulated(emulator):
    return emulator


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
