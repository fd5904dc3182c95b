"""segmentation-models-pytorch: torchvision's blocks in its encoder, its own Conv2dReLU in its decoder."""

import pytest
import torch

import fastres

smp = pytest.importorskip(
    "segmentation_models_pytorch", reason="segmentation-models-pytorch's U-Net is the client under test"
)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_unet_resnet34(training, check, image):
    model = smp.Unet("resnet34", encoder_weights=None, classes=2)
    x = image(2, 64)
    check(model, lambda m: m(x), 16 + 10, training=training)
    ops = [r.op for r in check.report.fused]
    assert ops.count("basic_block") == 16 and ops.count("conv_bn_act") == 10
    (left,) = check.report.left
    assert left.path == "encoder" and "subclass of torchvision.models.resnet.ResNet" in left.notes


def test_dilated_encoder_changes_geometry_after_construction(check, image):
    model = smp.DeepLabV3("resnet18", encoder_weights=None, classes=2, encoder_output_stride=16)
    fused_first = fastres.fuse(smp.Unet("resnet18", encoder_weights=None))
    x = image(2, 64)
    check(model, lambda m: m(x), 8, training=False)
    # A model that is fused first and changed afterwards: stride and dilation are read at every call.
    encoder = fused_first.encoder.double().eval()
    before = encoder(x)[-1]
    for conv in (encoder.layer4[0].conv1, encoder.layer4[0].downsample[0]):
        conv.stride = (1, 1)
    assert encoder(x)[-1].shape[-1] == 2 * before.shape[-1]
    expected = fastres.restore(encoder)(x)[-1]
    torch.testing.assert_close(fastres.fuse(encoder)(x)[-1], expected, rtol=1e-9, atol=1e-9)


def test_decoder_without_a_norm_is_left_alone():
    model = smp.Unet("resnet18", encoder_weights=None, decoder_use_norm=False)
    fastres.fuse(model)
    left = [r for r in fastres.report(model).left if r.path.startswith("decoder")]
    assert len(left) == 10 and all("1: is torch.nn.Identity" in r.notes for r in left)
