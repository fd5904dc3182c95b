"""The optional cuDNN backend: refusals, caching, promises kept, its GPU stage.

There is no GPU here: graphs run through ``fake_cudnn.py``, which executes them on CPU memory.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import fake_cudnn
import pytest
import torch
from cudnn_cases import POINT, SQUARE, case, forget, launch

from fastres.backends import cudnn, cudnn_graphs
from fastres.backends.cudnn_graphs import GraphConfig
from fastres.problem import ConvRequest


def request_of(kind="fprop", hooks=(), dtype="bfloat16", device=0, **problem) -> ConvRequest:
    return ConvRequest(kind, dataclasses.replace(SQUARE, **problem), dtype, tuple(sorted(hooks)), device)


pytestmark = pytest.mark.usefixtures("cudnn_anew")

# ---- absent, broken, unfit


def test_absent(device, monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", None)
    (reason,) = cudnn.why_not(request_of())
    assert "nvidia-cudnn-frontend is not installed" in reason and "pip install fastres[cudnn]" in reason
    assert cudnn.candidates(request_of()) == () and cudnn.version() == ""
    arguments, outputs = case("fprop", (), SQUARE, torch.bfloat16)
    with pytest.raises(cudnn.Unsupported, match="cannot serve fprop .* not installed"):
        launch("fprop", arguments, outputs, GraphConfig())


def _raising(error):
    def version():
        raise error

    return version


@pytest.mark.parametrize(
    "change, expected",
    [
        (dict(__version__="1.9.0"), "nvidia-cudnn-frontend 1.9.0 is older than 1.32"),
        (dict(__version__="2.0"), ""),
        (dict(backend_version=lambda: 91300), "cuDNN 9.19.0 or later is needed, got 9.13.0"),
        (dict(backend_version=lambda: 92300), "loaded cuDNN 9.23.0, PyTorch 9.24.0"),
        (dict(backend_version=_raising(OSError("libcudnn.so.9: no such file"))), "OSError: libcudnn.so.9"),
        (dict(pygraph=None), "the module cudnn is not nvidia-cudnn-frontend's"),
    ],
)
def test_package_that_does_not_fit(fake, monkeypatch, change, expected):
    for name, value in change.items():
        if value is None:
            monkeypatch.delattr(fake, name)
        else:
            monkeypatch.setattr(fake, name, value)
    reasons = cudnn.why_not(request_of())
    assert expected in reasons[0] if expected else reasons == []
    assert bool(cudnn.candidates(request_of())) == (not expected)


def test_package_that_fails_to_import(device, monkeypatch, tmp_path):
    (tmp_path / "cudnn.py").write_text("raise AssertionError('two libraries found')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cudnn", raising=False)
    assert "cannot be used: AssertionError: two libraries found" in cudnn.why_not(request_of())[0]


@pytest.mark.parametrize(
    "fields, expected",
    [
        (dict(), None),
        (dict(dtype="float16"), None),
        (dict(dtype="float32"), "bfloat16 and float16 are served, not float32"),
        (dict(device=-1), "CUDA tensors are served"),
        (dict(groups=8), "groups"),
        (dict(C=12), "multiples of 8, got 12 and 8"),
        (dict(K=4), "multiples of 8, got 16 and 4"),
        (dict(N=0), "empty"),
        (dict(hooks=("stats", "residual")), "not behind a residual or a ReLU"),
        (dict(hooks=("stats", "relu")), "not behind a residual or a ReLU"),
        (dict(kind="dgrad", hooks=("add", "mask")), "packed in bits"),
        (dict(kind="dgrad", hooks=("reduce",)), "need act"),
        (dict(kind="dgrad", hooks=("act", "reduce"), stride=(2, 2)), "strided dgrad"),
        (dict(kind="dgrad", hooks=("act",), stride=(2, 2)), None),
        (dict(kind="dgrad", hooks=("pre",), stride=(1, 2)), "strided dgrad"),
        (dict(kind="wgrad", hooks=("pre",)), "dy operand of a wgrad"),
        (dict(kind="wgrad", hooks=("prologue",)), "float16 only"),
        (dict(kind="wgrad", hooks=("prologue",), dtype="float16"), None),
    ],
    ids=str,
)
def test_requests(fake, fields, expected):
    request = request_of(**fields)
    reasons = cudnn.why_not(request)
    assert (reasons == []) if expected is None else any(expected in reason for reason in reasons), reasons
    assert bool(cudnn.candidates(request)) == (expected is None)


def test_machines_that_do_not_fit(fake, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    assert cudnn.why_not(request_of()) == ["torch.backends.cudnn.enabled is False"]
    monkeypatch.undo()
    forget()
    assert "no CUDA device is available" in cudnn.why_not(request_of()) or torch.cuda.is_available()


def test_old_architecture(fake, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert cudnn.why_not(request_of()) == ["compute capability 8.0 or later is needed, got 7.5"]


def test_cudnn_declines(fake):
    fake.declines = "no engine\nWarning: CUDNN_STATUS_NOT_SUPPORTED_DATA_TYPE; Reason: mathPrec != FLOAT\n" * 2
    (reason,) = cudnn.why_not(request_of(hooks=("stats",)))
    assert reason == "graph reductions #0: cuDNN has no plan: NOT_SUPPORTED_DATA_TYPE; Reason: mathPrec != FLOAT"
    assert cudnn.candidates(request_of(hooks=("stats",))) == ()


# ---- configs


@pytest.mark.parametrize(
    "fields", [dict(prologue="half"), dict(vectors="io"), dict(sums="sum"), dict(rank=-1)], ids=str
)
def test_config_refuses(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}: got"):
        GraphConfig(**fields)


def test_candidates_rank_by_rank(fake):
    rows = cudnn.candidates(request_of(hooks=("prologue", "stats"), dtype="float16"))
    assert [str(row) for row in rows] == [
        "graph folded activation genstats #0",
        "graph centred reductions #0",
        "graph folded float32 reductions #0",
        "graph folded activation genstats #1",
        "graph centred reductions #1",
        "graph folded float32 reductions #1",
    ]
    assert [row.rank for row in cudnn.candidates(request_of())] == [0]
    assert cudnn.conv_parts("fprop", SQUARE, rows[0]) == 1


def test_promises_bar_plans(fake):
    cudnn.candidates(request_of())
    (graph,) = fake.graphs
    assert {note.name for note in graph.barred} == set(fake.numerical_note.__members__)


# ---- cache, repeatability, capture


def test_one_graph_a_request_and_wording(fake):
    def run(kind="fprop", hooks=(), p=SQUARE, dtype=torch.bfloat16, config=None):
        launch(kind, *case(kind, hooks, p, dtype), config or GraphConfig())
        return len(fake.graphs)

    assert run() == run() == 1
    assert run(config=GraphConfig(rank=1)) == 1, "plans of one graph share it"
    assert sorted(fake.graphs[0].compiled) == [0, 1], "each compiled once"
    assert run(p=POINT) == 2 and run(dtype=torch.float16) == 3 and run(hooks=("bias",)) == 4
    # why_not plans every wording of a request, a launch compiles its own only.
    centred = run(hooks=("prologue",), config=GraphConfig("centred"))
    assert centred == run(hooks=("prologue",), config=GraphConfig("folded")) == 6
    assert [graph.compiled for graph in fake.graphs[3:]] == [[0], [0], [0]]


def test_config_of_another_request(fake):
    with pytest.raises(ValueError, match="config: got graph centred #0, expected the wording of graph #0"):
        launch("fprop", *case("fprop", (), SQUARE, torch.bfloat16), GraphConfig("centred"))


def test_sums_that_do_not_repeat_are_refused(fake):
    fake.noise = 1e-3
    arguments, outputs = case("dgrad", ("act", "reduce"), SQUARE, torch.bfloat16)
    with pytest.raises(cudnn.Unsupported, match="differ from run to run"):
        launch("dgrad", arguments, outputs, GraphConfig(sums="reductions"))
    launch("dgrad", arguments, outputs, GraphConfig(sums="reductions", repeatable=False))
    arguments, outputs = case("fprop", ("stats",), SQUARE, torch.float16)
    launch("fprop", arguments, outputs, GraphConfig(sums="genstats"))


def test_sums_are_checked_once(fake):
    arguments, outputs = case("fprop", ("stats",), SQUARE, torch.bfloat16)
    launch("fprop", arguments, outputs, GraphConfig(sums="reductions"))
    before = fake.graphs[0].runs
    assert before > 2
    launch("fprop", arguments, outputs, GraphConfig(sums="reductions"))
    assert fake.graphs[0].runs == before + 2


def test_plan_that_does_not_compile(fake):
    fake.broken = (1,)
    arguments, outputs = case("fprop", (), SQUARE, torch.bfloat16)
    for _ in range(2):
        with pytest.raises(cudnn.Unsupported, match="plan 1 .* kernel compilation failure"):
            launch("fprop", arguments, outputs, GraphConfig(rank=1))
    launch("fprop", arguments, outputs, GraphConfig())


def test_nothing_is_compiled_during_capture(fake, monkeypatch):
    arguments, outputs = case("fprop", (), SQUARE, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="run it once before capture"):
        launch("fprop", arguments, outputs, GraphConfig())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    launch("fprop", arguments, outputs, GraphConfig())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    launch("fprop", arguments, outputs, GraphConfig())


# ---- arguments


@pytest.mark.parametrize(
    "kind, hooks, change, expected",
    [
        ("fprop", (), dict(w=torch.zeros(8, 16, 3, 3)), "w must be torch.bfloat16"),
        ("fprop", (), dict(w=torch.zeros(8, 24, 3, 3).bfloat16()), r"w must have shape \[8, 16, 3, 3\]"),
        ("fprop", (), dict(out=torch.zeros(2, 8, 7, 5).bfloat16()), "out must be dense channels_last"),
        ("fprop", (), dict(out=None), "'NoneType'|must be a tensor"),
        ("fprop", ("bias",), dict(bias=torch.zeros(8).double()), r"bias must be contiguous float32 \[8\]"),
        ("fprop", ("stats",), dict(part=torch.zeros(3, 2, 8)), r"part must be contiguous float32 \[3, 1, 8\]"),
        ("dgrad", (), dict(act=torch.zeros(2, 16, 7, 5).bfloat16()), "act and stat come together"),
        ("wgrad", (), dict(dw=torch.zeros(8, 16, 3, 3).half()), "dw must be torch.bfloat16 or torch.float32"),
    ],
    ids=str,
)
def test_bad_arguments(fake, kind, hooks, change, expected):
    arguments, outputs = case(kind, hooks, SQUARE, torch.bfloat16)
    both = {**arguments, **outputs, **change}
    config = cudnn_graphs.wordings(ConvRequest(kind, SQUARE, "bfloat16", hooks))[0]
    with pytest.raises((TypeError, ValueError), match=expected):
        getattr(cudnn, f"conv_{kind}")(**both, config=config)


def test_misaligned(fake):
    arguments, outputs = case("fprop", (), SQUARE, torch.bfloat16)
    storage = torch.zeros(arguments["x"].numel() + 1, dtype=torch.bfloat16)
    x = arguments["x"]
    arguments["x"] = storage[1:].as_strided(x.shape, x.stride())
    with pytest.raises(ValueError, match="x must be aligned to 16 bytes"):
        launch("fprop", arguments, outputs, GraphConfig())


# ---- the GPU stage


@pytest.fixture
def stage(monkeypatch):
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_cudnn.py"
    spec = importlib.util.spec_from_file_location("gpu_cudnn", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_stage_without_a_gpu_or_package(stage, monkeypatch):
    rows = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert stage.run(lambda **row: rows.append(row))
    assert rows == [dict(kind="cudnn", status="refused", why="no CUDA device is available")]


def test_stage_with_a_gpu_but_no_package(stage, device, monkeypatch):
    rows = []
    monkeypatch.setitem(sys.modules, "cudnn", None)
    assert stage.run(lambda **row: rows.append(row))
    assert [row["status"] for row in rows] == ["refused"] and "not installed" in rows[0]["why"]


@pytest.mark.parametrize("noise", [0.0, 1e-4], ids=["repeats", "noisy"])
@pytest.mark.parametrize("damage", [False, True], ids=["right", "wrong"])
def test_stage(stage, fake, monkeypatch, noise, damage):
    """Every pattern has a row; a wrong result fails the stage; sums that vary are measured and marked."""
    rows = []
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(stage, "DEVICE", torch.device("cpu"))
    if damage:
        monkeypatch.setattr(fake_cudnn.Graph, "bias", lambda graph, *, input, bias: graph._op(torch.sub, input, bias))
    fake.noise = noise
    assert stage.run(lambda **row: rows.append(row), shapes=(SQUARE,), runs=1) == (not damage)
    patterns = {" + ".join((kind, *hooks)) for kind, hooks in stage.PATTERNS}
    assert {row["pattern"] for row in rows[1:]} == patterns
    failed = {row["pattern"] for row in rows if row["status"] == "failed"}
    assert failed == ({"fprop + prologue + stats", "wgrad + prologue"} if damage else set())
    measured = [row for row in rows if "microseconds" in row]
    assert all(row["library_microseconds"] > 0 for row in measured)
    assert {row["repeats"] for row in measured if "reductions" in row["config"]} == {not noise}
    assert all("repeats" not in row for row in measured if "reductions" not in row["config"])
