"""The performance model: its kernels against the engine and torchvision, its constants against what was measured."""

from __future__ import annotations

import json
import statistics

import pytest
import torch

import fastres
from fastres import verify
from fastres.backends import reference
from fastres.codegen import __main__ as command
from fastres.codegen import calibration, model, model_page, one_pass_model, plans, roofline
from fastres.problem import problem_of

H100 = model.CHIPS["h100"]
NET = plans.network()
IDENTITY = next(b for b in NET.blocks if b.projection is None)


def test_page_is_current():
    assert model.PATH.read_text() == model.generate(), "run python -m fastres.codegen model"
    assert roofline.PATH.is_file(), "run python -m fastres.codegen model"


# ---- what is counted


@pytest.mark.parametrize("name", plans.MODELS)
def test_geometry_is_torchvisions(name, monkeypatch):
    models = pytest.importorskip("torchvision.models")
    for function in ("kaiming_normal_", "kaiming_uniform_", "uniform_", "ones_", "zeros_", "constant_"):
        monkeypatch.setattr(torch.nn.init, function, lambda t, *args, **kwargs: t)  # slow on meta, and for nothing
    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", lambda self, x: x)
    seen = []

    def look(module, inputs, _):
        geometry = (module.stride, module.padding, module.dilation, module.groups)
        seen.append(problem_of(inputs[0].shape, module.weight.shape, geometry))

    with torch.device("meta"), torch.inference_mode():
        net = getattr(models, name)().eval()
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(look)
        net(torch.empty(2, 3, 96, 96))
    ours = plans.network(name, 2, 96)
    assert sorted(map(str, seen)) == sorted(map(str, ours.convolutions))
    assert ours.parameters == sum(p.numel() for p in net.parameters())


# Activations in Cm elements a pixel, summed by hand. Forward, eager: convolutions 5 + 2 + 5, statistics 6, BN 12, ReLU
# 12, add 12; backward: ReLU 18, sums 12, BN 18, dgrad and wgrad 24, gradients joined 12. A mask is 4/16 of a unit.
@pytest.mark.parametrize("plan, units", [("eager", 138), ("compile", 112), ("fastres", 103), ("A'", 87), ("A", 75.25)])
def test_units_of_an_identity_block(plan, units):
    assert sum(k.activation_bytes for k in plans.kernels(IDENTITY, plan)) == units * IDENTITY.unit


@pytest.mark.parametrize("block", [b for _, _, b in model.kinds(NET)], ids=lambda b: b.name)
def test_every_plan_does_the_same_products_in_fewer_bytes_and_less_time(block):
    found = [plans.kernels(block, plan) for plan in plans.PLANS]
    for kernels in found:
        assert sum(k.flops for k in kernels) == block.flops
        assert sum(k.work == "conv" for k in kernels) == 3 * len(block.convolutions)
    sums = [model.add(kernels, H100) for kernels in found]
    for better, worse in zip(sums[1:], sums[:-1], strict=True):
        assert better.bytes < worse.bytes and better.seconds < worse.seconds


