"""Replay of Triton launches: every launcher, once through Triton and once from its record, must launch the same.

Run by test_trusted.py in a process of its own. The driver is a stand-in that notes launches; kernels are compiled for
sm_90 and never run, so CPU tensors serve as addresses.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres import triton_kernels, verify
from fastres.backends import replay, trusted

LAUNCHES: list[tuple] = []


class Launcher:
    def __init__(self, src, metadata):
        pass

    def __call__(self, *args):
        # grid, stream, function, packed metadata; then launch metadata and hooks, which may differ; then the arguments
        LAUNCHES.append((*args[:6], *(_plain(a) for a in args[9:])))


def _plain(value):
    if isinstance(value, TensorDescriptor):
        return (_plain(value.base), list(value.shape), list(value.strides), list(value.block_shape))
    return value.data_ptr() if hasattr(value, "data_ptr") else value


class Utilities:
    def load_binary(self, *_):
        return 1, 2, 10, 0, 1024

    def get_device_properties(self, _):
        return {"max_shared_mem": 232448}

    def unload_module(self, _):
        pass


class Driver:
    utils, launcher_cls = Utilities(), Launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    driver.set_active(Driver())
    monkeypatch.setattr(replay, "current_device", lambda: -1)  # of a CPU tensor
    monkeypatch.setattr(replay, "current_stream", lambda _: 7)
    LAUNCHES.clear()


def launches(function, *args, **kwargs) -> list[tuple]:
    LAUNCHES.clear()
    function(*args, **kwargs)
    return list(LAUNCHES)


def plans(function) -> dict:
    return function.__globals__["plans"]


@pytest.mark.parametrize("name", trusted.SIGNATURES)
def test_every_launcher(name):
    launcher = getattr(triton_kernels, name)
    fast = replay.replayed(launcher, trusted.SIGNATURES[name])
    order = [field for field, _ in trusted.parameters(trusted.SIGNATURES[name])]
    for count, (_, inputs, outputs) in enumerate(
        verify._cases(name, torch.device("cpu"), torch.bfloat16, 64, 96, 4), 1
    ):
        given = {**inputs, **outputs}
        args = [given.get(field) for field in order]
        own = launches(launcher, *args)
        assert own and own == launches(fast, *args), "recording"
        assert own == launches(fast, *args), "replaying"
        assert len(plans(fast)) == count
        fresh = [t.clone() if isinstance(t, torch.Tensor) else t for t in args]
        assert launches(launcher, *fresh) == launches(fast, *fresh) != own
        assert len(plans(fast)) == count, "other addresses are the same plan"


def case(x=None, out=None, M=8, C=64):
    x = torch.zeros(M, C) if x is None else x
    return x, M, C, torch.zeros(5, C), None, None, True, torch.zeros(M, C) if out is None else out, None


def test_one_buffer_in_two_places():
    fast = replay.replayed(triton_kernels.bn_apply, trusted.SIGNATURES["bn_apply"])
    x = torch.zeros(8, 64)
    launches(fast, *case(x, x))
    apart = case(torch.zeros(8, 64), torch.zeros(8, 64))
    assert launches(fast, *apart) == launches(triton_kernels.bn_apply, *apart)


def test_misaligned_addresses_are_specialised_by_triton():
    fast = replay.replayed(triton_kernels.bn_apply, trusted.SIGNATURES["bn_apply"])
    memory = torch.zeros(8 * 64 + 1)
    for x in (torch.zeros(8, 64), memory[1:].view(8, 64)):
        for _ in range(2):
            args = case(x)
            assert launches(fast, *args) == launches(triton_kernels.bn_apply, *args)
    assert len(plans(fast)) == 1


def test_nothing_to_launch():
    fast = replay.replayed(triton_kernels.bn_apply, trusted.SIGNATURES["bn_apply"])
    assert launches(fast, *case(M=0)) == launches(fast, *case(M=0)) == []


def test_profilers_get_tritons_own_launch():
    fast = replay.replayed(triton_kernels.bn_apply, trusted.SIGNATURES["bn_apply"])
    args = case()
    launches(fast, *args)
    kept = dict(plans(fast))
    plans(fast).clear()
    plans(fast).update(dict.fromkeys(kept))
    for key in kept:
        plans(fast)[key] = lambda *_: pytest.fail("replayed under a hook")
    heard = []
    knobs.runtime.launch_enter_hook.add(heard.append)
    try:
        assert len(launches(fast, *args)) == 1
    finally:
        knobs.runtime.launch_enter_hook.remove(heard.append)


@triton.jit
def _copy_kernel(x_ptr, work_ptr, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(work_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def _described_kernel(x_desc, out_ptr, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(out_ptr + i[:, None] * B + i[None, :], x_desc.load([0, 0]))


def through_workspace(x, n, out):
    work = x.new_empty(0).float().new_empty((n,))
    _copy_kernel[(1,)](x, work, n, B=64)
    _copy_kernel[(1,)](work, out, n, B=64)


def through_zeros(x, n, out):
    work = x.new_zeros((n,))
    _copy_kernel[(1,)](work, out, n, B=64)


def described(x, *, pre=None, out):
    _described_kernel[(1,)](TensorDescriptor(x, list(x.shape), [x.shape[1], 1], [32, 32]), out, B=32)


def test_workspaces_are_made_anew():
    fast = replay.replayed(through_workspace, "x* n out*")
    x, out = torch.zeros(64), torch.zeros(64)
    for _ in range(2):
        (_, first), (second, _) = [row[6:8] for row in launches(fast, x, 64, out)]
        assert first == second not in (x.data_ptr(), out.data_ptr())
    assert len(plans(fast)) == 1


def test_other_tensor_work_is_refused():
    fast = replay.replayed(through_zeros, "x* n out*")
    for _ in range(3):
        assert len(launches(fast, torch.zeros(64), 64, torch.zeros(64))) == 1
    assert not plans(fast)


def test_descriptors_follow_their_base():
    fast = replay.replayed(described, "x@ | pre! out*")
    for rows in (32, 32, 64):
        x, out = torch.zeros(rows, 32), torch.zeros(32, 32)
        assert launches(fast, x, out=out) == launches(described, x, out=out)
    assert len(plans(fast)) == 2
    assert len(launches(fast, x, pre=(x,), out=out)) == 1 and len(plans(fast)) == 2
