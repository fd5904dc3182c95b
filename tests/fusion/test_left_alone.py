"""What cannot be served exactly is left to PyTorch with a reason, when fusing and at every call."""

import copy
import re
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fastres
from fastres.fusion import fuse, report
from fastres.nn import FrozenBatchNorm2d

torchvision = pytest.importorskip("torchvision", reason="fuses torchvision's models, which is not installed")
resnet = torchvision.models.resnet


def assert_same(a, b, tol=1e-9):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def reasons(model):
    return "; ".join(r.notes for r in report(model).left)


# ---- what is left alone


class LoudReLU(nn.ReLU):
    pass


class MyBottleneck(resnet.Bottleneck):
    pass


def _set(path, make):
    def change(b):
        *parents, name = path.split(".")
        target = b
        for p in parents:
            target = getattr(target, p)
        setattr(target, name, make(getattr(target, name, None)))

    return change


def _share_norm(b):
    b.bn2 = b.bn1


def _instance_forward(target):
    def change(b):
        m = b.get_submodule(target)
        m.forward = m.forward

    return change


CHANGES = {
    "group norm": (_set("bn2", lambda _: nn.GroupNorm(2, 8).double()), "bn2: is torch.nn.GroupNorm"),
    "sync norm": (_set("bn1", lambda _: nn.SyncBatchNorm(8)), "bn1: torch.nn.SyncBatchNorm merges"),
    "instance norm": (_set("bn3", lambda _: nn.InstanceNorm2d(32)), "bn3: is torch.nn.InstanceNorm2d"),
    "activation": (_set("relu", lambda _: nn.SiLU()), "relu: is torch.nn.SiLU"),
    "relu subclass": (_set("relu", lambda _: LoudReLU()), r"relu: is .*LoudReLU"),
    "forward hook": (lambda b: b.conv2.register_forward_hook(lambda *_: None), "conv2: has forward hooks"),
    "pre-hook": (lambda b: b.bn1.register_forward_pre_hook(lambda *_: None), "bn1: has forward pre-hooks"),
    "backward hook": (lambda b: b.conv2.register_full_backward_hook(lambda *_: None), "conv2: has backward hooks"),
    "backward pre-hook": (
        lambda b: b.downsample[0].register_full_backward_pre_hook(lambda *_: None),
        "downsample: has backward hooks",
    ),
    "hooked shortcut": (lambda b: b.downsample.register_forward_hook(lambda *_: None), "downsample: has forward hooks"),
    "weight norm": (lambda b: nn.utils.parametrizations.weight_norm(b.conv1), "conv1: is parametrized"),
    "old spectral norm": (lambda b: nn.utils.spectral_norm(b.conv2), "conv2: has forward pre-hooks"),
    "pruned": (lambda b: prune.l1_unstructured(b.conv3, "weight", 0.5), "conv3: has forward pre-hooks"),
    "padding mode": (_set("conv2.padding_mode", lambda _: "reflect"), "conv2: padding_mode is 'reflect'"),
    "string padding": (_set("conv1.padding", lambda _: "same"), "conv1: padding is the string 'same'"),
    "conv subclass": (_set("conv1", lambda _: nn.LazyConv2d(8, 1)), "conv1: is torch.nn.LazyConv2d"),
    "extra child": (_set("drop_path", lambda _: nn.Identity()), r"has 9 child modules \(.*drop_path\), expected 8"),
    "shortcut pools": (
        _set("downsample", lambda d: nn.Sequential(nn.AvgPool2d(2), *d)),
        "downsample: is torch.nn.Sequential, expected a Sequential of a convolution and a norm",
    ),
    "shortcut is a function": (_set("downsample", lambda _: nn.Identity()), "downsample: is torch.nn.Identity"),
    "instance forward": (_instance_forward(""), "forward is overridden on the instance"),
    "inner forward": (_instance_forward("conv2"), "conv2: forward is overridden on the instance"),
    "shared norm": (_share_norm, "conv1: its BatchNorm2d is shared: 0.bn1 and 0.bn2"),
    "half tracked": (_set("bn1.running_var", lambda _: None), "bn1: has one of running_mean and running_var"),
    "meta": (lambda b: b.to("meta"), "conv1: its weight is on the meta device"),
}


