"""Verified tuning: wrong kernels never serve, right ones are measured, and asking costs a dictionary lookup.

There is no GPU here: requests for GPU 0 are put on trial on CPU tensors, and what plays the kernels is the reference
with planted errors.
"""

from __future__ import annotations

import io
import sys
import timeit
import warnings
from dataclasses import replace

import pytest
import torch
from tuning_cases import DGRAD, PROBLEM, STATS, Config, Timer, kernels, missing_product, model

import fastres
from fastres import dispatch, tuning, tuning_check, tuning_run, tuning_trial
from fastres.tuning import LIBRARY, Choice

# ---- the choice


def test_a_verified_default_serves_and_is_checked_once(gpu):
    fake = gpu(kernels())
    assert tuning.choose(STATS) == Choice("triton", Config())
    runs = len(fake.ran)
    assert runs and tuning.choose(STATS) == Choice("triton", Config()) and len(fake.ran) == runs
    tuning.forget()  # another process finds the verdict on disk
    assert tuning.choose(STATS).config == Config() and len(fake.ran) == runs


def test_a_wrong_kernel_is_switched_off_with_one_warning(gpu, monkeypatch):
    fake = gpu(kernels({"right": missing_product}))
    with pytest.warns(RuntimeWarning, match="triton right is switched off for fprop .* stats of .*: output out") as got:
        assert tuning.choose(STATS) == LIBRARY
        assert tuning.choose(replace(STATS, problem=replace(PROBLEM, N=4))) == LIBRARY
    assert len(got) == 1
    runs = len(fake.ran)
    tuning.forget()
    assert tuning.choose(STATS) == LIBRARY and len(fake.ran) == runs, "the rejection is on disk"


def test_a_crash_is_a_reason_but_not_for_good(gpu):
    def crash(out, inputs):
        raise RuntimeError("out of resources: shared memory")

    gpu(kernels({"right": crash}))
    with pytest.warns(RuntimeWarning, match="failed: RuntimeError: out of resources"):
        assert tuning.choose(STATS) == LIBRARY
    tuning.forget()
    gpu(kernels())
    assert tuning.choose(STATS).backend == "triton"


