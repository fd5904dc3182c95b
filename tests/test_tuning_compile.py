"""Compiling ahead of a tuning: other processes fill Triton's cache with what the launchers will ask for."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from fastres import tuning, tuning_check, tuning_compile
from fastres.problem import HOOKS, ConvProblem, ConvRequest, arguments
from fastres.tuning import Choice

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: nothing to compile"
)

POINT = ConvProblem(64, 6, 5, 64, 64, 1, 1)


@pytest.fixture
def offered(monkeypatch, tmp_path):
    """Two configurations for a GPU that is not there; the cache lies in ``tmp_path``."""
    from fastres.triton_kernels.conv_configs import ConvConfig

    configs = (ConvConfig("patch", 64, 64, 64, 4, 1, (64, 1, 1)), ConvConfig("gather", 64, 64, 64, 4, 1))
    choices = [tuning.LIBRARY, *(Choice("triton", c) for c in configs)]
    monkeypatch.setattr(tuning, "candidates", lambda request: choices)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return [ConvRequest("fprop", POINT, "bfloat16", ("stats",)), ConvRequest("dgrad", POINT, "bfloat16", ("add",))]


def test_two_processes_fill_the_cache(offered, tmp_path, recwarn):
    assert tuning_compile.ahead(offered, jobs=2) == 2
    assert not recwarn.list, [str(w.message) for w in recwarn.list]
    made = {path.stem for path in tmp_path.rglob("*.cubin")}
    assert made == {"_patch_kernel", "_conv_kernel"}


def test_a_process_that_fails_costs_a_warning(offered, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.warns(RuntimeWarning, match="kernels are compiled one by one"):
        tuning_compile.ahead(offered, jobs=2)


def test_a_single_processor_compiles_as_it_goes(offered, monkeypatch):
    monkeypatch.setattr(tuning_compile.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(tuning_compile.subprocess, "Popen", lambda *a, **k: pytest.fail("started a process"))
    assert tuning_compile.ahead(offered) == 0
    monkeypatch.setattr(tuning_compile.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuning_compile.ahead(offered) == 0


def test_every_launch_of_a_verification_is_foreseen(offered):
    config = tuning.candidates(None)[2].config
    request = ConvRequest("fprop", POINT, "bfloat16", ("stats",))
    found = list(tuning_compile.variants(request, config))
    sizes = {tuning_check.small(POINT, config), tuning_check.many(POINT, config), POINT}
    assert {problem for problem, *_ in found} == sizes
    assert [part for *_, part in found].count(False) == 1, "a recomputation leaves the statistics out"
    wgrad = list(tuning_compile.variants(ConvRequest("wgrad", POINT, "bfloat16"), config))
    assert {dw for _, dw, _ in wgrad} == {"bfloat16", "float32"}


@pytest.mark.parametrize("kind", HOOKS)
def test_arguments_are_those_of_the_launchers(kind):
    """Every hook brings what the launcher takes under that name, in its shape."""
    p = ConvProblem(2, 6, 5, 24, 16, 3, 3, padding=(1, 1))
    given, named = arguments(kind, p, HOOKS[kind], 7, "float16", lambda type, shape: (type, shape))
    x, w, y = ("float16", (2, 24, 6, 5)), ("float16", (16, 24, 3, 3)), ("float16", (2, 16, 6, 5))
    assert (
        given == {"fprop": [x, w, p.geometry, y], "dgrad": [y, w, p.geometry, x], "wgrad": [y, x, p.geometry, w]}[kind]
    )
    stat = ("float32", (5, 24))
    gradient = {"pre": y, "pre_stat": ("float32", (5, 16)), "coef": ("float32", (3, 16)), "bits": ("uint8", (60, 2))}
    assert (
        named
        == {
            "fprop": {
                "stat": stat,
                "bias": ("float32", (16,)),
                "residual": y,
                "part": ("float32", (3, 7, 16)),
                "relu": True,
            },
            "dgrad": gradient
            | {"add": x, "mask": ("uint8", (60, 3)), "act": x, "stat": stat, "part": ("float32", (2, 7, 24)), "y": x},
            "wgrad": gradient | {"stat": stat},
        }[kind]
    )
    assert arguments(kind, p, (), 7, "float16", lambda type, shape: (type, shape))[1] in ({}, {"relu": False})
