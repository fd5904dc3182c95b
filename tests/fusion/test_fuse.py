"""A fused model is the model it was: identity, copies, training, folding, compilation."""

import copy
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from fastres import fusion
from fastres.fusion import freeze_bn, fuse, report, restore, unfreeze_bn
from fastres.nn import Bottleneck as NativeBottleneck

torchvision = pytest.importorskip("torchvision", reason="fuses torchvision's models, which is not installed")
resnet = torchvision.models.resnet


def quietly_fused(model, **options):
    """``fuse`` where it is expected to find nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fuse(model, **options)


def assert_same(a, b, tol=1e-9):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


# ---- what stays


def test_only_the_class_changes(small, image):
    model = small()
    parameters, modules, classes = list(model.parameters()), list(model.modules()), [type(m) for m in model.modules()]
    keys, attributes = list(model.state_dict()), {m: set(vars(m)) for m in modules}
    calls = []
    model.layer1[0].register_forward_hook(lambda *_: calls.append("block"))
    model.register_forward_pre_hook(lambda *_: calls.append("model"))
    assert fuse(model) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert list(model.state_dict()) == keys
    assert isinstance(model, resnet.ResNet) and isinstance(model.layer1[0], resnet.Bottleneck)
    assert type(model.layer1[0]) is not resnet.Bottleneck
    assert len(report(model).fused) == 6 and not report(model).left
    model(image())
    assert calls == ["model", "block"]
    fuse(model)  # again
    assert len(report(model).fused) == 6
    assert restore(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert {m: set(vars(m)) for m in modules} == attributes


@pytest.mark.parametrize("memory", ["default", "low"])
def test_copy_pickle_save(memory, tmp_path, small, image):
    model = fuse(small(), memory=memory, fold=True).eval()
    x = image()
    with torch.no_grad():
        expected = model(x)
    torch.save(model, tmp_path / "model.pt")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    twins = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ]
    for twin in twins:
        assert type(twin.layer1[0]) is type(model.layer1[0])
        assert {r.options[0] for r in report(twin).fused} == ({"memory=low"} if memory == "low" else {"fold"})
        with torch.no_grad():
            assert torch.equal(twin(x), expected)
    plain = small().eval()
    plain.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert_same(plain(x), expected)
    assert_same(quietly_fused(restore(twins[0]))(x), expected)


def test_pickle_of_a_fused_model_is_as_large_as_before(small, image):
    model = small().eval()

    def size(m):
        buffer = io.BytesIO()
        torch.save(m, buffer)
        return buffer.tell()

    before = size(model)
    fuse(model, fold=True)
    with torch.no_grad():
        model(image())
    assert "weights folded" in str(report(model))
    assert size(model) < before * 1.01


# ---- training is the same


@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_five_steps_of_sgd(kind, memory, momentum, small, image):
    model = small(kind)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = momentum
    twin = fuse(copy.deepcopy(model), memory=memory)
    data = [(image(4, size=64), torch.randint(5, (4,))) for _ in range(5)]
    for m in (model, twin):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(m(x), y).backward()
            optimizer.step()
    assert all(r.last_call is None for r in report(twin).rows)
    for (key, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9, msg=key)
    assert int(twin.layer1[0].bn1.num_batches_tracked) == 5
    x = image()
    assert_same(twin.eval()(x), model.eval()(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_saved_for_backward(dtype):
    """Unique storages that autograd keeps, parameters excluded, of one resnet50 training step."""
    model = torchvision.models.resnet50(weights=None).to(dtype, memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64, dtype=dtype).contiguous(memory_format=torch.channels_last)

    def saved():
        own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        held = {}

        def pack(t):
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = (storage.nbytes(), t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = model(x)
        assert out.requires_grad
        return sum(size for size, _ in held.values())

    eager, default, low = saved(), (fuse(model), saved())[1], (fuse(model, memory="low"), saved())[1]
    print(f"saved for backward, {dtype}: default {default / eager:.3f}, low {low / eager:.3f} of eager's {eager} bytes")
    assert all(r.last_call is None for r in report(model).rows)
    assert default <= 0.87 * eager
    assert low <= 0.55 * eager


def test_checkpointing_counts_once(small, image):
    model = fuse(small())
    x = image(2, 8, 16).requires_grad_()
    torch.utils.checkpoint.checkpoint(model.layer1, x, use_reentrant=False).sum().backward()
    assert int(model.layer1[0].bn1.num_batches_tracked) == 1


# ---- evaluation with folded weights


class TestFold:
    def models(self, small):
        model = small().eval()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.1)
                m.running_var.uniform_(0.5, 1.5)
                nn.init.uniform_(m.weight, 0.5, 1.5)
        return model, fuse(copy.deepcopy(model), fold=True)

    @torch.no_grad()
    def test_same_result_and_no_stale_weights(self, small, image):
        model, twin = self.models(small)
        x = image()
        assert_same(twin(x), model(x))
        assert_same(twin(x), model(x))  # from the cache

        def write(m):
            m.layer2[0].conv2.weight.mul_(1.5)
            m.bn1.running_var.add_(0.5)

        def replace(m):
            m.layer3[0].conv1.weight = nn.Parameter(m.layer3[0].conv1.weight * 2)

        def move(m):
            m.float().double()

        def reload(m):
            m.load_state_dict({k: v + 1 if "bn2.bias" in k else v for k, v in m.state_dict().items()})

        def constant(m):
            m.layer1[1].bn2.eps = 0.1

        def through_data(m):
            m.layer1[0].conv1.weight.data.mul_(0.5)
            m.train().eval()

        for change in (write, replace, move, reload, constant, through_data):
            change(model), change(twin)
            assert_same(twin(x), model(x)), change

    def test_training_and_grad_are_not_folded(self, small, image):
        model, twin = self.models(small)
        x = image().requires_grad_()
        ours, theirs = twin(x), model(x)
        assert_same(ours, theirs)
        assert_same(*(torch.autograd.grad(y.sum(), x)[0] for y in (ours, theirs)))
        assert "weights folded" not in str(report(twin))
        model.train(), twin.train()
        with torch.no_grad():
            assert_same(twin(x), model(x))
        assert_same(twin.layer1[0].bn2.running_mean, model.layer1[0].bn2.running_mean)

    def test_train_drops_the_weights(self, small, image):
        _, twin = self.models(small)
        with torch.no_grad():
            twin(image())
        assert "weights folded" in str(report(twin))
        twin.train()
        assert "weights folded" not in str(report(twin))

    def test_under_autocast_and_inference_mode(self, small, image):
        model, twin = self.models(small)
        model, twin = model.float(), twin.float()
        x = image().float()
        with torch.inference_mode():
            torch.testing.assert_close(twin(x), model(x), rtol=1e-3, atol=1e-3)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert twin(x).dtype == torch.bfloat16
        with torch.no_grad():
            torch.testing.assert_close(twin(x), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("function", [fuse, restore, report, freeze_bn, unfreeze_bn])
def test_bad_models(function):
    with pytest.raises(TypeError, match="model: got dict, expected a torch.nn.Module"):
        function({})


def test_bad_options(small):
    with pytest.raises(ValueError, match="memory: got 'tiny', expected one of 'default', 'low'"):
        fuse(small(), memory="tiny")
    with pytest.raises(TypeError, match="fold: got int"):
        fuse(small(), fold=1)
    with pytest.raises(TypeError, match="train_affine: got str"):
        freeze_bn(small(), train_affine="yes")


def test_options_reach_native_blocks():
    model = nn.Sequential(NativeBottleneck(16, 4))
    assert fuse(model, memory="low") is model and type(model[0]) is NativeBottleneck
    (row,) = report(model).rows
    assert (row.op, row.options, row.kind) == ("bottleneck", ("memory=low",), "fastres.nn.blocks.Bottleneck")
    restore(model)
    assert report(model).rows[0].options == ()


def test_no_client_library_is_imported():
    code = (
        "import sys, warnings, torch, fastres.fusion as f; warnings.simplefilter('ignore');"
        "f.report(f.fuse(torch.nn.Linear(1, 1))); print([m for m in f.registry.CLIENTS if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
    assert "torchvision" in fusion.registry.CLIENTS


def test_report_is_data_and_text(small):
    model = fuse(small(), memory="low")
    model.layer4[0].bn1 = nn.GroupNorm(8, 64).double()
    data, text = report(model).to_dict(), str(report(model))
    assert data["model"] == "torchvision.models.resnet.ResNet" and len(data["rows"]) == 6
    assert "5 of 6 places fused" in text
    line = next(line for line in text.splitlines() if line.startswith("layer4.0"))
    assert "PyTorch" in line and "bn1: is torch.nn.GroupNorm" in line
    assert next(line for line in text.splitlines() if line.startswith("(model)")).split()[2] == "stem"


# ---- autocast and torch.compile


def test_autocast_trains(small, image):
    plain = small().float()
    fused = fuse(copy.deepcopy(plain))
    x = image(4, size=64).float()
    outs = []
    for m in (plain, fused):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = m(x)
        out.float().square().sum().backward()
        outs.append(out)
    assert outs[0].dtype == outs[1].dtype == torch.bfloat16
    assert all(r.last_call is None for r in report(fused).rows)
    for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
        assert q.grad.dtype == p.grad.dtype == torch.float32 and q.grad.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory", ["default", "low"])
def test_compiles_without_graph_breaks(training, memory, block, image):
    torch._dynamo.reset()
    plain = block().float().train(training)
    fused = fuse(copy.deepcopy(plain), memory=memory)
    # One case all the way through inductor; the graph that the others hand to it is what differs.
    compiled = torch.compile(fused, fullgraph=True, backend="inductor" if training and memory == "low" else "aot_eager")
    x = image(2, 16, 8).float()
    for _ in range(2):
        ours, theirs = compiled(x), plain(x)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        ours.square().sum().backward(), theirs.square().sum().backward()
    for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-3 * float(p.grad.abs().max()))
    for p, q in zip(plain.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-4)


def test_compiled_transforms_stay_right(block, image):
    torch._dynamo.reset()
    plain = block().eval()
    fused = fuse(copy.deepcopy(plain))
    x = image(2, 16, 8)[None]
    assert_same(torch.compile(torch.func.vmap(fused), backend="aot_eager")(x)[0], plain(x[0]))