@pytest.mark.parametrize("projected", [False, True])
def test_the_plan_fastres_is_what_the_engine_launches(projected, monkeypatch):
    """A block's BN passes on the reference backend, forward and backward: the same, as often, over as many bytes."""
    name = "layer2.0" if projected else "layer2.1"
    block = next(b for b in plans.network("resnet50", 2, 64).blocks if b.name == name)
    launched = []
    for function in ("bn_stats", "bn_apply", "bn_bwd_reduce", "bn_bwd_apply", "mask_add"):
        original = getattr(reference, function)

        def spy(*args, original=original, function=function):
            launched.append((function, sum(_bytes(a) for a in args)))
            return original(*args)

        monkeypatch.setattr(reference, function, spy)

    def unit(p):
        weight = torch.randn(p.K, p.C // p.groups, p.R, p.S).mul_(0.05).to(memory_format=torch.channels_last)
        one, zero = torch.ones(p.K, requires_grad=True), torch.zeros(p.K, requires_grad=True)
        bn = fastres.BN(one, zero, torch.zeros(p.K), torch.ones(p.K), training=True)
        return fastres.ConvBN(weight.requires_grad_(), bn=bn, stride=p.stride, padding=p.padding)

    first = block.chain[0]
    x = torch.randn(first.N, first.C, first.H, first.W).to(memory_format=torch.channels_last).requires_grad_()
    units = [unit(p) for p in block.convolutions]
    with fastres.backend("reference"):
        fastres.bottleneck(x, units[:3], *units[3:]).sum().backward()

    expected = []
    for k in plans.kernels(block, "fastres"):
        function = k.name.split(",")[0].split()[0]
        if k.work == "fused" and k.name != "add":  # a projection's gradient joins by PyTorch's add
            expected.append((function, sum(_once(k))))
    assert sorted(launched) == sorted(expected)


def _bytes(argument) -> int:
    """Of an activation at two bytes an element (the test runs in float32), or of a mask; vectors are not counted."""
    if not isinstance(argument, torch.Tensor) or (argument.dtype != torch.uint8 and argument.dim() != 4):
        return 0
    return argument.numel() * (1 if argument.dtype == torch.uint8 else 2)


def _once(kernel: plans.Kernel) -> list[int]:
    return [b.bytes for b in (*kernel.reads, *kernel.writes)]


# ---- how long it takes


def test_a_kernel_takes_the_longer_and_a_part_of_the_shorter():
    chip = model.Chip("round", 1e12, 1e14, "")
    one, two = plans.Buffer("a", 10**9), plans.Buffer("b", 10**9)
    conv = plans.Kernel("c", "conv", (one,), (two,), flops=10**11, width=100)
    assert model.time(conv, chip) == model.Time(pytest.approx(2e-3 + calibration.EXPOSED * 1e-3), model.MEMORY)
    narrow = plans.Kernel("c", "conv", (one,), (two,), flops=10**11, width=calibration.FULL_WIDTH // 4)
    assert model.time(narrow, chip) == model.Time(pytest.approx(4e-3 + calibration.EXPOSED * 2e-3), model.CORES)
    passing = plans.Kernel("p", "fused", (one,), (two,))
    assert model.time(passing, chip).seconds == pytest.approx(2e-3 / calibration.BANDWIDTH["fused"])


@pytest.mark.parametrize("entry", calibration.STEP, ids=lambda e: e.work)
def test_constants_give_back_what_was_measured(entry):
    launches, _, ms = model_page.modelled(entry, NET)
    assert launches == entry.launches
    assert ms == pytest.approx(entry.ms, rel=0.05)  # constants are rounded; a map may not pass the copy's bandwidth


@pytest.mark.parametrize("plan, wall, busy, launches", calibration.STEPS)
def test_whole_steps_are_met(plan, wall, busy, launches):
    step = model.step(NET, plan, H100)
    assert step.kernels == pytest.approx(busy, rel=0.03)
    assert step.launches == pytest.approx(launches, rel=0.03)
    if plan != "fastres":  # whose host was slower than the GPU
        assert step.wall == pytest.approx(wall, rel=0.03)


def test_layers_are_met():
    assert set(calibration.LAYERS) == {(p.C, p.K, p.H, p.R, p.stride[0]) for b in NET.blocks for p in b.convolutions}
    errors = [abs(us / modelled - 1) for _, _, us, modelled, _ in model_page.layers()]
    assert statistics.median(errors) < 0.07
    assert sum(e > 0.3 for e in errors) == 4  # cuDNN's own weak ones, which the page names


# ---- results, pages, command line


def _row(**changes) -> dict:
    row = {"mode": "training", "model": "resnet50", "dtype": "bf16", "shape": [256, 3, 224, 224], "backend": "fastres"}
    row |= {"median_ms": 40.0, "memory": "default", "machine": {"gpus": [{"name": "NVIDIA H100 80GB HBM3"}]}}
    return {**row, **changes}


def test_measured_rows_stand_next_to_predictions(tmp_path):
    rows = [
        _row(),
        _row(backend="torch.compile"),
        _row(backend="other"),
        _row(memory="low"),
        _row(mode="inference"),
        _row(shape=[64, 3, 224, 224]),
        _row(machine={"gpus": []}),
        {"stage": "ops"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = model.measured(NET, H100, tmp_path)
    assert [(r.contestant, r.plan) for r in found] == [("fastres", "A'"), ("torch.compile", "compile")]
    assert model.measured(NET, model.CHIPS["a100-80"], tmp_path) == []
    _, ((*_, ratio), _) = model.measured_table(found)
    assert float(ratio) == pytest.approx(40 / model.step(NET, "A'", H100).wall, abs=0.01)
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ValueError, match="b.json: expected a JSON list of result rows"):
        model.measured(NET, H100, tmp_path)
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ValueError, match="b.json: expected a JSON list of result rows, got dict"):
        model.measured(NET, H100, tmp_path)


def test_command_prints_and_names_what_is_wrong(capsys):
    assert command.main(["model", "--chip", "l4", "--model", "resnet18", "--batch", "32", "--size", "96"]) == 0
    printed = capsys.readouterr().out
    assert "resnet18" in printed and "batch 32" in printed and "plan A'" in printed and "…" not in printed
    for arguments, message in (
        (["--chip", "h900"], "--chip: got 'h900', expected one of h100"),
        (["--model", "vgg16"], "--model: got 'vgg16', expected one of resnet18"),
        (["--batch", "0"], "--batch: got 0, expected at least 1"),
        (["--size", "8"], "--size: got 8, expected at least 32 pixels"),
        (["--batch", "8", "--check"], "--check: the page has one model and batch; got --batch as well"),
    ):
        with pytest.raises(SystemExit):
            command.main(["model", *arguments])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["cuda", "--batch", "8"])
    assert "--batch: expected with the table model only, got cuda" in capsys.readouterr().err
    with pytest.raises(ValueError, match="plan: got 'B', expected one of eager, compile"):
        plans.kernels(IDENTITY, "B")


def test_roofline_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = roofline.draw(tmp_path / "deep" / "roofline.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    for stage in range(1, 5):
        points = [roofline.stage_point(NET, plan, stage, H100) for plan in plans.PLANS]
        for intensity, rate, _ in points:
            assert rate * 1e12 < min(H100.rate, intensity * H100.bandwidth)
        assert points == sorted(points, key=lambda p: p[0])


# ---- batch normalisation in one launch


def test_units_of_one_launch_are_its_tensors():
    """Every tensor of the launch once, beside scratch and per-channel vectors; separately, read twice what is kept."""
    C, M = 8, 4096
    for case, function, which in (("forward", "bn_one_pass_fwd", 0), ("forward, residual", "bn_one_pass_fwd", 1),
                                  ("backward", "bn_one_pass_bwd", 0)):  # fmt: skip
        separate, one, again, kept = one_pass_model.UNITS[case]
        _, args, outputs = verify._cases(function, torch.device("cpu"), torch.bfloat16, C, M, 2)[which]
        tensors = [t for t in (*args.values(), *outputs.values()) if isinstance(t, torch.Tensor) and t.numel() == M * C]
        assert one == len(tensors) - ("y" in outputs) and separate - one == again == kept


def test_one_launch_pays_where_launches_cost():
    small, large = (one_pass_model.times("forward", n, H100) for n in (100_000, 20_000_000))
    assert small.warm / small.one > 1.1 and 1 < large.warm / large.one < 1.1, "with L2 only launches are saved"
    assert large.cold / large.one > 1.3
