"""fastres.models: torchvision's networks in names, shapes, initialisation and results."""

import pytest
import torch
from torch import nn

from fastres import models
from fastres import nn as fnn

NAMES = [n for n in models.__all__ if n != "ResNet"]
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
}
WHY_TORCHVISION = "compared with torchvision, which is not installed"


@pytest.fixture
def no_values(monkeypatch):
    """Networks of shapes only: drawing the values of the largest takes seconds even on the meta device."""
    for init in ("kaiming_normal_", "kaiming_uniform_"):
        monkeypatch.setattr(nn.init, init, lambda t, *_, **__: t)


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts(name, no_values):
    with torch.device("meta"):
        model = getattr(models, name)()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert name in getattr(models, name).__doc__


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_is_torchvisions(name, no_values):
    torchvision = pytest.importorskip("torchvision", reason=WHY_TORCHVISION)
    with torch.device("meta"):
        ours = getattr(models, name)().state_dict()
        theirs = getattr(torchvision.models, name)(weights=None).state_dict()
    assert list(ours) == list(theirs)
    assert [v.shape for v in ours.values()] == [v.shape for v in theirs.values()]


VARIANTS = {
    "resnet18": ("resnet18", {"zero_init_residual": True}),
    "resnet50 dilated": ("resnet50", {"replace_stride_with_dilation": [False, True, True], "num_classes": 10}),
    "resnext50_32x4d": ("resnext50_32x4d", {}),
    "group norm": ("resnet18", {"norm_layer": lambda c: nn.GroupNorm(8, c)}),
}


@pytest.mark.parametrize("name, options", VARIANTS.values(), ids=VARIANTS)
def test_same_seed_same_network(name, options):
    torchvision = pytest.importorskip("torchvision", reason=WHY_TORCHVISION)
    torch.manual_seed(3)
    ours = getattr(models, name)(**options).double()
    torch.manual_seed(3)
    theirs = getattr(torchvision.models, name)(weights=None, **options).double()
    for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    for training in (True, False):
        ours.train(training), theirs.train(training)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)
    served = [m._fastres_left is None for m in ours.modules() if isinstance(m, fnn.BasicBlock | fnn.Bottleneck)]
    assert all(served) if "norm_layer" not in options else not any(served)


def test_gradients_and_statistics():
    torchvision = pytest.importorskip("torchvision", reason=WHY_TORCHVISION)
    ours = models.ResNet(fnn.Bottleneck, [1, 1, 1, 1], num_classes=5, memory="low").double()
    theirs = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    for model in (ours, theirs):
        nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9, msg=name)
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


def test_options():
    model = models.resnet18(memory="low", num_classes=7)
    assert {m._fastres_memory for m in model.modules() if isinstance(m, fnn.BasicBlock)} == {"low"}
    assert model.fc.out_features == 7
    zero = models.resnet50(zero_init_residual=True)
    assert all(not b.bn3.weight.any() for b in zero.layer2)
    with pytest.raises(ValueError, match="replace_stride_with_dilation: got"):
        models.resnet50(replace_stride_with_dilation=[True])
    with pytest.raises(ValueError, match="layers: got"):
        models.ResNet(fnn.BasicBlock, [2, 2])
    with pytest.raises(ValueError, match="memory: got 'high'"):
        models.resnet18(memory="high")


def test_autocast():
    model = models.ResNet(fnn.BasicBlock, [1, 1, 1, 1], num_classes=5)
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
        loss = nn.functional.cross_entropy(out.float(), torch.tensor([1, 2]))
    loss.backward()
    assert out.dtype == torch.bfloat16 and loss.isfinite()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
               for p in model.parameters())  # fmt: skip
