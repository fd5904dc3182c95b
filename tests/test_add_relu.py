"""add_relu: launch functions on every backend, then the public op."""

from __future__ import annotations

import launch_tests
import public_cases
import pytest
import torch
from kernel_cases import DTYPES, NAMES

import fastres
from fastres import testing
from fastres.ops.add_relu import add_relu_ref

FUNCTIONS = ("add_relu_fwd", "add_relu_bwd")


@launch_tests.parametrize(*FUNCTIONS)
def test_values(kernels, function, dtype):
    launch_tests.check_values(kernels, function, dtype)


@launch_tests.parametrize(*FUNCTIONS)
def test_exact(kernels, function, dtype):
    launch_tests.check_exact(kernels, function, dtype)


@launch_tests.parametrize(*FUNCTIONS)
def test_repeats(kernels, function, dtype):
    launch_tests.check_repeats(kernels, function, dtype)


def make(shape=(2, 5, 3, 7), dtype=torch.float32, layout="nhwc", residual_layout=None, kind="normal") -> dict:
    x, residual = (testing.fill(shape, dtype, kind, seed) for seed in (1, 2))
    return dict(
        x=testing.lay_out(x, layout).requires_grad_(),
        residual=testing.lay_out(residual, residual_layout or layout).requires_grad_(),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_against_pytorch(backend, dtype):
    # An addition has one rounding, so the sign of float64 is the sign in every dtype: no mask can flip.
    for shape in testing.ODD_SHAPES:
        got = public_cases.compare(fastres.add_relu, add_relu_ref, make(shape, dtype))
        expected = public_cases.outcome(add_relu_ref, make(shape, dtype)).out
        assert torch.equal(got.out, expected), "the same sum, rounded once, is the same to the bit"


def test_real_shape(backend):
    shape = (1, 256, 56, 56) if backend in ("reference", "cpu") else (1, 64, 14, 14)
    public_cases.compare(fastres.add_relu, add_relu_ref, make(shape))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("residual_layout", ["nhwc", "nchw", "sliced"])
def test_layouts(backend, layout, residual_layout):
    args = make(layout=layout, residual_layout=residual_layout)
    got = public_cases.compare(fastres.add_relu, add_relu_ref, args)
    assert got.out.stride() == torch.empty_like(args["x"]).stride(), "the layout of x"
    assert got.grads["['x']"].stride() == got.out.stride()


@pytest.mark.parametrize("shape", [(), (0,), (17,), (3, 5), (2, 3, 4, 5, 6), (0, 8, 4, 4)], ids=str)
def test_any_rank(backend, shape):
    args = {n: testing.fill(shape, torch.float32, seed=s).requires_grad_() for n, s in (("x", 1), ("residual", 2))}
    public_cases.compare(fastres.add_relu, add_relu_ref, args)


def test_zero_and_nan(backend):
    """Zero stops the gradient, NaN passes it, as in PyTorch; the sign of zero and infinities are kept."""
    values = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-38, -1e-38, 2.0])
    x, residual = values.clone().requires_grad_(), torch.zeros(8, requires_grad=True)
    out = fastres.add_relu(x, residual)
    out.backward(torch.full((8,), 3.0))
    passed = torch.tensor([0.0, 0.0, 3.0, 3.0, 0.0, 3.0, 0.0, 3.0])
    verdict = testing.exactly(out, torch.relu(values), "output")
    assert verdict, verdict.message
    assert torch.equal(x.grad, passed) and torch.equal(residual.grad, passed)


def test_x_is_the_residual(backend):
    x = testing.fill((3, 9), torch.float32).requires_grad_()
    fastres.add_relu(x, x).sum().backward()
    assert torch.equal(x.grad, 2.0 * (x > 0))


@pytest.mark.parametrize("dtype", [torch.float64], ids=NAMES.get)
def test_gradcheck(backend, dtype):
    args = make((2, 3, 2, 3), dtype)
    # Finite differences must not cross the kink.
    with torch.no_grad():
        args["x"][(args["x"] + args["residual"]).abs() < 0.1] += 1
    assert torch.autograd.gradcheck(fastres.add_relu, (args["x"], args["residual"]))


def test_repeats_and_threads(backend):
    public_cases.check_repeats(fastres.add_relu, make())
    public_cases.check_threads(fastres.add_relu, make((2, 24, 16, 16)))


def test_subsets_of_gradients(backend):
    public_cases.check_subsets(fastres.add_relu, make())


def test_incoming_gradients(backend):
    public_cases.check_incoming_gradients(fastres.add_relu, make())


def test_double_backward(backend):
    public_cases.check_double_backward(fastres.add_relu, make())


def test_checkpoint(backend):
    public_cases.check_checkpoint(fastres.add_relu, make())


def test_autocast(backend):
    with torch.autocast("cpu", dtype=torch.bfloat16):  # not on autocast's lists
        public_cases.compare(fastres.add_relu, add_relu_ref, make())


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler):
    public_cases.check_compile(fastres.add_relu, make(), compiler)


def test_compile_dynamic_batch():
    public_cases.check_compile_dynamic(lambda x: fastres.add_relu(x, x + 1), channels=5)


def test_opcheck():
    for layout in ("nhwc", "nchw", "permuted"):
        x, residual = (t.detach() for t in make(layout=layout).values())
        torch.library.opcheck(torch.ops.fastres.add_relu_fwd.default, (x, residual, True, ""))
        torch.library.opcheck(torch.ops.fastres.add_relu_fwd.default, (x, residual, False, ""))
        out, mask = torch.ops.fastres.add_relu_fwd(x, residual, True, "")
        torch.library.opcheck(torch.ops.fastres.add_relu_bwd.default, (x, mask, list(out.stride()), ""))