@pytest.mark.parametrize("change, reason", CHANGES.values(), ids=CHANGES)
def test_left_alone_with_a_reason(change, reason, block):
    b = block()
    change(b)
    model = nn.Sequential(b, resnet.BasicBlock(32, 32).double())
    fuse(model)
    assert type(b) is resnet.Bottleneck and type(model[1]) is not resnet.BasicBlock
    (row,) = report(model).left
    assert row.path == "0"
    assert re.search(reason, row.notes), row.notes


NOT_A_PROBLEM = {
    "conv bias": _set("conv1", lambda _: nn.Conv2d(16, 8, 1).double()),
    "not affine": _set("bn1", lambda _: nn.BatchNorm2d(8, affine=False).double()),
    "untracked": _set("bn2", lambda _: nn.BatchNorm2d(8, track_running_stats=False).double()),
    "frozen": _set("bn3", lambda _: FrozenBatchNorm2d(32).double()),
    "buffers": _set("bn1", lambda _: torchvision.ops.FrozenBatchNorm2d(8).double()),
    "state-dict hook": lambda b: b.conv1.register_state_dict_post_hook(lambda *_: None),
    "parameter hook": lambda b: b.conv1.weight.register_hook(lambda g: 2 * g),
    "frozen weights": lambda b: b.requires_grad_(False).bn2.requires_grad_(True),
}


@pytest.mark.parametrize("change", NOT_A_PROBLEM.values(), ids=NOT_A_PROBLEM)
@pytest.mark.parametrize("training", [True, False])
def test_served(change, training, block, image):
    b = block()
    change(b)
    b.train(training)
    twin = fuse(copy.deepcopy(b)) if change is not NOT_A_PROBLEM["parameter hook"] else None
    if twin is None:  # deepcopy drops tensor hooks
        twin = fuse(block().train(training))
        twin.load_state_dict(b.state_dict())
        change(twin)
    x = image(2, 16, 9)
    outs = [m(x) for m in (twin, b)]
    assert twin._fastres_left is None
    assert_same(*outs)
    for out in outs:
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)).sum().backward()
    for (name, p), q in zip(b.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-9, msg=name)
    for (name, p), q in zip(b.named_buffers(), twin.named_buffers(), strict=True):
        torch.testing.assert_close(q[1], p, rtol=1e-9, atol=1e-9, msg=name)


def test_subclasses_and_strangers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    model = nn.Sequential(MyBottleneck(16, 4), Net(), nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="nothing in Sequential could be fused"):
        assert fuse(model) is model
    first, second = report(model).rows
    assert "is a subclass of torchvision.models.resnet.Bottleneck" in first.notes
    assert second.notes == "no adapter for this class"
    assert "0 of 2 places fused" in str(report(model))
    assert "no block of a known library" in str(report(nn.Linear(1, 1)))


def test_shared_block_is_fused_once_and_shared_stem_is_not(small, block):
    b = block()
    model = nn.ModuleDict({"a": b, "b": b})
    assert len(report(fuse(model)).fused) == 1
    net = small()
    model = nn.ModuleDict({"net": net, "first": net.conv1})
    fuse(model)
    assert type(net) is resnet.ResNet
    assert "conv1: its Conv2d is shared: first and net.conv1" in reasons(model)


# ---- what changes after fuse


LATER = {name: CHANGES[name] for name in ("forward hook", "pre-hook", "backward hook", "group norm", "padding mode",
                                          "pruned", "activation", "inner forward", "weight norm")}  # fmt: skip


@pytest.mark.parametrize("change, reason", LATER.values(), ids=LATER)
def test_changed_after_fuse(change, reason, block, image):
    plain = block().eval()
    fused = fuse(copy.deepcopy(plain))
    x = image(2, 16, 8)
    fused(x)
    assert fused._fastres_left is None
    change(plain)
    change(fused)
    fused.load_state_dict(plain.state_dict())
    assert_same(fused(x), plain(x))
    assert re.search(reason, reasons(fused)), reasons(fused)


def test_hooks_added_later_run(block, image):
    b = fuse(block())
    seen = []
    handle = b.bn2.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    b(image(2, 16, 8))
    assert seen == [(2, 8, 4, 4)]
    assert "bn2: has forward hooks" in reasons(b)
    handle.remove()
    b(image(2, 16, 8))
    assert len(seen) == 1 and not report(b).left
    assert "a call was left to PyTorch: bn2: has forward hooks" in str(report(b))


