"""What gets built and installed: modules, packages, instruction sets, and the sentences of a build that cannot be."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastres.backends import cpu, native

ROOT = Path(__file__).resolve().parent.parent
CPU_MISSING = "" if native.load("_cpu")[0] else native.load("_cpu")[1]
needs_cpu = pytest.mark.skipif(bool(CPU_MISSING), reason=CPU_MISSING or "built")
needs_source = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")


def python(code: str, *arguments: str, cwd=None, **env: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter without the FASTRES_* variables of this one."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FASTRES_")}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=clean | env, cwd=cwd, capture_output=True, text=True)


# ---- installation


def test_triton_kernels_is_installed_inside_fastres_only(tmp_path):
    code = "import fastres.triton_kernels, importlib.util; print(importlib.util.find_spec('triton_kernels'))"
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    spec = done.stdout.strip()
    assert str(ROOT) not in spec and "fastres" not in spec, f"fastres installs a top-level triton_kernels: {spec}"


def test_distribution_metadata():
    meta = importlib.metadata.metadata("fastres")
    assert meta["License-Expression"] == "BSD-3-Clause"
    assert meta["Requires-Python"] == ">=3.10"
    assert "torch>=2.11" in importlib.metadata.requires("fastres")
    scripts = importlib.metadata.entry_points(group="console_scripts", name="fastres")
    assert [s.value for s in scripts] == ["fastres.cli:main"]
    top_level = importlib.metadata.distribution("fastres").read_text("top_level.txt")
    assert top_level.split() == ["fastres"]


def test_build_info_agrees_with_what_is_there():
    info = native.build_info()
    if not info:
        pytest.skip("no _build.json: the package was not built by setup.py")
    gone = [name for name in info["modules"] if not importlib.util.find_spec(name)]
    if gone:
        pytest.skip(f"{', '.join(gone)} built, then deleted by hand: the record cannot know")
    assert not set(info["modules"]) & set(info["absent"])
    if "fastres._cpu" in info["modules"]:
        assert "scalar" in info["cpu_isas"] and "fast-math" not in json.dumps(info)
        assert info["compiler"].split()[0] in {"GNU", "Clang", "AppleClang"}
    if "fastres._cuda" in info["modules"]:
        assert info["cuda"]["archs"] and "use_fast_math" not in info["cuda"]["flags"]


# ---- sentences of a build that cannot be

# The machine of the test may have everything: a search that finds nothing stands for a machine that has nothing.
BARE = """
import runpy, shutil, sys
found = shutil.which
hidden = sys.argv[1].split(",")
shutil.which = lambda cmd, *a, **k: None if any(h in str(cmd) for h in hidden) else found(cmd, *a, **k)
sys.argv = ["setup.py", *sys.argv[2:]]
runpy.run_path("setup.py", run_name="__main__")
"""
EVERY_COMPILER = "++,nvcc"


@needs_source
def test_cuda_demanded_without_nvcc_fails_with_one_sentence():
    done = python(BARE, "nvcc", "--name", cwd=ROOT, FASTRES_CUDA="1")
    assert done.returncode != 0
    assert "FASTRES_CUDA=1 but nvcc was not found" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@needs_source
@pytest.mark.parametrize("demand", ["FASTRES_CPU", "FASTRES_CUDA", "FASTRES_EMULATOR"])
def test_a_core_demanded_without_compiler_fails_with_one_sentence(demand):
    done = python(BARE, EVERY_COMPILER, "--name", cwd=ROOT, CXX="", **{demand: "1"})
    assert done.returncode != 0
    assert f"{demand}=1 but" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@needs_source
def test_unknown_setting_is_refused():
    done = python(BARE, "none", "--name", cwd=ROOT, FASTRES_CUDA="yes")
    assert done.returncode != 0
    assert "FASTRES_CUDA must be one of auto, 0, 1, got 'yes'" in done.stderr


@needs_source
def test_without_compiler_the_package_is_pure_python_and_says_so(tmp_path):
    tree = tmp_path / "source"
    keep = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "*.egg-info", "build", "dist", ".*")
    shutil.copytree(ROOT, tree, ignore=keep)
    done = python(BARE, EVERY_COMPILER, "-q", "build", "--build-base", str(tmp_path / "build"), cwd=tree, CXX="")
    assert done.returncode == 0, done.stderr
    assert "fastres._cpu is NOT built: no C++ compiler was found" in done.stderr
    (built,) = (tmp_path / "build").glob("lib*")
    assert [p.name for p in built.iterdir()] == ["fastres"]
    info = json.loads((built / "fastres" / "_build.json").read_text())
    assert info["modules"] == [] and "no C++ compiler" in info["absent"]["fastres._cpu"]
    assert not list(built.rglob("*.so"))
    assert (built / "fastres" / "triton_kernels").is_dir()


# ---- instruction sets


@needs_cpu
def test_instruction_sets_are_chosen_at_run_time():
    before = cpu.isa()
    names = cpu.available_isas()
    assert "scalar" in names and before in names
    try:
        for name in names:
            cpu.set_isa(name)
            assert cpu.isa() == name
        with pytest.raises(ValueError, match="must be one of .*scalar.* got 'mmx'"):
            cpu.set_isa("mmx")
        assert cpu.isa() == names[-1]
    finally:
        cpu.set_isa(before)


@needs_cpu
def test_fastres_isa_forces_one_or_raises():
    show = "from fastres.backends import cpu; print(cpu.isa())"
    assert python(show, FASTRES_ISA="scalar").stdout.strip() == "scalar"
    assert python(show).stdout.strip() == cpu.available_isas()[0]
    wrong = python(show, FASTRES_ISA="sse9")
    assert wrong.returncode != 0
    assert "FASTRES_ISA must be one of" in wrong.stderr and "got 'sse9'" in wrong.stderr


@needs_cpu
def test_objects_of_an_instruction_set_share_no_code():
    """A weak symbol compiled for AVX-512 and kept by the linker for everyone would end older machines."""
    nm = shutil.which("nm")
    folders = sorted(ROOT.glob("build/editable-*/CMakeFiles/cpu_*.dir"))
    if not nm or not folders:
        pytest.skip("needs nm and the object files of an editable install")
    for folder in folders:
        namespace = folder.name.removesuffix(".dir").removesuffix("_matrix")
        for path in folder.rglob("*.o"):
            symbols = subprocess.run(
                [nm, "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True
            )
            for line in symbols.stdout.splitlines():
                kind, name = line.split(maxsplit=2)[1:]
                if kind.isupper() or kind in "wv":
                    assert name.startswith((f"{namespace}::", "DW.ref.")), f"{path.name}: {kind} {name}"


# ---- threads


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    M, C = 1500, 136
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(M, C, generator=generator).to(dtype) for _ in range(2))
    T = cpu.tiles(M, C)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 5):
            torch.set_num_threads(n)
            part, back = torch.full((3, T, C), torch.nan), torch.full((2, T, C), torch.nan)
            stat, out = torch.full((5, C), torch.nan), torch.full((M, C), torch.nan, dtype=dtype)
            mask = torch.empty(M, -(-C // 8), dtype=torch.uint8)
            cpu.bn_stats(x, M, C, T, part)
            cpu.bn_finalize(part, T, C, None, None, 1e-5, stat)
            cpu.bn_apply(x, M, C, stat, None, None, True, out, mask)
            cpu.bn_bwd_reduce(grad, x, M, C, stat, None, None, mask, True, T, back, None)
            results.append((part, stat, out, mask, back))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert all(t.isfinite().all() for t in results[0])


@needs_cpu
def test_run_info_names_threads_and_runtime():
    info = cpu.run_info()
    assert info["available"] and info["isa"] in info["available_isas"]
    if info["threads"] > 1:
        assert info["openmp"]
    else:
        assert torch.get_num_threads() == 1 or info["openmp"].startswith("one thread:")


# ---- checks before a launch


@needs_cpu
def test_an_address_never_reaches_the_core_unchecked():
    x, stat = torch.randn(4, 8), torch.ones(5, 8)
    out = torch.empty_like(x)

    def apply(x=x, stat=stat, residual=None, out=out, mask=None):
        cpu.bn_apply(x, 4, 8, stat, residual, None, True, out, mask)

    apply()
    for error, sentence, call in [
        (TypeError, "x must be a tensor, got list", dict(x=[1.0])),
        (TypeError, "stat must be torch.float32, got torch.float64", dict(stat=stat.double())),
        (
            TypeError,
            "residual must be torch.float32, got torch.int64",
            dict(residual=torch.zeros(4, 8, dtype=torch.int64)),
        ),
        (ValueError, "x must be on a cpu device, got meta", dict(x=x.to("meta"))),
        (ValueError, "out must be 4 x 8 elements in dense NHWC", dict(out=torch.empty(8, 4).t())),
        (ValueError, "out must be 4 x 8 elements in dense NHWC", dict(out=torch.empty(4, 7))),
        (ValueError, "out must not overlap residual", dict(residual=out)),
        (ValueError, "stat must be contiguous", dict(stat=torch.ones(8, 5).t())),
        (ValueError, "mask must be contiguous", dict(mask=torch.empty(4, 2, dtype=torch.uint8))),
    ]:
        out.fill_(-1)
        with pytest.raises(error, match=sentence):
            apply(**call)
        assert (out == -1).all(), "something was written before the check"


def test_dense_nhwc_is_told_from_what_is_not():
    t = torch.empty(2, 6, 4, 5)
    assert not native.is_nhwc(t, 40, 6)
    assert native.is_nhwc(t.contiguous(memory_format=torch.channels_last), 40, 6)
    assert native.is_nhwc(torch.empty(2, 4, 5, 6), 40, 6) and native.is_nhwc(torch.empty(240), 40, 6)
    assert native.is_nhwc(torch.empty(0, 6, 4, 5), 0, 6) and native.is_nhwc(torch.empty(2, 6, 1, 1), 2, 6)
    assert native.is_dense(t.permute(3, 1, 0, 2)) and not native.is_dense(t[:, :3]) and not native.is_dense(t[..., ::2])
