"""Models with modules that nobody here knows: known parts are served, the rest stays torch, the result is the same."""

from __future__ import annotations

import types
from collections import OrderedDict

import pytest
import torch
from session_cases import distance, perturbed, pixels, seeded, tiny, truth
from torch import nn

import fastres
from fastres import models


class Scale(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 1.5, channels))

    def forward(self, x):
        return x * self.factor.view(1, -1, 1, 1)


class Wrapper(nn.Module):
    """Calls its parts in its own way: two inputs deep, a dict out, and reads an attribute of a served part."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(*list(tiny().children())[:6])
        self.head = nn.Sequential(nn.Conv2d(128, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.lone = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        f = self.backbone[0](x)
        for stage in list(self.backbone)[1:]:
            f = stage(f)
        out = self.head(f)
        return {"features": f, "out": [self.lone(out), out.sum((2, 3)) + self.head[0].weight.sum()]}


def conv(inputs, outputs, kernel=3, **options):
    return [nn.Conv2d(inputs, outputs, kernel, **options), nn.BatchNorm2d(outputs), nn.ReLU()]


def parts(session) -> list[str]:
    return [getattr(p, "name", None) or "+".join(n.op for n in p.nodes) for p in session.plan.parts]


CHAINS = {
    "scale": ([*conv(3, 8), Scale(8), *conv(8, 6, stride=2)], ["conv", "3", "conv"]),
    "norm": ([nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), *conv(8, 4)], ["conv", "1", "2", "conv"]),
    "batch statistics": ([nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)], ["conv", "1"]),
    "pre-activation": ([nn.BatchNorm2d(3), nn.ReLU(), *conv(3, 4, padding=1)], ["0", "1", "conv"]),
    "no relu": ([nn.Conv2d(3, 8, (3, 5), (2, 1), (0, 2), (1, 2)), nn.BatchNorm2d(8)], ["conv"]),
    "stem": ([*conv(3, 8, 7, stride=2, padding=3), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2)], ["stem", "4"]),
    "head": (
        [*conv(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)],
        ["conv+global_avg_pool+linear+linear"],
    ),
    "linear on pixels": ([*conv(3, 8), nn.Linear(39, 5)], ["conv", "3"]),
    "pool kept": ([*conv(3, 8), nn.AdaptiveAvgPool2d((1, 1)), *conv(8, 4, 1)], ["conv+global_avg_pool+conv"]),
    "pool to 2": ([*conv(3, 8), nn.AdaptiveAvgPool2d(2)], ["conv", "3"]),
    "grouped": ([*conv(3, 12), *conv(12, 24, groups=4, bias=False), nn.Identity()], ["conv+conv"]),
    "reflected": ([*conv(3, 8, padding=1, padding_mode="reflect"), *conv(8, 4)], ["0", "1", "2", "conv"]),
    "nested": ([nn.Sequential(*conv(3, 8)), nn.Sequential(OrderedDict(a=nn.Sequential(*conv(8, 4))))], ["conv+conv"]),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_cut_where_something_is_unknown(name):
    layers, expected = CHAINS[name]
    model, x = nn.Sequential(*layers), pixels()
    torch.manual_seed(1)  # the layers were made when this file was read: what came before must not matter
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    model = perturbed(model)
    session = fastres.optimize(model, x)
    assert parts(session) == expected
    for y in (x, pixels(1, 50, 41, seed=3)):
        wanted = truth(model, y)
        assert wanted.norm() > 0, "a ReLU left nothing to compare"
        assert distance(session(y), wanted) <= 2e-6


def test_a_wrapper_of_known_parts():
    model, x = seeded(Wrapper), pixels()
    session = fastres.optimize(model, x)
    slots = [slot.path for slot in session.plan.parts[0].slots]
    assert slots == ["backbone", "head"]
    got, expected = session(x), truth(model, x)
    assert list(got) == ["features", "out"]
    assert distance(got["features"], expected["features"]) <= 1e-5
    assert all(distance(a, b) <= 1e-5 for a, b in zip(got["out"], expected["out"], strict=True))
    text = str(session.report(measure=False))
    assert "Wrapper is no node of a plan" in text and "head.0" in text
    # The wrapper runs its backbone's stages itself: the backbone as a whole is never called.
    assert "did not run on this input" in text


class Head(nn.Sequential):
    """As torchvision's heads: a class of its own, which only says what is in it."""

    def __init__(self, inputs, outputs):
        super().__init__(*conv(inputs, 8, padding=1), nn.Dropout(0.1), nn.Conv2d(8, outputs, 1))


