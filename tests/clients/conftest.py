"""What every client test asks: does a fused copy of a real model train and predict as the model does?"""

import copy

import pytest
import torch

import fastres


def _tensors(out):
    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, dict):
        return [t for key in sorted(out) for t in _tensors(out[key])]
    return [t for item in out for t in _tensors(item)]


def _perturb(model):
    """Statistics away from 0 and 1, or half of the formula goes untested; small weights keep deep nets in range."""
    generator = torch.Generator().manual_seed(5)
    for m in model.modules():
        if getattr(m, "running_var", None) is not None:
            m.running_mean.normal_(0, 0.1, generator=generator)
            m.running_var.uniform_(0.5, 1.5, generator=generator)
            with torch.no_grad():
                m.weight.uniform_(0.4, 0.8, generator=generator)
                m.bias.normal_(0, 0.1, generator=generator)
    return model


class Equal:
    """``check(model, call, places)``: ``call(model)`` runs it; ``places`` is how many of them must be fused."""

    def __init__(self):
        self.report = None

    def __call__(self, model, call, places, *, training, tol=1e-9, **options):
        plain = _perturb(copy.deepcopy(model).double()).train(training)
        fused = fastres.fuse(copy.deepcopy(plain), **options)
        self.report = fastres.report(fused)
        assert len(self.report.fused) == places, str(self.report)
        outs = []
        for m in (plain, fused):
            torch.manual_seed(11)  # dropout and the samplers of detectors
            outs.append(_tensors(call(m)))
        assert all(r.last_call is None for r in fastres.report(fused).rows), str(fastres.report(fused))
        assert len(outs[0]) == len(outs[1]) > 0
        assert any(t.numel() for t in outs[0])
        for a, b in zip(*outs, strict=True):
            self.close(b.detach(), a.detach(), tol, "output")
        for tensors in outs:
            sum(t.square().mean() for t in tensors if t.requires_grad).backward()
        seen = 0
        for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                seen += 1
                self.close(q.grad, p.grad, tol, name)
        assert seen
        for (name, p), q in zip(plain.named_buffers(), fused.buffers(), strict=True):
            self.close(q, p, tol, name)
        fastres.restore(fused)
        assert [type(m) for m in fused.modules()] == [type(m) for m in plain.modules()]
        return fused

    @staticmethod
    def close(got, expected, tol, what):
        """Within ``tol`` of the largest element: sums over a network lose digits in proportion to that."""
        assert got.shape == expected.shape and got.dtype == expected.dtype, what
        if expected.numel() == 0:
            return
        scale = max(1.0, float(expected.abs().max()))
        error = float((got - expected).abs().max()) / scale
        assert error <= tol, f"{what}: off by {error:.1e} of its largest element, expected at most {tol:.0e}"


@pytest.fixture
def check():
    return Equal()


@pytest.fixture
def places():
    """Number of residual blocks and stems in a model of torchvision's."""

    def count(model):
        names = [type(m).__name__ for m in model.modules()]
        return sum(names.count(n) for n in ("BasicBlock", "Bottleneck", "ResNet", "IntermediateLayerGetter"))

    return count


@pytest.fixture
def image():
    def make(batch, size, channels=3):
        generator = torch.Generator().manual_seed(7)
        return torch.rand(batch, channels, size, size, generator=generator, dtype=torch.float64)

    return make
