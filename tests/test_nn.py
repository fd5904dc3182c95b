"""fastres.nn: drop-in modules, read at call time, equal to the PyTorch modules they stand for."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastres import nn as fnn
from fastres.ops.params import BN


def perturb(module):
    """Statistics and affine parameters away from 0 and 1, or half of the formula goes untested."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, low, high in ((m.weight, 0.5, 1.5), (m.bias, -0.3, 0.3)):
                if t is not None:
                    nn.init.uniform_(t, low, high)
            if m.running_mean is not None:
                m.running_mean.uniform_(-0.3, 0.3)
                m.running_var.uniform_(0.5, 1.5)
    return module


def grads(out, *tensors):
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return torch.autograd.grad((out * weights).sum(), tensors)


def assert_same(a, b, tol=1e-10):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tol, atol=tol)


def image(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def test_add_relu():
    x, r = image(2, 5, 4, 3), image(2, 5, 4, 3)
    out, expected = fnn.AddReLU()(x, r), torch.relu(x + r)
    assert_same([out, *grads(out, x, r)], [expected, *grads(expected, x, r)])
    x, r = torch.randn(7), torch.randn(7)
    assert torch.equal(fnn.AddReLU()(x, r), torch.relu(x + r))
    with pytest.raises(ValueError, match="residual.*shape"):
        fnn.AddReLU()(torch.randn(2, 3), torch.randn(3))


OPTIONS = {
    "default": {},
    "cumulative": {"momentum": None},
    "not affine": {"affine": False},
    "untracked": {"track_running_stats": False},
    "eps": {"eps": 1e-2, "momentum": 0.3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("act", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_batch_norm_act_is_a_batch_norm(options, act, with_residual):
    ours = fnn.BatchNormAct2d(6, **options, act=act).double()
    plain = nn.BatchNorm2d(6, **options).double()
    perturb(plain)
    ours.load_state_dict(plain.state_dict())
    assert list(ours.state_dict()) == list(plain.state_dict())
    for training in (True, True, False):
        ours.train(training), plain.train(training)
        x, r = image(3, 6, 5, 4), image(3, 6, 5, 4) if with_residual else None
        out, expected = ours(x, r), plain(x) + (r if with_residual else 0)
        expected = torch.relu(expected) if act else expected
        wanted = [x, *([r] if with_residual else []), *plain.parameters()]
        got = [x, *([r] if with_residual else []), *ours.parameters()]
        assert_same([out, *grads(out, *got)], [expected, *grads(expected, *wanted)])
    assert_same(ours.state_dict().values(), plain.state_dict().values())


def test_batch_norm_act_falls_back_under_transforms():
    m = perturb(fnn.BatchNormAct2d(3).double()).eval()
    x = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    batched = torch.func.vmap(m)(x)
    assert_same([batched[1]], [m(x[1])])
    assert "act=True" in repr(m)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "groups": 2, "bias": True}, {"kernel_size": 5, "dilation": 2}])
def test_conv_bn_act(training, options):
    m = perturb(fnn.ConvBNAct2d(4, 8, **{"kernel_size": 3, **options}).double()).train(training)
    plain = copy.deepcopy(nn.Sequential(m.conv, m.bn))
    x = image(2, 4, 9, 11)
    for act in (True, False):
        m.act = act
        base = plain(x)
        r = image(*base.shape)
        expected = torch.relu(base + r) if act else base + r
        out = m(x, r)
        assert_same([out, *grads(out, x, r, *m.parameters())], [expected, *grads(expected, x, r, *plain.parameters())])
        assert_same([m(x)], [torch.relu(plain(x)) if act else plain(x)])
    assert {k.partition(".")[0] for k in m.state_dict()} == {"conv", "bn"}
    assert_same(m.state_dict().values(), plain.state_dict().values())


def test_conv_bn_act_rejects_even_kernels_without_padding():
    with pytest.raises(ValueError, match="padding: got None with kernel_size 4"):
        fnn.ConvBNAct2d(3, 4, 4)


def test_conv_bn_act_with_another_norm_runs_it():
    m = fnn.ConvBNAct2d(3, 4, 3, norm_layer=lambda c: nn.GroupNorm(2, c))
    x = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(m(x), torch.relu(m.bn(m.conv(x))))
    assert "GroupNorm" in m._fastres_left


@pytest.mark.parametrize("training", [True, False])
def test_stem(training):
    m = perturb(fnn.Stem(3, 8).double()).train(training)
    plain = copy.deepcopy(nn.Sequential(m.conv1, m.bn1, m.relu, m.maxpool))
    x = image(2, 3, 19, 22)
    out, expected = m(x), plain(x)
    assert m._fastres_left is None
    assert_same([out, *grads(out, x, *m.parameters())], [expected, *grads(expected, x, *plain.parameters())])
    assert_same(m.state_dict().values(), plain.state_dict().values())
    m.maxpool.ceil_mode = plain[3].ceil_mode = True
    assert_same([m(x)], [plain(x)])
    assert "ceil_mode" in m._fastres_left


def block(kind, **options):
    down = nn.Sequential(nn.Conv2d(16, 8 * kind.expansion, 1, 2, bias=False), nn.BatchNorm2d(8 * kind.expansion))
    return perturb(kind(16, 8, stride=2, downsample=down, **options).double())


class Unfused:
    """The same object computing with its modules one by one: what every fused block must equal."""

    def __init__(self, module):
        self.module = copy.deepcopy(module)
        self.module.bn1.register_forward_hook(lambda *_: None)

    def __call__(self, x):
        out = self.module(x)
        assert "hooks" in self.module._fastres_left
        return out


@pytest.mark.parametrize("kind", [fnn.BasicBlock, fnn.Bottleneck])
@pytest.mark.parametrize("memory", ["default", "low"])
def test_blocks(kind, memory):
    m = block(kind, memory=memory)
    plain = Unfused(m)
    for training in (True, False):
        m.train(training), plain.module.train(training)
        x = image(3, 16, 9, 8)
        out, expected = m(x), plain(x)
        assert m._fastres_left is None
        assert_same([out, *grads(out, x, *m.parameters())], [expected, *grads(expected, x, *plain.module.parameters())])
    assert_same(m.state_dict().values(), plain.module.state_dict().values())


@pytest.mark.parametrize("kind", [fnn.BasicBlock, fnn.Bottleneck])
def test_blocks_copy_and_pickle(kind):
    m = block(kind, memory="low")
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert type(twin) is kind and twin._fastres_memory == "low"
        assert torch.equal(m.eval()(x), twin.eval()(x))


def test_bad_arguments():
    with pytest.raises(ValueError, match="memory: got 'none', expected one of 'default', 'low'"):
        fnn.Bottleneck(16, 4, memory="none")
    with pytest.raises(ValueError, match="groups, base_width: got 2"):
        fnn.BasicBlock(16, 16, groups=2)
    with pytest.raises(NotImplementedError, match="dilation: got 2"):
        fnn.BasicBlock(16, 16, dilation=2)


def test_one_value_per_channel_is_refused_and_nothing_is_written():
    m = fnn.BasicBlock(4, 4)
    before = copy.deepcopy(m.state_dict())
    with pytest.raises(ValueError, match="one value per channel"):
        m(torch.randn(1, 4, 1, 1))
    for key, value in m.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_reading_follows_the_module():
    bn = perturb(nn.BatchNorm2d(5))
    assert fnn.read_bn(bn) == BN(
        bn.weight, bn.bias, bn.running_mean, bn.running_var, True, 0.1, 1e-5, bn.num_batches_tracked
    )
    bn.momentum, bn.eps = 0.2, 1e-3
    read = fnn.read_bn(bn)
    assert (read.momentum, read.eps) == (0.2, 1e-3)
    assert not fnn.read_bn(bn.eval()).training and fnn.read_bn(bn).num_batches_tracked is None
    bn.train().track_running_stats = False
    assert fnn.read_bn(bn).running_mean is None and fnn.read_bn(bn).num_batches_tracked is None
    bn.eval().running_mean = bn.running_var = None
    assert fnn.read_bn(bn).training
    bn = nn.BatchNorm2d(5, momentum=None)
    bn.num_batches_tracked = None
    assert fnn.read_bn(bn).momentum == 0.0
    conv = nn.Conv2d(4, 5, 3, padding=1)
    conv.stride, conv.dilation = (2, 2), (3, 3)
    read = fnn.read_conv_bn(conv, bn)
    assert (read.stride, read.padding, read.dilation, read.groups) == ((2, 2), (1, 1), (3, 3), 1)
    with pytest.raises(TypeError, match="GroupNorm"):
        fnn.read_bn(nn.GroupNorm(1, 5))


class TestFrozenBatchNorm2d:
    def test_stays_frozen(self):
        m = perturb(fnn.FrozenBatchNorm2d(4))
        assert list(m.state_dict()) == list(nn.BatchNorm2d(4).state_dict())
        assert not m.weight.requires_grad
        before = copy.deepcopy(m.state_dict())
        x = torch.randn(2, 4, 3, 3)
        plain = nn.BatchNorm2d(4).eval()
        plain.load_state_dict(before)
        nn.Sequential(m).train()
        assert not m.training
        torch.testing.assert_close(m(x), plain(x))
        m.training = True  # even so
        torch.testing.assert_close(m(x), plain(x))
        assert_same(m.state_dict().values(), before.values())

    def test_refuses_a_wrong_mode(self):
        with pytest.raises(ValueError, match="mode: got 1"):
            fnn.FrozenBatchNorm2d(4).train(1)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_graph_breaks(training):
    net = nn.Sequential(fnn.Stem(3, 16), block(fnn.Bottleneck).float(), fnn.ConvBNAct2d(32, 8, 1)).train(training)
    twin = copy.deepcopy(net)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 24, 24)
    out, expected = compiled(x), twin(x)
    torch.testing.assert_close(out, expected)
    ours, theirs = grads(out, *net.parameters()), grads(expected, *twin.parameters())
    for p, g, h in zip(net.parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-4 * float(h.abs().max()) + 1e-6, msg=str(p.shape))
    assert_same(net.state_dict().values(), twin.state_dict().values(), 1e-5)
