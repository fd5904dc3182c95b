"""Launches without checks: the table they are generated from, what they call, and that they compute the same bits."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import kernel_cases
import pytest
import torch

from fastres import dispatch, verify
from fastres.backends import native, reference, trusted

NATIVE = [name for name in ("cpu", "emulator") if not kernel_cases.absent(name)]
HERE = Path(__file__).resolve().parent


def test_table_agrees_with_the_reference():
    assert list(trusted.SIGNATURES) == list(native.FUNCTIONS)
    for function, signature in trusted.SIGNATURES.items():
        expected = list(inspect.signature(getattr(reference, function)).parameters)
        assert [name for name, _ in trusted.parameters(signature)] == expected, function


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("function", native.FUNCTIONS)
def test_same_bits_as_checked(name, function):
    backend = dispatch.load(name)
    for _, args, outputs in verify._cases(function, torch.device("cpu"), torch.float32, 24, 37, 3):
        checked, free = ({key: torch.zeros_like(t) for key, t in outputs.items()} for _ in range(2))
        getattr(backend, function)(**args, **checked)
        getattr(backend.trusted, function)(**args, **free)
        for key, t in checked.items():
            assert torch.equal(t, free[key]), key


@pytest.mark.parametrize("name", NATIVE)
def test_everything_else_is_the_backend(name):
    backend = dispatch.load(name)
    assert backend.trusted.name == name and backend.trusted.trusted is backend.trusted
    assert backend.trusted.tiles(1000, 64) == backend.tiles(1000, 64)
    assert backend.trusted.why_not is not None
    with pytest.raises(AttributeError):
        getattr(backend.trusted, "no_such_thing")  # noqa: B009


class Noted:
    """Stands for a compiled module: notes its calls."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, function):
        return functools.partial(self._note, function)

    def _note(self, function, *args):
        self.calls.append((function, args))


def test_gpu_launches_name_stream_and_device(monkeypatch):
    """On CPU tensors, whose device index is -1: the current device, then another one."""
    where = []
    monkeypatch.setattr(trusted, "_device", lambda: -1)
    monkeypatch.setattr(trusted, "_raw_stream", lambda index: 70 + index)
    monkeypatch.setattr(trusted, "elsewhere", lambda index, function, *args: where.append((index, function, args)))
    module = Noted()
    launch = trusted.native_functions(module, None)["bias_act"]
    x, out = torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(4, 8, dtype=torch.bfloat16)
    launch(x, 4, 8, None, None, True, out)
    assert module.calls == [("bias_act", (1, x.data_ptr(), 4, 8, 0, 0, True, out.data_ptr(), 69))]
    monkeypatch.setattr(trusted, "_device", lambda: 3)
    launch = trusted.native_functions(module, None)["bias_act"]
    launch(x, 4, 8, None, None, True, out)
    assert len(module.calls) == 1
    ((index, function, args),) = where
    assert index == -1 and function is launch and args == (x, 4, 8, None, None, True, out)


def test_empty_is_not_absent():
    module = Noted()
    launch = trusted.native_functions(module, lambda: 1)["bias_act"]
    empty = torch.empty(0, 8)
    launch(empty, 0, 8, None, empty, False, empty)
    ((_, args),) = module.calls
    assert args == (0, trusted.EMPTY, 0, 8, 0, trusted.EMPTY, False, trusted.EMPTY, 1)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_replayed_launches_repeat_tritons_own():
    """replay_cases.py compiles for an absent GPU, under a driver that notes launches: a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / "replay_cases.py")]
    done = subprocess.run(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout
