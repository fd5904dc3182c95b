"""freeze_bn: norms that stay frozen under train(), fused and unfused."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastres.fusion import freeze_bn, fuse, report, unfreeze_bn
from fastres.nn import FrozenBatchNorm2d

torchvision = pytest.importorskip("torchvision", reason="fuses torchvision's models, which is not installed")
resnet = torchvision.models.resnet


def assert_same(a, b, tol=1e-9):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# ---- frozen norms


class TestFreeze:
    def test_survives_train_and_comes_back(self, small):
        model = small()
        model.layer1[0].bn1.bias.requires_grad_(False)
        flags = [p.requires_grad for p in model.parameters()]
        keys = list(model.state_dict())
        assert freeze_bn(model) is model
        model.train()
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(type(m) is FrozenBatchNorm2d and not m.training for m in norms)
        assert not any(p.requires_grad for m in norms for p in m.parameters())
        assert list(model.state_dict()) == keys
        unfreeze_bn(model)
        assert all(type(m) is nn.BatchNorm2d and m.training for m in norms)
        assert [p.requires_grad for p in model.parameters()] == flags
        unfreeze_bn(freeze_bn(model.eval()))
        assert not any(m.training for m in norms)

    @pytest.mark.parametrize("train_affine", [True, False])
    @pytest.mark.parametrize("first", ["fuse", "freeze"])
    def test_fused(self, train_affine, first, small, image):
        model = small()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_var.uniform_(0.5, 1.5)
        plain = copy.deepcopy(model).eval()  # what frozen norms compute
        if first == "fuse":
            freeze_bn(fuse(model), train_affine=train_affine)
        else:
            fuse(freeze_bn(model, train_affine=train_affine))
        x = image()
        model.train()
        for m in (model, plain):
            m(x).square().sum().backward()
        assert len(report(model).fused) == 6 and all(r.last_call is None for r in report(model).rows)
        affine = {p for m in model.modules() if isinstance(m, FrozenBatchNorm2d) for p in m.parameters()}
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            if train_affine or p not in affine:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9, msg=name)
            else:
                assert p.grad is None, name
        for a, b in zip(model.buffers(), plain.buffers(), strict=True):
            assert torch.equal(a, b)

    def test_copies_stay_frozen(self, small):
        model = freeze_bn(small())
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert not twin.train().bn1.training
            assert unfreeze_bn(twin).bn1.weight.requires_grad

    def test_what_cannot_be_frozen_is_named(self):
        model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False), nn.SyncBatchNorm(3))
        with pytest.warns(UserWarning, match=r"not frozen.*: 1 \(BatchNorm2d\), 2 \(SyncBatchNorm\)"):
            freeze_bn(model)
        assert type(model[0]) is FrozenBatchNorm2d

    def test_promotion_of_a_buffer_norm_under_autocast_is_left_to_pytorch(self, block, image):
        plain = block(norm_layer=torchvision.ops.FrozenBatchNorm2d).float()
        fused = fuse(copy.deepcopy(plain))
        x = image(2, 16, 8).float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, theirs = fused(x), plain(x)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        assert "promotes torch.bfloat16 to torch.float32" in fused._fastres_left
