"""torchvision's segmenters: dilated stages, an auxiliary head on an inner stage."""

import pytest

torchvision = pytest.importorskip("torchvision", reason="torchvision's segmenters are the client under test")
segmentation = torchvision.models.segmentation


@pytest.fixture(scope="module")
def model():
    return segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=4, aux_loss=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fcn_resnet50(model, training, check, image):
    assert model.backbone.layer4[1].conv2.dilation == (4, 4)
    x = image(2, 48)
    check(model, lambda m: m(x), 17, training=training)
    left = {r.path for r in check.report.left}
    assert left == {"classifier", "aux_classifier"}
