"""Options and fixtures of the per-op tests.

``--backends cpu,reference`` limits the per-op tests to some backends. By default all that can run on CPU tensors in
this process take part; Triton's interpreter needs a process of its own (see test_triton_interpret.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

# importlib mode leaves sys.path alone; the tests share helper modules.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import kernel_cases  # noqa: E402

import fastres  # noqa: E402
from fastres import cli, dispatch  # noqa: E402
from fastres.backends import cpu  # noqa: E402

ALL = ("reference", "cpu", "emulator", "triton")


def pytest_addoption(parser):
    parser.addoption("--backends", default=",".join(ALL), help=f"per-op tests: comma-separated, of {', '.join(ALL)}")


def pytest_configure(config):
    config.addinivalue_line("markers", "computes_in(dtype): the op under test runs in a dtype other than its input's")


def _backends(config) -> list[str]:
    names = config.getoption("--backends").split(",")
    unknown = sorted(set(names) - set(ALL))
    if unknown:
        raise pytest.UsageError(f"--backends: got {', '.join(unknown)}, expected some of {', '.join(ALL)}")
    return names


# Last, so that a backend is the fastest varying parameter and the backends share the cases made before them.
@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc):
    names = _backends(metafunc.config)
    # The reference is PyTorch's own operators, which check their arguments themselves.
    if "native" in metafunc.fixturenames:
        names = [name for name in names if name != "reference"]
    if "kernels" in metafunc.fixturenames:
        metafunc.parametrize("kernels", kernel_cases.kernels(names), ids=str, indirect=True)
    if "backend" in metafunc.fixturenames:
        here = [name for name in names if not kernel_cases.absent(name)]
        metafunc.parametrize("backend", here, indirect=True)


def pytest_collection_modifyitems(config, items):
    """Backends refuse dtypes (test_dispatch.py holds them to their reasons); those combinations are no tests."""
    refused = [item for item in items if _is_refused(item)]
    if refused:
        config.hook.pytest_deselected(items=refused)
        items[:] = [item for item in items if item not in set(refused)]


def _is_refused(item) -> bool:
    given = item.callspec.params if hasattr(item, "callspec") else {}
    # Without any backend pytest skips the test and says so; it has no value to look at then.
    backend = getattr(given.get("kernels"), "backend", given.get("backend"))
    marker = item.get_closest_marker("computes_in")
    dtype = marker.args[0] if marker else given.get("dtype")
    return isinstance(backend, str) and isinstance(dtype, torch.dtype) and bool(kernel_cases.refuses(backend, dtype))


@pytest.fixture(params=cpu.available_isas() if cpu._module is not None else [])
def isa(request):
    """Every instruction set that the CPU module has here, in force for the test."""
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastres", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return stop.value.code or 0, printed.out, printed.err

    return run


@pytest.fixture
def kernels(request):
    """A :class:`kernel_cases.Kernels`, its instruction set or fiber order in force."""
    with request.param.active():
        yield request.param


@pytest.fixture
def native(kernels):
    """The launch functions of a backend other than the reference."""
    return kernels.launch


@pytest.fixture
def backend(request):
    """Name of a backend that all fastres ops of the test are forced to use."""
    with fastres.backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that fastres allocates holds NaN or 0xA5 until something is written to it."""

    def poisoning(original):
        def allocate(*args, **kwargs):
            t = original(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            ours = caller.startswith("fastres.") and not torch.compiler.is_compiling()
            if ours and not isinstance(t, FakeTensor) and t.device.type != "meta":
                with torch.no_grad():
                    t.fill_(float("nan") if t.is_floating_point() else 0xA5 if t.dtype == torch.uint8 else -1)
            return t

        return allocate

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))


@pytest.fixture(autouse=True)
def engine_without_a_core(monkeypatch):
    """Without a compiled core fused modules step aside for PyTorch's own; tests are to see the engine all the same."""
    if not dispatch.has_kernel("bottleneck", "cpu", torch.float64):
        monkeypatch.setattr("fastres.nn.fused.has_kernel", lambda op, device, dtype: True)


@pytest.fixture(autouse=True)
def fresh_choice():
    """The automatic choice is remembered per request; a test that alters a backend must not leave its choice behind."""
    yield
    dispatch._automatic.cache_clear()


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Puts a fake backend in triton's place; GPU 0 is this CPU. Returns how to install one."""
    from tuning_cases import Config

    from fastres import tuning, tuning_cache, tuning_trial

    monkeypatch.setenv("FASTRES_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning_cache, "key", lambda device: {"gpu": "Fake GPU", "torch": "1"})
    monkeypatch.setattr(tuning_trial, "device_of", lambda request: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tuning, "_why_not", lambda backend, request: "" if backend == "triton" else "absent")
    monkeypatch.setattr(tuning, "_shipped", lambda request: tuning.Choice("triton", Config()))
    tuning.forget()

    def install(fake):
        monkeypatch.setattr(tuning, "_module", lambda backend: fake)
        return fake

    yield install
    tuning.forget()


# ---- the cuDNN backend


@pytest.fixture
def cudnn_anew():
    """Nothing is known of earlier graphs, devices or refusals, before and after."""
    import cudnn_cases

    cudnn_cases.forget()
    yield
    cudnn_cases.forget()


@pytest.fixture
def device(cudnn_anew, monkeypatch):
    """CPU tensors pass for those of a GPU that cuDNN serves."""
    import cudnn_cases

    cudnn_cases.pretend_device(monkeypatch)


@pytest.fixture
def fake(device, monkeypatch):
    """`fake_cudnn.py` in the place of nvidia-cudnn-frontend."""
    import fake_cudnn

    package = fake_cudnn.package()
    monkeypatch.setitem(sys.modules, "cudnn", package)
    return package


@pytest.fixture
def emulator():
    """The emulator's launch functions, or a skip; seed, chip and meter are put back behind the test."""
    kernels = dispatch.load("emulator")
    if kernels.missing:
        pytest.skip(kernels.missing)
    before = kernels.seed()
    yield kernels
    kernels.set_seed(before)
    kernels.module.set_chip("sm_90a", 4)
    kernels.module.meter(False)