def test_too_little_memory_is_no_verdict(gpu):
    def crash(out, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    gpu(kernels({"right": crash}))
    with pytest.warns(RuntimeWarning, match="could not be verified: out of GPU memory"):
        assert tuning.choose(STATS) == LIBRARY
    assert tuning.store(0).entries == {}


def test_an_error_that_kills_the_context_is_raised(gpu):
    def crash(out, inputs):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    gpu(kernels({"right": crash}))
    with pytest.raises(torch.AcceleratorError):
        tuning.choose(STATS)


def test_under_graph_capture_nothing_is_decided(gpu, monkeypatch):
    fake = gpu(kernels())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.warns(RuntimeWarning, match="while a CUDA graph is being captured"):
        assert tuning.choose(STATS) == LIBRARY
    assert fake.ran == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tuning.choose(STATS).backend == "triton", "the capture's makeshift must not stick"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.choose(STATS).backend == "triton", "verified before, served under capture"


def test_forced_backends(gpu):
    fake = gpu(kernels({"second": missing_product}))
    fake.offered = (Config("second"), Config())
    with fastres.backend("cpu"):
        assert tuning.choose(STATS) == LIBRARY
    tuning.keep_winner(STATS, LIBRARY, 1.0, 1.0)
    assert tuning.choose(STATS) == LIBRARY
    with fastres.backend("triton"):
        assert tuning.choose(STATS).config == Config()


def test_on_a_cpu_the_library_serves(gpu, monkeypatch):
    fake = gpu(kernels())
    request = replace(STATS, device=-1)
    assert tuning.choose(request) == LIBRARY
    monkeypatch.setattr(dispatch.load("triton"), "interpreting", lambda: True)
    with fastres.backend("triton"):
        assert tuning.choose(request) == Choice("triton", Config())
    assert fake.ran == [], "under the interpreter nothing is verified"


def test_random_state_is_left_alone(gpu):
    gpu(kernels())
    before = torch.get_rng_state()
    tuning.choose(STATS)
    assert torch.equal(torch.get_rng_state(), before)


def test_precision_is_part_of_a_float32_request(gpu, monkeypatch):
    fake = gpu(kernels())
    tuning.choose(STATS)
    runs = len(fake.ran)
    other = "ieee" if tuning_check.fp32_mode() == "tf32" else "tf32"
    monkeypatch.setattr(tuning_check, "fp32_mode", lambda: other)
    tuning.choose(STATS)
    assert len(fake.ran) > runs


def test_an_absent_backend_has_no_candidates_and_a_reason(monkeypatch):
    monkeypatch.setitem(tuning.MODULES, "cudnn", ("fastres.backends.absent", "candidates"))
    monkeypatch.setattr(tuning, "_module", tuning._module.__wrapped__)  # imports anew
    assert "cannot be imported" in tuning._why_not("cudnn", STATS)
    assert tuning._offered("cudnn", STATS) == []
    assert tuning.candidates(replace(STATS, device=-1))[0] == LIBRARY


def test_asking_costs_a_lookup(gpu):
    gpu(kernels())
    request = replace(STATS, dtype="bfloat16")
    tuning.choose(request)
    hashing = min(timeit.repeat(lambda: {request: 1}[request], number=1000, repeat=7))
    asking = min(timeit.repeat(lambda: tuning.choose(request), number=1000, repeat=7))
    assert asking < 4 * hashing, f"{asking * 1e3:.2f} us a call, hashing the request twice {hashing * 1e3:.2f} us"


# ---- tune


def test_the_fastest_right_kernel_wins(gpu, monkeypatch):
    fake = gpu(kernels({"wrong": missing_product}))
    fake.offered = (Config("wrong"), Config("slow"), Config("quick"))
    monkeypatch.setattr(tuning_trial, "microseconds", Timer(library=100.0, wrong=1.0, slow=120.0, quick=50.0))
    heard = []
    with pytest.warns(RuntimeWarning, match="triton wrong is switched off"):
        (row,) = tuning_run.tune_requests([STATS], lambda text, share: heard.append(share))
    assert (row.choice, row.us, row.library_us, row.ratio) == (Choice("triton", Config("quick")), 50.0, 100.0, 2.0)
    assert list(row.rejected) == ["triton wrong"] and "output out" in row.rejected["triton wrong"]
    assert row.timings == {"library": 100.0, "triton slow": 120.0, "triton quick": 50.0}
    assert heard == sorted(heard) and heard[-1] == 1.0
    assert tuning.choose(STATS) == row.choice
    tuning.forget()
    runs = len(fake.ran)
    assert tuning.choose(STATS) == row.choice and len(fake.ran) == runs, "in force in the next process"
    found = tuning._of_gpu(0)
    assert found["entries"] == 1 and found["in_force"][0]["chosen"] == "triton quick"
    assert found["rejected"][0]["choice"] == "triton wrong"


def test_what_is_not_faster_leaves_the_library(gpu, monkeypatch):
    gpu(kernels())
    monkeypatch.setattr(tuning_trial, "microseconds", Timer(library=100.0, right=99.0))
    (row,) = tuning_run.tune_requests([STATS], lambda text, share: None)
    assert row.choice == LIBRARY and row.us == row.library_us == 100.0
    assert tuning.choose(STATS) == LIBRARY, "although the default was shipped"


def test_a_winner_that_is_no_longer_offered_is_forgotten(gpu, monkeypatch):
    fake = gpu(kernels())
    tuning.keep_winner(STATS, Choice("triton", Config("gone")), 1.0, 2.0)
    tuning.forget()
    assert tuning.choose(STATS).config == Config()
    fake.offered = ()


def test_hooks_compete_with_our_kernel_without_hooks(gpu, monkeypatch):
    gpu(kernels())
    plain = replace(DGRAD, hooks=(), device=0)
    hooked = replace(plain, hooks=("act", "reduce"))

    def us(trial, module, config, runs=15):
        return {("library", 0): 100.0, ("ours", 0): 50.0, ("library", 2): 130.0, ("ours", 2): 90.0}[
            "library" if module is None else "ours", len(trial.request.hooks)
        ]

    monkeypatch.setattr(tuning_trial, "microseconds", us)
    rows = tuning_run.tune_requests([hooked, plain], lambda text, share: None)
    assert [row.request for row in rows] == [hooked, plain]
    # 130 less the 50 that our dgrad saves beats 90.
    assert rows[1].choice.backend == "triton" and rows[0].choice == LIBRARY and rows[0].us == 80.0


def test_measuring_runs_what_it_says(gpu):
    fake = gpu(kernels())
    assert tuning.measure(STATS, LIBRARY) > 0 and fake.ran == []
    assert tuning.measure(STATS, Choice("triton", Config())) > 0 and len(fake.ran) == 18


@pytest.fixture
def seen(gpu, monkeypatch):
    """CPU tensors may go to kernels of ours; they are recorded with the tuning's own requests."""
    gpu(kernels())
    monkeypatch.setattr(tuning, "interpreting", lambda: True)
    monkeypatch.setattr(tuning_run, "_tunable", lambda device: True)
    monkeypatch.setattr(tuning_trial, "microseconds", Timer(library=2.0, right=1.0))


def test_tune_records_a_training_step_and_leaves_the_model_alone(seen):
    m, x = model(), torch.randn(2, 64, 6, 6)
    m(x).sum().backward()
    before = {name: t.clone() for name, t in m.state_dict().items()}
    grads = {name: p.grad.clone() for name, p in m.named_parameters()}
    random = torch.get_rng_state()
    rows = fastres.tune(m.eval(), x, progress=lambda text, share: None)
    assert {row.request.kind for row in rows} == {"fprop", "dgrad", "wgrad", "forward", "backward"}
    assert len({row.request for row in rows}) == len(rows)
    ours = [row for row in rows if row.request.kind in ("fprop", "wgrad") or not row.request.hooks]
    assert ours and all(row.choice.backend == "triton" for row in ours)
    assert not any(module.training for module in m.modules())
    assert torch.equal(torch.get_rng_state(), random)
    for name, t in m.state_dict().items():
        assert torch.equal(t, before[name]), name
    for name, p in m.named_parameters():
        assert torch.equal(p.grad, grads[name]), name


def test_tune_says_what_is_wrong_with_its_arguments(gpu, monkeypatch):
    x = torch.randn(2, 64, 6, 6)
    with pytest.raises(TypeError, match="model: got int, expected a torch.nn.Module"):
        fastres.tune(3, x)
    with pytest.raises(TypeError, match="example: got str, expected a tensor or a tuple"):
        fastres.tune(model(), "image")
    with pytest.raises(ValueError, match="dtype: got torch.float64, expected torch.float32"):
        fastres.tune(model(), x, dtype=torch.float64)
    with pytest.raises(ValueError, match="example: got a tensor on cpu, expected one on a CUDA device"):
        fastres.tune(model(), x)
    monkeypatch.setattr(tuning_run, "_tunable", lambda device: True)
    with pytest.raises(ValueError, match="model: no convolution of it is served by fastres"):
        fastres.tune(torch.nn.Conv2d(64, 64, 1), x)
    with pytest.raises(ValueError, match="model: none of its outputs requires grad"):
        fastres.tune(model().requires_grad_(False), x)


def test_nothing_warns_on_the_way(seen):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastres.tune(model(), torch.randn(2, 64, 6, 6), progress=lambda text, share: None)


# ---- the command and doctor


def test_the_command_prints_what_was_chosen(gpu, monkeypatch):
    from rich.console import Console

    from fastres import cli_tune

    fake = gpu(kernels({"wrong": missing_product}))
    fake.offered = (Config("wrong"), Config())
    monkeypatch.setattr(tuning_trial, "microseconds", Timer(library=100.0, wrong=1.0, right=50.0))
    with pytest.warns(RuntimeWarning, match="switched off"):
        rows = tuning_run.tune_requests([STATS], lambda text, share: None)
    terminal = Console(width=100, file=io.StringIO())
    for part in cli_tune.results(rows, "resnet50"):
        terminal.print(part, soft_wrap=isinstance(part, str))
    found = {"directory": "here", "files": {"other.json": 3, "bad.json": "not JSON"}, "gpus": [tuning._of_gpu(0)]}
    for table in cli_tune.section(found, short=False):
        terminal.print(table)
    printed = terminal.file.getvalue()
    for text in (
        "triton right", "2.00x", "100", "50.0", "rejected: triton wrong", "1 distinct convolutions", "here", "Fake GPU",
        "1 entries; 1 tuned, of which 1 by kernels of ours; 1 configurations rejected", "3 entries of another GPU",
        "not JSON", "Switched off on Fake GPU", "Tuned on Fake GPU", "output out",
    ):  # fmt: skip
        assert text in printed, text


def test_without_a_gpu_the_command_is_one_line(monkeypatch, capsys):
    from fastres import cli

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["fastres", "tune", "resnet18"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    assert printed.err.startswith("fastres: error: tune: torch sees no CUDA device")
    assert len(printed.err.strip().splitlines()) == 1


def test_doctor_says_where_the_cache_is(gpu, tmp_path):
    from fastres import doctor

    (tmp_path / "old.json").write_text("{")
    found = doctor.tuning()
    assert found == {"directory": str(tmp_path), "files": {"old.json": found["files"]["old.json"]}, "gpus": []}
    assert "not JSON" in found["files"]["old.json"]
