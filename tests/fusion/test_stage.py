"""FusedStage: a drop-in for nn.Sequential, and in evaluation the rotated units where kernels serve them."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import fastres
from fastres import dispatch, whole_block
from fastres import nn as fnn
from fastres.backends import rotated_kernels
from fastres.fusion import fuse, report, restore

BF16 = torch.bfloat16


def stage(blocks=3, projected=True, mid=64, dtype=BF16) -> nn.Sequential:
    """Blocks of fastres.nn, the first with a projection from ``mid`` channels."""
    torch.manual_seed(0)
    made = []
    for i in range(blocks):
        inputs, down = 4 * mid, None
        if i == 0 and projected:
            inputs, down = mid, nn.Sequential(nn.Conv2d(mid, 4 * mid, 1, bias=False), nn.BatchNorm2d(4 * mid))
        made.append(fnn.Bottleneck(inputs, mid, downsample=down))
    model = nn.Sequential(*made)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_var, 0.5, 2), nn.init.normal_(m.running_mean), nn.init.normal_(m.bias, 0, 0.3)
    return model.to(dtype).eval()


def image(channels=64, dtype=BF16, seed=1):
    return torch.randn(1, channels, 9, 11, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def launched(emulator, monkeypatch):
    """Names of the block kernels that were launched, in order."""
    calls = []
    for name in ("rotated_stage", "bottleneck_eval"):
        inner = getattr(emulator, name)
        monkeypatch.setattr(emulator, name, lambda *a, n=name, f=inner: (calls.append(n), f(*a))[1])
    return calls


def run(model, x, backend="emulator"):
    with torch.no_grad(), fastres.backend(backend):
        return model(x)


def in_double(model, x):
    return run(restore(copy.deepcopy(model)).double(), x.double(), "reference")


def close(out, model, x):
    expected = in_double(model, x)
    torch.testing.assert_close(out.double(), expected, rtol=2**-5, atol=2**-5 * expected.abs().max().item())


# ---- what it computes


def test_evaluation(launched):
    """The first block by its own kernel, the identity blocks after it as rotated units, in the layout of the input."""
    model, x = stage(), image()
    keys = list(model.state_dict())
    assert fuse(model, fold=True) is model and type(model) is fnn.FusedStage and isinstance(model, nn.Sequential)
    assert list(model.state_dict()) == keys
    out = run(model, x)
    assert launched == ["bottleneck_eval", "rotated_stage", "rotated_stage"]
    assert out.is_contiguous()
    close(out, model, x)
    assert torch.equal(run(model, x.to(memory_format=torch.channels_last)), out)
    with torch.no_grad():
        model[2].conv1.weight.mul_(0)  # noticed: the unit before is packed anew
    again = run(model, x)
    assert not torch.equal(again, out)
    close(again, model, x)


def test_packed_once(launched, monkeypatch):
    from fastres import rotated

    packed, inner = [], rotated.pack
    monkeypatch.setattr(rotated, "pack", lambda *a: (packed.append(a), inner(*a))[1])
    model, x = fuse(stage(2, projected=False), fold=True), image(256)
    run(model, x), run(model, x)
    assert launched == ["rotated_stage"] * 4 and len(packed) == 2


def test_block_by_block(launched):
    """One identity block, float32, another shape in between: no run."""
    short = fuse(stage(2), fold=True)
    close(run(short, image()), short, image())
    assert launched == ["bottleneck_eval"] * 2
    launched.clear()
    wide = fuse(stage(2, projected=False, dtype=torch.float32), fold=True)
    run(wide, image(256, torch.float32))
    assert not launched


def test_automatic_choice_off_gpu(launched):
    model, x = fuse(stage(2, projected=False, dtype=torch.float32), fold=True), image(256, torch.float32)
    with torch.no_grad():
        expected = nn.Sequential.forward(model, x)
        assert torch.equal(model(x), expected)
    assert not launched


@pytest.mark.parametrize("served", [True, False])
def test_verdict(emulator, launched, monkeypatch, served):
    """As on a GPU: what the first call found decides between the units and the blocks."""
    asked = []

    def kernels_for(x, shape, separate, ours, proof=None):
        asked.append(shape.op)
        return emulator if served and shape.op == "run" else None

    monkeypatch.setattr(whole_block, "kernels_for", kernels_for)
    model, x = fuse(stage(2, projected=False), fold=True), image(256)
    out = run(model, x)
    assert asked == ["run"] + ["bottleneck"] * (0 if served else 2)
    assert launched == ["rotated_stage"] * (2 if served else 0)
    close(out, model, x)


# ---- when it steps aside


def test_hooks(launched):
    """A block with a hook is called as a module; so is one whose layer has a hook. Those behind it may be a run."""
    model, x = fuse(stage(5), fold=True), image()
    expected, seen = run(model, x), []
    launched.clear()
    handle = model[2].register_forward_hook(lambda m, a, out: seen.append(out.shape))
    out = run(model, x)
    assert seen == [(1, 256, 9, 11)] and launched == ["bottleneck_eval"] * 3 + ["rotated_stage"] * 2
    torch.testing.assert_close(out, expected, rtol=2**-6, atol=2**-6 * expected.abs().max().item())
    handle.remove()
    launched.clear()
    handle = model[2].conv2.register_forward_pre_hook(lambda m, a: seen.append("conv2"))
    run(model, x)
    assert seen[1:] == ["conv2"] and launched == ["bottleneck_eval"] * 2 + ["rotated_stage"] * 2
    handle.remove()
    launched.clear()
    assert torch.equal(run(model, x), expected)
    model[2].forward = model[2].forward  # overridden on the instance
    run(model, x)
    assert launched[5:] == ["bottleneck_eval"] * 3 + ["rotated_stage"] * 2


def test_training():
    """Outputs, gradients and running statistics of training are those of the plain stage."""
    plain, model = stage(3, mid=8, dtype=torch.float64).train(), stage(3, mid=8, dtype=torch.float64)
    fuse(model, fold=True).train()
    x = image(8, torch.float64)
    found = []
    for m in (plain, model):
        given = x.clone().requires_grad_()
        out = m(given)
        out.square().mean().backward()
        found.append([out, given.grad, *(p.grad for p in m.parameters()), *m.buffers()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


# ---- what it is


def test_copies(launched):
    model, x = fuse(stage(), fold=True), image()
    out = run(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        launched.clear()
        assert type(twin) is fnn.FusedStage and torch.equal(run(twin, x), out)
        assert launched == ["bottleneck_eval", "rotated_stage", "rotated_stage"]
    plain = stage()
    assert plain.load_state_dict(model.state_dict())
    assert type(model[1:]) is fnn.FusedStage and len(model[1:]) == 2  # a slice, as of nn.Sequential
    assert torch.equal(run(model, x), out)


def test_fuse_and_restore():
    model = stage()
    fuse(model)
    assert type(model) is nn.Sequential, "without folding there is nothing for a stage to do"
    fuse(model, fold=True)
    (row, *blocks) = report(model).rows
    assert (row.path, row.kind, row.op, row.options) == ("", "torch.nn.Sequential", "rotated_stage", ("fold",))
    assert [b.op for b in blocks] == ["bottleneck"] * 3
    fuse(model, fold=False)
    assert type(model) is nn.Sequential
    restore(fuse(model, fold=True))
    assert type(model) is nn.Sequential and "_fastres_fold" not in vars(model)
    mixed = nn.Sequential(stage(2), nn.Identity())
    fuse(mixed, fold=True)
    assert type(mixed) is nn.Sequential and type(mixed[0]) is fnn.FusedStage
    born = fnn.FusedStage(*stage(2))
    assert report(born).rows[0].op == "rotated_stage"
    born.append(nn.Identity())
    assert "1 is" not in (reason := report(born).rows[0].reasons[0]) and "2 is torch.nn.Identity" in reason


def test_torchvision(launched):
    resnet = pytest.importorskip("torchvision", reason="fuses torchvision's models").models.resnet
    model = resnet.resnet50(num_classes=10).to(BF16).eval()
    keys = list(model.state_dict())
    fuse(model, fold=True)
    assert [type(getattr(model, f"layer{i}")) for i in (1, 2, 3, 4)] == [fnn.FusedStage] * 4
    assert list(model.state_dict()) == keys
    x = image()
    out = run(model.layer1, x)
    assert launched == ["bottleneck_eval", "rotated_stage", "rotated_stage"]
    truth = restore(copy.deepcopy(model)).layer1.double()
    expected = run(truth, x.double(), "reference")
    torch.testing.assert_close(out.double(), expected, rtol=2**-5, atol=2**-5 * expected.abs().max().item())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restore(model)
    assert type(model.layer1) is nn.Sequential


def test_optimize_reads_a_fused_stage():
    model, x = stage(2, mid=8, dtype=torch.float32), image(8, torch.float32)
    expected = fastres.optimize(model, (x,))(x)
    session = fastres.optimize(fuse(model, fold=True), (x,))
    assert torch.equal(session(x), expected)


def test_a_chip_too_small(emulator, launched, monkeypatch):
    monkeypatch.setattr(rotated_kernels, "why_not_rotated", lambda *a: ["no room"])
    run(fuse(stage(2, projected=False), fold=True), image(256))
    assert launched == ["bottleneck_eval"] * 2
    assert dispatch.load("emulator").why_not_run(
        torch.device("cpu"), BF16, fastres.rotated.RunShape(2, rotated_kernels.RotatedShape(1, 9, 9, 64, 64, True))
    ) == ["no room"]