class Twofold(Head):
    def forward(self, x):
        return super().forward(x) * 2


class Backwards(nn.Sequential):
    def __iter__(self):
        return reversed(self._modules.values())


class Called(Head):
    def __call__(self, x):
        return super().__call__(x + 1)


class Looked(Head):
    def __getattr__(self, name):
        return super().__getattr__(name)


OF_THEIR_OWN = {
    "forward": lambda: Twofold(3, 3),
    "order": lambda: Backwards(nn.Conv2d(4, 3, 1), nn.Conv2d(3, 4, 3, padding=1)),
    "call": lambda: Called(3, 3),
    "attributes": lambda: Looked(3, 3),
}


def test_a_container_of_another_name_is_a_chain():
    model, x = seeded(lambda: nn.Sequential(*conv(3, 4), Head(4, 3))), pixels()
    session = fastres.optimize(model, x)
    assert parts(session) == ["conv+conv+conv"]
    assert distance(session(x), truth(model, x)) <= 2e-6


@pytest.mark.parametrize("what", OF_THEIR_OWN)
def test_a_container_that_runs_in_a_way_of_its_own_is_none(what):
    model, x = seeded(lambda: nn.Sequential(*conv(3, 3), OF_THEIR_OWN[what]())), pixels()
    session = fastres.optimize(model, x)
    assert parts(session) == ["conv", "3"]
    assert distance(session(x), truth(model, x)) <= 2e-6


def test_known_parts_of_a_chain_inside_a_foreign_module():
    """The chain is served as a whole, around what nobody knows, and inside that again."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Sequential(*conv(4, 3, 1)), Head(4, 3)

        def forward(self, x):
            return torch.cat([self.left(x), self.right(x)], 1)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(*conv(3, 4), Branches(), *conv(6, 5))
            self.plain = nn.Sequential(Scale(5), nn.Tanh())
            self.lone = nn.Sequential(nn.Conv2d(5, 5, 1), nn.GELU())  # nothing merges

        def forward(self, x):
            return self.lone(self.plain(self.body(x))).sigmoid()

    model, x = seeded(Model), pixels()
    session = fastres.optimize(model, x)
    (slot,) = session.plan.parts[0].slots
    assert slot.path == "body" and [type(p).__name__ for p in slot.parts[0].parts] == ["Segment", "Foreign", "Segment"]
    assert [inner.path for inner in slot.parts[0].parts[1].slots] == ["body.3.left", "body.3.right"]
    assert distance(session(x), truth(model, x)) <= 2e-6
    report = session.report(measure=False)
    names = [row.name for row in report.rows]
    assert {"body.0", "body.3", "body.4", "body.3.left.0", "body.3.right.0", "body.3.right.4"} <= set(names)
    assert "left its last call" not in str(report) and "did not run" not in str(report)


def test_modules_get_strides_as_they_left_them():
    """Four dimensions behind a foreign module may be anything: channels last in shape, as ConvNeXt's linear layers."""

    class Permute(nn.Module):
        def __init__(self, *dims):
            super().__init__()
            self.dims = dims

        def forward(self, x):
            return x.permute(self.dims)

    class Dense(nn.Module):
        def forward(self, x):
            return x.view(-1, x.shape[-1]).relu().view(x.shape)  # raises for other strides

    there, back = Permute(0, 2, 3, 1), Permute(0, 3, 1, 2)
    inner = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), there, Dense(), back)
    model, x = seeded(lambda: nn.Sequential(*conv(3, 6), there, Dense(), nn.Linear(6, 6), back, inner)), pixels()
    model = model.to(memory_format=torch.channels_last)
    session = fastres.optimize(model, x.contiguous(memory_format=torch.channels_last))
    assert distance(session(x), truth(model, x.contiguous(memory_format=torch.channels_last))) <= 2e-6


def test_known_modules_called_in_unknown_ways_run_as_they_are():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())

        def forward(self, x):
            return self.body(x) + self.body(x.double().to(x.dtype)) + self.body(x[0])[None]

    model, x = seeded(nn.Sequential, nn.Conv2d(3, 3, 1), Twice()), pixels()
    model[1].body[1] = nn.Identity()  # three dimensions pass a convolution, not a norm
    session = fastres.optimize(model, x)
    assert distance(session(x), truth(model, x)) <= 2e-6
    assert "left its last call to torch: the input has 3 dimensions" in str(session.report(measure=False))


