"""Which kernel serves a request: forced backends, the automatic order, reasons, and the common launch signature."""

from __future__ import annotations

import inspect
import re

import kernel_cases
import pytest
import torch

import fastres
from fastres import dispatch, testing
from fastres.backends import reference

LAUNCH_FUNCTIONS = sorted({f for functions in dispatch.LAUNCHES.values() for f in functions})


@pytest.mark.parametrize("name", dispatch.BACKENDS)
def test_here(name):
    """Says in the summary what this machine cannot run, and why; what it can must serve an op."""
    reason = kernel_cases.absent(name)
    if reason:
        pytest.skip(f"backend {name!r}: {reason}")
    with fastres.backend(name):
        assert torch.equal(fastres.add_relu(torch.ones(2, 3), -torch.ones(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("name", dispatch.BACKENDS)
def test_one_launch_signature(name):
    """Every backend offers every launch function with the argument order of the reference."""
    module = dispatch.load(name)
    assert module.name == name
    for function in LAUNCH_FUNCTIONS:
        expected = list(inspect.signature(getattr(reference, function)).parameters)
        got = inspect.signature(getattr(module, function))
        if any(p.kind is p.VAR_POSITIONAL for p in got.parameters.values()):
            continue  # a forwarder: what it forwards to is called by name in the launch tests
        assert list(got.parameters) == expected, function


def test_header_and_table_of_contents_agree(request):
    """launch.h, bindings.cpp and the reference name the same functions."""
    csrc = request.config.rootpath / "csrc"
    if not csrc.is_dir():
        pytest.skip("the C++ sources are not beside the tests")
    declared = re.findall(r"^void (\w+)\(", (csrc / "launch.h").read_text(), flags=re.M)
    bound = re.findall(r"^    ENTRY\((\w+)\);", (csrc / "bindings.cpp").read_text(), flags=re.M)
    assert sorted(declared) == sorted(bound) == LAUNCH_FUNCTIONS
    assert all(hasattr(reference, f) for f in declared)


@pytest.mark.parametrize("name", [n for n in dispatch.BACKENDS if n != "reference"])
def test_refusals_name_their_reason(name):
    meta = dispatch.Request("add_relu", torch.device("xpu"), torch.float32)
    reasons = dispatch.load(name).why_not(meta)
    assert reasons and all(isinstance(r, str) and r for r in reasons)
    assert any("xpu" in r for r in reasons) or "not available" in " ".join(reasons), reasons


def test_reference_serves_everything():
    assert reference.why_not(dispatch.Request("stem", torch.device("xpu"), torch.float64, 1)) == []


def test_forced_backend_raises_with_reasons():
    x = torch.ones(2, 3)
    with fastres.backend("cuda"):
        with pytest.raises(ValueError, match=r"backend 'cuda' cannot serve add_relu\(device=cpu.*: .*CUDA"):
            fastres.add_relu(x, x)
    if not kernel_cases.absent("emulator"):
        bn = fastres.BN(None, None, torch.zeros(3), torch.ones(3))
        with fastres.backend("emulator"), pytest.raises(ValueError, match="cannot serve.*float64"):
            fastres.batch_norm_act(torch.ones(1, 3, 2, 2, dtype=torch.float64), bn)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend: got 'tpu', expected one of 'reference', 'cpu'"):
        with fastres.backend("tpu"):
            pass
    assert dispatch.forced() == ""


def test_forcing_nests_and_ends():
    assert dispatch.forced() == ""
    with pytest.raises(KeyError):
        with fastres.backend("reference"):
            with fastres.backend("cpu"):
                assert dispatch.forced() == "cpu"
            assert dispatch.forced() == "reference"
            raise KeyError
    assert dispatch.forced() == ""


class Spy:
    """A backend that serves by the reference and notes what was launched."""

    name = "spy"

    def __init__(self, reasons=()):
        self.reasons, self.launched = list(reasons), []

    def why_not(self, request):
        return self.reasons

    def tiles(self, M, C):
        return reference.tiles(M, C)

    def __getattr__(self, function):
        def launch(*args, **kwargs):
            self.launched.append(function)
            getattr(reference, function)(*args, **kwargs)

        if function not in LAUNCH_FUNCTIONS:
            raise AttributeError(function)
        return launch


@pytest.fixture
def spies(monkeypatch):
    """Spies in the place of the backends "cpu" and "cuda"."""
    found = {"cpu": Spy(), "cuda": Spy()}
    real = dispatch.load
    monkeypatch.setattr(dispatch, "load", lambda name: found.get(name) or real(name))
    dispatch._automatic.cache_clear()
    return found


def test_automatic_order(spies):
    """The first of the order that can serve; PyTorch's operators close the list and serve when nobody else does."""
    assert all(order[-1] == "reference" for order in dispatch.ORDER.values())
    assert set(sum(dispatch.ORDER.values(), ())) <= set(dispatch.BACKENDS)
    request = kernel_cases.request(op="add_relu")
    assert dispatch.choose(request) is spies["cpu"]
    dispatch._automatic.cache_clear()
    spies["cpu"].reasons = ["out of order"]
    assert dispatch.choose(request) is reference


def test_explain(spies):
    spies["cpu"].reasons = ["out of order", "on holiday"]
    request = kernel_cases.request(op="add_relu")
    assert dispatch.explain(request) == [("cpu", ["out of order", "on holiday"]), ("reference", [])]
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot serve add_relu\(.*\): out of order; on holiday"):
        dispatch.choose(request, "cpu")
    names = [name for name, _ in dispatch.explain(dispatch.Request("stem", torch.device("xpu"), torch.float32))]
    assert names == ["reference"], "a device nobody knows is PyTorch's"


def test_backward_stays_with_the_forward(spies):
    x = testing.fill((1, 8, 4, 4), torch.float32).requires_grad_()
    with fastres.backend("cpu"):
        out = fastres.batch_norm_act(x, testing.make_bn(8))
    with fastres.backend("reference"):
        out.sum().backward()
    assert "bn_bwd_apply" in spies["cpu"].launched
    assert set(spies["cpu"].launched) <= set(dispatch.LAUNCHES["batch_norm_act"])


@pytest.mark.parametrize("op", ["conv_bn_act", "basic_block", "bottleneck", "stem"])
def test_launches_of_each_op(spies, op):
    """``LAUNCHES`` (what verification covers) names every launch function that an op uses."""
    convs = [testing.make_conv(8, 8, 3, seed=i) for i in range(3)]
    x = testing.fill((2, 8, 6, 6), torch.float32).requires_grad_()
    calls = {
        "conv_bn_act": lambda: fastres.conv_bn_act(x, convs[0], residual=x),
        "basic_block": lambda: fastres.basic_block(x, convs[:2]),
        "bottleneck": lambda: fastres.bottleneck(x, convs),
        "stem": lambda: fastres.stem(x, convs[0]),
    }
    calls[op]().sum().backward()
    launched = set(spies["cpu"].launched)
    assert launched <= set(dispatch.LAUNCHES[op])
    assert {"bn_stats", "bn_finalize", "bn_bwd_finalize"} <= launched


@pytest.mark.parametrize("name", dispatch.BACKENDS)
def test_tiles_depend_on_the_shape_alone(name):
    """Fixed tiles, fixed order of summation: the same bits on every machine and thread count."""
    module, before = dispatch.load(name), torch.get_num_threads()
    if name == "triton" and "triton is not installed" in kernel_cases.absent(name):
        pytest.skip(kernel_cases.absent(name))
    shapes = [(0, 1), (1, 1), (5, 2048), (1031, 7), (802816, 64), (392, 2048)]
    found = [module.tiles(M, C) for M, C in shapes]
    torch.set_num_threads(1)
    try:
        assert found == [module.tiles(M, C) for M, C in shapes]
    finally:
        torch.set_num_threads(before)
    assert all(isinstance(t, int) and t >= 1 for t in found)


def test_request_reads_well():
    assert str(kernel_cases.request(torch.bfloat16)) == "batch_norm_act(device=cpu, dtype=bfloat16, channels=64)"
