"""optimize: sessions compute what the model computes, and the model never notices."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from session_cases import distance, perturbed, pixels, seeded, tiny, truth
from torch import nn

import fastres
from fastres import convolution, models

BUDGET = {torch.float32: 1e-5, torch.float64: 2e-14, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(scope="module")
def session():
    return fastres.optimize(tiny(), pixels())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_networks_at_odd_and_changing_sizes(name):
    model = seeded(getattr(models, name))
    session = fastres.optimize(model, (pixels(1, 65, 97),))
    assert session.verdict.ok and session.verdict.error <= 1e-5
    for x in (pixels(1, 65, 97, seed=2), pixels(3, 33, 32), pixels(2, 40, 71)):
        y = session(x)
        assert y.dtype == torch.float32 and distance(y, truth(model, x)) <= 1e-5


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_torchvisions_networks(name, fused):
    torchvision = pytest.importorskip("torchvision", reason="torchvision's classes are the subject")
    model = seeded(torchvision.models.get_model, name, weights=None)
    x = pixels(2, 65, 49)
    expected = truth(model, x)
    session = fastres.optimize(fastres.fuse(model) if fused else model, (x,))
    assert not list(session.plan.foreign())
    assert distance(session(x), expected) <= 1e-5


@pytest.mark.parametrize("precision", ["exact", "highest"])
@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_dtypes_and_precisions(kind, dtype, precision):
    model, x = tiny(kind), pixels()
    session = fastres.optimize(model, (x,), dtype, precision)
    y = session(x)
    assert y.dtype == dtype and session(x.to(dtype)).dtype == dtype
    assert distance(y, truth(model, x)) <= BUDGET[dtype]


def test_high_precision_is_served_or_said_not_to_be():
    x = pixels()
    session = fastres.optimize(tiny(), (x,), precision="high")
    served = [a for part in session.runner.leaves() for a in part.assignments]
    if any(a.executor == "torch" for a in served):
        assert any("precision 'high' was asked for" in note for note in session.notes)
        assert "precision 'high' was asked for" in str(session.report(measure=False))


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_untouched(training):
    model = fastres.fuse(tiny("bottleneck")).train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kinds, addresses = [type(m) for m in model.modules()], [p.data_ptr() for p in model.parameters()]
    x = pixels()
    kept = x.clone()
    session = fastres.optimize(model, (x,))
    session(x)
    assert torch.equal(x, kept) and all(m.training == training for m in model.modules())
    assert [type(m) for m in model.modules()] == kinds
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert any("training mode" in note for note in session.notes) == training


def test_a_session_is_a_snapshot():
    model, x = tiny(), pixels()
    session = fastres.optimize(model, (x,))
    y = session(x)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(session(x), y)


def test_layouts_modes_and_empty_batches():
    model, x = tiny(), pixels()
    session = fastres.optimize(model, x)
    y = session(x)
    assert not y.requires_grad and not y.is_inference()
    nhwc = x.contiguous(memory_format=torch.channels_last)
    wide = torch.cat([x, x], 3)[..., ::2][..., : x.shape[3] // 2]
    assert torch.equal(session(nhwc), y)
    assert torch.equal(session(wide), session(wide.contiguous()))
    with torch.inference_mode():
        assert torch.equal(session(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(session(x), y)
    assert session(x[:0]).shape == (0, 10)
    features = nn.Sequential(*list(model.children())[:5])
    fresh = fastres.optimize(features, x)
    assert fresh(x).is_contiguous() and fresh(nhwc).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(fresh(x), fresh(nhwc))


def test_reduced_float32_switches_do_not_reach_a_session(monkeypatch):
    """PyTorch may be told to multiply float32 in bf16; "highest" is float32 all the same, and the switch stays."""
    model, x = tiny(), pixels()
    switches = (torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul)
    before, seen = [s.fp32_precision for s in switches], set()
    session = fastres.optimize(model, x, executor="torch")

    def spying(*arguments):
        seen.update(s.fp32_precision for s in switches)
        return original(*arguments)

    name = "pointwise" if convolution.has_pointwise(x) else "fprop"
    original = getattr(convolution, name)
    monkeypatch.setattr(convolution, name, spying)
    try:
        for s in switches:
            s.fp32_precision = "bf16"
        assert distance(session(x), truth(model, x)) <= 1e-5
        assert [s.fp32_precision for s in switches] == ["bf16", "bf16"] and seen == {"ieee"}
    finally:
        for s, value in zip(switches, before, strict=True):
            s.fp32_precision = value


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        ([1.0], TypeError, "x: got list, expected a torch.Tensor"),
        (pixels().double(), TypeError, "x: got dtype torch.float64, expected torch.float32"),
        (pixels().to(torch.uint8), TypeError, "got dtype torch.uint8"),
        (pixels()[0], ValueError, r"expected \[N, C, H, W\]"),
        (pixels(channels=4), ValueError, r"conv1: got an input of shape \(2, 4, 33, 41\), expected \[N, 3, H, W\]"),
        (pixels().requires_grad_(), ValueError, "records no gradients"),
        (pixels().to_sparse(), ValueError, "expected a strided tensor"),
        (pixels().to("meta"), ValueError, "got device meta, expected cpu"),
        (torch.zeros(1, 3, 0, 5), ValueError, "conv1: got an image of 0 x 5, too small"),
    ],
    ids=["list", "float64", "uint8", "rank", "channels", "grad", "sparse", "device", "empty image"],
)
def test_bad_inputs(session, x, error, text):
    with pytest.raises(error, match=text):
        session(x)


def test_an_input_that_requires_grad_is_welcome_without_grad():
    session = fastres.optimize(tiny(), pixels())
    with torch.no_grad():
        assert not session(pixels().requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("model", pixels()), TypeError, "model: got str"),
        ((nn.ReLU(), (pixels(), pixels())), ValueError, "example: got 2 inputs"),
        ((nn.ReLU(), "x"), TypeError, "example: got str"),
        ((nn.ReLU(), pixels().long()), TypeError, "example: got torch.int64"),
        ((nn.ReLU(), pixels()[:0]), ValueError, "at least one image"),
        ((nn.ReLU(), pixels(), torch.int8), TypeError, "dtype: got torch.int8"),
        ((nn.ReLU(), pixels(), None, "low"), ValueError, "precision: got 'low', expected one of 'exact'"),
        ((nn.ReLU(), pixels(), torch.bfloat16, "high"), ValueError, "precision: got 'high' with dtype torch.bfloat16"),
        ((nn.ReLU(), pixels(), None, None, 1), TypeError, "strict: got int"),
        ((nn.ReLU(), pixels()), ValueError, "nothing that a plan knows.*ReLU is no node"),
        ((nn.Conv2d(3, 4, 3).to("meta"), pixels()), ValueError, "model: weight is on meta"),
        ((nn.Conv2d(4, 4, 3), pixels()), ValueError, "model: does not run on the example"),
    ],
)
def test_bad_requests(arguments, error, text):
    with pytest.raises(error, match=text):
        fastres.optimize(*arguments)


def test_an_unknown_executor_is_named():
    with pytest.raises(ValueError, match="executor: got 'gpu', expected one of"):
        fastres.optimize(tiny(), pixels(), executor="gpu")


def test_two_threads_at_once():
    model = tiny("bottleneck")
    session = fastres.optimize(model, pixels())
    inputs = [pixels(1 + i % 3, 32 + i, 40 - i, seed=i) for i in range(8)]
    expected = [session(x) for x in inputs]
    wrong = []

    def work(offset: int):
        for i in range(24):
            at = (i + offset) % len(inputs)
            if not torch.equal(session(inputs[at]), expected[at]):
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(k,)) for k in (0, 3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_the_number_of_threads_may_change():
    model, x = tiny(), pixels()
    session, before = fastres.optimize(model, x), torch.get_num_threads()
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            assert distance(session(x), truth(model, x)) <= 1e-5
    finally:
        torch.set_num_threads(before)


def test_memory_does_not_grow():
    """A call that kept 16 KiB would show. FASTRES_FULL=1: ten thousand calls."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("this system does not tell a process its memory (/proc/self/statm)")
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    session = fastres.optimize(perturbed(model), pixels())

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    inputs = [pixels(1 + i % 3, 32 + i % 7, 32 + i % 5) for i in range(105)]
    for x in inputs:
        session(x)
    calls = 10_000 if os.environ.get("FASTRES_FULL") == "1" else 1_000
    before = resident()
    for i in range(calls):
        session(inputs[i % len(inputs)])
    grown = resident() - before
    assert grown < calls * 2**13, f"{grown / 2**20:.1f} MiB more after {calls} calls"


def test_a_session_says_what_it_is(session):
    assert repr(session) == (
        "InferenceSession(fastres.models.resnet.ResNet: 7 nodes, 0 torch modules, float32 on cpu, precision highest)"
    )
