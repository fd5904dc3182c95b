"""Verification: a wrong kernel is caught before it serves, switched off once, with one warning.

There is no GPU here, so a fake backend takes the place of "cuda" and its launches run on CPU tensors.
"""

from __future__ import annotations

import types
import warnings

import kernel_cases
import pytest
import torch

from fastres import dispatch, verify
from fastres.backends import reference
from fastres.backends.native import FUNCTIONS

CPU = torch.device("cpu")


def backend(**broken) -> types.ModuleType:
    """The reference under the name of cuda, some launch functions replaced."""
    module = types.ModuleType("fake")
    for function in FUNCTIONS:
        setattr(module, function, broken.get(function, getattr(reference, function)))
    module.name, module.tiles, module.why_not = "cuda", reference.tiles, lambda request: []
    return module


def outputs(function: str, kwargs: dict) -> list[torch.Tensor]:
    names = ("out", "dx", "dres", "y", "part", "stat", "coef", "dweight", "dbias", "mask", "idx")
    inputs = {"bn_finalize": "part", "bn_bwd_finalize": "part stat", "stem_bwd_reduce": "idx stat",
              "stem_bwd_apply": "idx stat coef", "bn_bwd_apply": "stat coef mask", "bn_bwd_reduce": "stat mask",
              "bn_apply": "stat", "stem_fwd": "stat", "mask_add": "mask", "add_relu_bwd": "mask"}  # fmt: skip
    return [kwargs[n] for n in names if kwargs.get(n) is not None and n not in inputs.get(function, "").split()]


def wrong_by(function: str, damage):
    def launch(**kwargs):
        getattr(reference, function)(**kwargs)
        damage(outputs(function, kwargs)[0])

    return launch


def _five_percent(t):
    t.mul_(1.05) if t.is_floating_point() else t.bitwise_not_()


def _last_part_unwritten(t):
    flat = t.view(-1)
    flat[-max(1, flat.numel() // 20) :] = float("nan") if t.is_floating_point() else 0xA5


def _shifted(t):
    t.copy_(t.roll(1, -1))


DAMAGES = {"5% off": _five_percent, "a tail unwritten": _last_part_unwritten, "one channel off": _shifted}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_planted_errors_are_caught(function, damage):
    fake = backend(**{function: wrong_by(function, DAMAGES[damage])})
    wrong = verify.check(function, fake, CPU, torch.float32, 16, M=131)
    assert function in wrong and "output" in wrong, wrong


@pytest.mark.parametrize("dtype", kernel_cases.DTYPES, ids=kernel_cases.NAMES.get)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_right_kernels_pass(kernels, function, dtype):
    assert verify.check(function, kernels.launch, CPU, dtype, 20, M=131) == ""


def test_a_crash_is_a_reason():
    def crash(**kwargs):
        raise RuntimeError("no kernel image is available")

    wrong = verify.check("bn_apply", backend(bn_apply=crash), CPU, torch.float32, 8)
    assert wrong == "bn_apply failed: RuntimeError: no kernel image is available"


# ---- in dispatch


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Requests for "cuda" are verified on CPU tensors; returns how to install the backend "cuda"."""
    check, fork, load = verify.check, torch.random.fork_rng, dispatch.load
    checked = []

    def on_cpu(function, launch, device, *args):
        checked.append(function)
        return check(function, launch, CPU, *args)

    monkeypatch.setattr(verify, "check", on_cpu)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: fork(devices=[]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    dispatch._automatic.cache_clear()

    def install(fake):
        monkeypatch.setattr(dispatch, "load", lambda name: fake if name == "cuda" else load(name))
        return checked

    return install


REQUEST = dispatch.Request("batch_norm_act", torch.device("cuda"), torch.float32, 16)


def test_a_right_backend_serves_and_is_checked_once(on_a_gpu):
    fake = backend()
    checked = on_a_gpu(fake)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose(REQUEST) is fake
        assert dispatch.choose(REQUEST) is fake
    assert checked == list(dispatch.LAUNCHES["batch_norm_act"])


def test_a_wrong_backend_is_switched_off_with_one_warning(on_a_gpu, monkeypatch):
    on_a_gpu(backend(bn_bwd_apply=wrong_by("bn_bwd_apply", _five_percent)))
    with pytest.warns(RuntimeWarning, match="cuda is switched off for batch_norm_act.*bn_bwd_apply") as caught:
        assert dispatch.choose(REQUEST) is reference
        assert dispatch.choose(REQUEST) is reference
    assert len(caught) == 1
    # An op that does not need the broken function is still served.
    add_relu = dispatch.Request("add_relu", torch.device("cuda"), torch.float32)
    assert dispatch.choose(add_relu).name == "cuda"


def test_a_forced_backend_is_the_users_word(on_a_gpu):
    checked = on_a_gpu(backend(bn_apply=wrong_by("bn_apply", _five_percent)))
    assert dispatch.choose(REQUEST, "cuda").name == "cuda"
    assert checked == []


def test_random_state_is_left_alone(on_a_gpu):
    on_a_gpu(backend())
    before = torch.get_rng_state()
    dispatch.choose(REQUEST)
    assert torch.equal(torch.get_rng_state(), before)


def test_under_graph_capture_nothing_is_decided(on_a_gpu, monkeypatch):
    fake = backend()
    on_a_gpu(fake)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.warns(RuntimeWarning, match="served by PyTorch: not verified yet and a CUDA graph is being captured"):
        assert dispatch.choose(REQUEST) is reference
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert dispatch.choose(REQUEST) is fake, "the capture's makeshift must not stick"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert dispatch.choose(REQUEST) is fake, "verified before, served under capture"


def test_cpu_kernels_are_not_checked_again(on_a_gpu):
    checked = on_a_gpu(backend())
    assert verify.failure(kernel_cases.request(), "cpu", None, FUNCTIONS) == ""
    assert checked == []
