"""torchvision's ResNet family: every architecture is fused whole, and equal in float64."""

import copy

import pytest
import torch

import fastres

torchvision = pytest.importorskip("torchvision", reason="torchvision's ResNets are the client under test")
models = torchvision.models

BLOCKS = {
    "resnet18": 8,
    "resnet34": 16,
    "resnet50": 16,
    "resnet101": 33,
    "resnet152": 50,
    "resnext50_32x4d": 16,
    "resnext101_32x8d": 33,
    "resnext101_64x4d": 33,
    "wide_resnet50_2": 16,
    "wide_resnet101_2": 33,
}


@pytest.mark.parametrize("name", BLOCKS)
def test_everything_is_fused(name, monkeypatch):
    for init in ("kaiming_normal_", "kaiming_uniform_"):  # takes seconds in the largest and is not the point
        monkeypatch.setattr(torch.nn.init, init, lambda t, *_, **__: t)
    with torch.device("meta"):
        model = getattr(models, name)(weights=None)
    fastres.fuse(model.to_empty(device="cpu"))
    report = fastres.report(model)
    assert len(report.fused) == BLOCKS[name] + 1 and not report.left


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "name, options",
    [
        ("resnet18", {}),
        ("resnet50", {"memory": "low"}),
        ("resnext50_32x4d", {}),
    ],
)
def test_equal(name, options, training, check, places, image):
    model = getattr(models, name)(weights=None, num_classes=10)
    x = image(2, 64)
    check(model, lambda m: m(x), places(model), training=training, **options)


def test_feature_extraction_of_a_fused_model(image):
    from torchvision.models.feature_extraction import create_feature_extractor

    model = models.resnet18(weights=None).double().eval()
    fused = fastres.fuse(copy.deepcopy(model))
    x = image(1, 64)
    nodes = {"layer2": "a", "avgpool": "b"}
    ours, theirs = create_feature_extractor(fused, nodes)(x), create_feature_extractor(model, nodes)(x)
    for key in ("a", "b"):
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-9, atol=1e-9)


def test_another_head_and_other_channels(check, image):
    """What people do to a torchvision ResNet: a new head, one input channel, no first pooling."""
    model = models.resnet18(weights=None)
    model.conv1 = torch.nn.Conv2d(1, 64, 3, padding=1)
    model.maxpool = torch.nn.Identity()
    model.fc = torch.nn.Identity()
    x = image(2, 24, 1)
    check(model, lambda m: m(x), 8, training=True)
    (left,) = check.report.left
    assert left.path == "" and "maxpool: is torch.nn.Identity" in left.notes
