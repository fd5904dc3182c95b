"""torchvision's detectors: a fused backbone gives the same losses, gradients and boxes."""

import pytest
import torch

torchvision = pytest.importorskip("torchvision", reason="torchvision's detectors are the client under test")
detection = torchvision.models.detection

OPTIONS = {
    "num_classes": 3,
    "min_size": 64,
    "max_size": 64,
    "box_batch_size_per_image": 16,
    "rpn_batch_size_per_image": 16,
    "rpn_pre_nms_top_n_train": 40,
    "rpn_pre_nms_top_n_test": 40,
    "rpn_post_nms_top_n_train": 20,
    "rpn_post_nms_top_n_test": 20,
    "box_detections_per_img": 5,
}


@pytest.fixture(scope="module", params=["frozen", "batch"])
def detector(request):
    """``fasterrcnn_resnet50_fpn`` with a smaller box head.

    It takes FrozenBatchNorm2d with pretrained weights only, which need a download; built from its parts instead.
    """
    model = _detector(request.param)
    model.roi_heads.box_head = detection.faster_rcnn.TwoMLPHead(256 * 7 * 7, 32)
    model.roi_heads.box_predictor = detection.faster_rcnn.FastRCNNPredictor(32, 3)
    return model


def _detector(norm):
    if norm == "frozen":
        backbone = detection.backbone_utils.resnet_fpn_backbone(
            backbone_name="resnet50",
            weights=None,
            norm_layer=torchvision.ops.FrozenBatchNorm2d,
            trainable_layers=5,
        )
        return detection.FasterRCNN(backbone, **OPTIONS)
    return detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, trainable_backbone_layers=5, **OPTIONS
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_faster_rcnn(detector, training, check, image):
    images = list(image(2, 64))
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 10.0, 60.0, 30.0]], dtype=torch.float64)
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in images]
    check(detector, lambda m: m(images, targets) if training else m(images), 17, training=training)
    kinds = [r.kind.rpartition(".")[2] for r in check.report.fused]
    assert kinds.count("Bottleneck") == 16 and kinds.count("IntermediateLayerGetter") == 1


def test_half_frozen_backbone_trains_the_rest(check, image):
    """The usual fine-tuning: the first layers keep their weights."""
    backbone = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=torchvision.ops.FrozenBatchNorm2d, trainable_layers=2
    )
    x = image(1, 64)
    fused = check(backbone, lambda m: m(x), 17, training=True)
    assert fused.body.layer2[0].conv1.weight.grad is None and fused.body.layer3[0].conv1.weight.grad is not None