def test_global_hooks_run(block, image):
    b, seen = fuse(block()), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, out: seen.append(type(m).__name__))
    try:
        b(image(2, 16, 8))
    finally:
        handle.remove()
    assert seen.count("Conv2d") == 4 and "global module hooks" in b._fastres_left


def test_geometry_and_mode_are_read_at_call_time(block, image):
    plain, fused = block(), fuse(block())
    fused.load_state_dict(plain.state_dict())
    for b in (plain, fused):
        b.conv2.stride, b.conv2.dilation, b.conv2.padding = (1, 1), (2, 2), (2, 2)
        b.downsample[0].stride = (1, 1)
        b.bn1.eval()
        b.bn2.momentum, b.bn3.eps = 0.5, 0.1
    x = image(2, 16, 8)
    assert_same(fused(x), plain(x))
    for a, b in zip(fused.buffers(), plain.buffers(), strict=True):
        assert_same(a, b)
    assert fused._fastres_left is None


class Logged(torch.Tensor):
    """A tensor subclass that sees the operators applied to it."""


def _jvp(b, x):
    return torch.func.jvp(b, (x,), (x,))[1]


def _dual(b, x):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(b(torch.autograd.forward_ad.make_dual(x, x))).tangent


CALLS = {
    "vmap": (lambda b, x: torch.func.vmap(b)(x[None])[0], "torch.func transform"),
    "jvp": (_jvp, "torch.func transform"),
    "per-sample grad": (
        lambda b, x: torch.func.grad(lambda p: torch.func.functional_call(b, p, (x,)).sum())(
            dict(b.named_parameters())
        )["conv1.weight"],
        "torch.func transform",
    ),
    "forward mode": (_dual, "forward-mode"),
    "subclass": (lambda b, x: b(x.as_subclass(Logged)).as_subclass(torch.Tensor), "the input is .*Logged"),
    "jit trace": (lambda b, x: torch.jit.trace(b, x)(x), None),
    "jit script": (lambda b, x: torch.jit.script(b)(x), None),
    "fx": (lambda b, x: torch.fx.symbolic_trace(b)(x), None),
    "export": (lambda b, x: torch.export.export(b, (x,)).module()(x), None),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.jit.script. fused:UserWarning")
@pytest.mark.parametrize("call, reason", CALLS.values(), ids=CALLS)
def test_callers_that_look_inside(call, reason, block, image):
    plain = block().eval()
    fused = fuse(copy.deepcopy(plain))
    x = image(2, 16, 8)
    assert_same(call(fused, x), call(plain, x))
    if reason is not None:
        assert re.search(reason, fused._fastres_left), fused._fastres_left


def test_exported_graphs_hold_pytorchs_operators(small, block, image):
    exported = torch.export.export(fuse(block()).eval(), (image(2, 16, 8),))
    assert "fastres" not in str(exported.graph)
    torch.fx.symbolic_trace(fuse(small()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_returns_the_classes(small, image):
    model = fuse(small()).eval()
    with pytest.warns(UserWarning, match="fused modules return to their own classes"):
        scripted = torch.jit.script(model)
    x = image()
    assert_same(scripted(x), model(x))
    assert type(model) is resnet.ResNet and not report(model).fused


def test_errors_are_pytorchs_or_name_the_argument(block, image):
    b = fuse(block())
    with pytest.raises((RuntimeError, ValueError)):
        b(torch.randn(16, 8, 8, dtype=torch.float64))
    with pytest.raises(RuntimeError):
        b(torch.zeros(2, 16, 8, 8, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="dtype|type"):
        b(image(2, 16, 8).float())
    with pytest.raises(ValueError, match="input channels"):
        b(image(2, 8, 8))


def test_without_a_kernel_pytorch_runs(block, monkeypatch):
    monkeypatch.setattr("fastres.nn.fused.has_kernel", lambda op, device, dtype: False)
    fused, x = fuse(copy.deepcopy(block())), torch.randn(2, 16, 8, 8, dtype=torch.float64)
    with monkeypatch.context() as m:
        m.setitem(sys.modules["fastres.nn.fused"]._BLOCKS, "bottleneck", None)  # a call of the op would fail
        fused(x)
    assert "no kernel of fastres serves torch.float64 on cpu here" in str(report(fused))
    with fastres.backend("reference"):  # a named backend serves
        fused(x)
    assert fused(x).shape == (2, 32, 4, 4)