def test_hooks_subclasses_and_overrides_are_left_alone():
    seen = []
    model = tiny()
    model.layer2[0].register_forward_hook(lambda m, i, o: seen.append(o.shape) or o + 1)

    class Block(fastres.nn.BasicBlock):
        def forward(self, x):
            return super().forward(x) * 2

    model.layer3[0].__class__ = Block
    x = pixels()
    session = fastres.optimize(model, x)
    assert parts(session) == ["stem+basic_block", "layer2.0", "layer3.0", "basic_block+global_avg_pool+linear"]
    assert distance(session(x), truth(model, x)) <= 1e-5 and seen


def test_a_forward_overridden_on_the_instance_is_what_runs():
    models = pytest.importorskip("torchvision.models", reason="torchvision's classes are the subject")
    model, x = seeded(models.resnet18), pixels()
    model._forward_impl = types.MethodType(lambda self, t: -type(self)._forward_impl(self, t), model)
    session = fastres.optimize(model, x)
    assert [f.name for f in session.plan.foreign()] == [""]
    assert distance(session(x), truth(model, x)) <= 1e-5


def test_a_replaced_classifier_and_stem():
    model = tiny("bottleneck", groups=2, width_per_group=32)
    model.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=True)
    model.maxpool = nn.Identity()
    model.fc = nn.Sequential(nn.Dropout(0.5), nn.Linear(2048, 16), nn.ReLU(), nn.Linear(16, 3, bias=False))
    model, x = perturbed(model), pixels(channels=1)
    session = fastres.optimize(model, x)
    assert parts(session) == ["conv" + "+bottleneck" * 4 + "+global_avg_pool+linear+linear"]
    assert distance(session(x), truth(model, x)) <= 1e-5


def test_frozen_norms_and_dilation():
    model = seeded(models.resnet18, norm_layer=fastres.nn.FrozenBatchNorm2d)
    assert parts(fastres.optimize(model, pixels())) == ["stem" + "+basic_block" * 8 + "+global_avg_pool+linear"]
    model = tiny("bottleneck", replace_stride_with_dilation=(False, True, True))
    session = fastres.optimize(model, pixels())
    assert distance(session(pixels()), truth(model, pixels())) <= 1e-5


def test_a_module_that_refuses_float64_is_compared_in_float32():
    class Constant(nn.Module):
        def forward(self, x):
            return nn.functional.conv2d(x, torch.full((2, 8, 1, 1), 0.25))

    model, x = perturbed(nn.Sequential(*conv(3, 8), Constant())), pixels()
    session = fastres.optimize(model, x)
    assert session.verdict.reference.startswith("float32")
    with pytest.raises(ValueError, match="model: does not run in torch.bfloat16"):
        fastres.optimize(model, x, torch.bfloat16, strict=False)


def test_a_model_of_unknown_modules_alone_runs_where_strict_is_off():
    model, x = Scale(3), pixels()
    session = fastres.optimize(model, x, strict=False)
    with torch.no_grad():
        assert torch.equal(session(x), model(x))
    assert any("nothing in the model is known" in note for note in session.notes)


def test_a_segmenter_of_torchvisions():
    segmentation = pytest.importorskip("torchvision.models.segmentation", reason="torchvision's models are the subject")
    model = seeded(segmentation.deeplabv3_resnet50, weights=None, weights_backbone=None, aux_loss=True, num_classes=4)
    x = pixels(1, 33, 49)
    session = fastres.optimize(model, x)
    slots = {s.path: s for s in session.plan.parts[0].slots}
    assert list(slots) == ["backbone", "classifier", "aux_classifier"]
    assert slots["backbone"].taps == ("aux", "out")
    aspp = slots["classifier"].parts[0].parts[0]
    assert [s.path for s in aspp.slots] == [*(f"classifier.0.convs.{i}" for i in range(4)), "classifier.0.project"]
    got, expected = session(x), truth(model, x)
    assert list(got) == list(expected) == ["out", "aux"]
    assert all(distance(got[k], expected[k]) <= 1e-5 for k in got)
