"""The shape of the house: one name per op in every room, imports one way, no file too long."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from fastres import dispatch

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastres"

#: What the files of an op are called in each room.
ROOMS = {
    "csrc/cpu": "{}.cpp",
    "csrc/cuda": "{}.cu",
    "triton_kernels": "{}.py",
    "fastres/ops": "{}.py",
    "tests": "test_{}.py",
    "benchmarks": "bench_{}.py",
}

#: The one table of exceptions: (room, op) -> the stems of the files that hold it there instead.
ELSEWHERE = {
    # Its only kernel of its own, mask_add, is bottleneck's.
    ("csrc/cpu", "basic_block"): ("bottleneck",),
    ("csrc/cuda", "basic_block"): ("bottleneck",),
    ("triton_kernels", "basic_block"): ("bottleneck",),
    # Too long for one file.
    ("csrc/cpu", "batch_norm_act"): ("batch_norm_act_fwd", "batch_norm_act_bwd"),
}

#: Longest source file, in lines.
CEILING = 420

#: Layers from the bottom up: a module may import from its own layer and from those above it in this list.
LAYERS = (
    ("fastres.backends.reference", "fastres.triton_kernels", "fastres._cpu", "fastres._cuda", "fastres._emulator"),
    # Plain data; a stopwatch; torch alone; what figures share; the machine.
    ("fastres.problem", "fastres.bench.timing", "fastres.graphs", "fastres.drawing", "fastres.machine"),
    ("fastres.backends", "fastres.library", "fastres.memory"),
    ("fastres.verify", "fastres.dispatch", "fastres.convolution", "fastres.block_geometry"),
    (
        "fastres.tuning",
        "fastres.tuning_cache",
        "fastres.tuning_check",
        "fastres.tuning_compile",
        "fastres.tuning_operands",
        "fastres.tuning_run",
        "fastres.tuning_trial",
        "fastres.riding",
        "fastres.block_trials",
        "fastres.whole_block",
        "fastres.rotated",
    ),  # fmt: skip
    ("fastres.ops",),
    ("fastres.testing",),
    ("fastres.nn",),
    ("fastres.models", "fastres.fusion", "fastres.codegen"),
    ("fastres.inference",),
    ("fastres",),
    ("fastres.doctor",),
    ("fastres.bench",),
    ("fastres.figures",),
    ("fastres.cli", "fastres.cli_doctor", "fastres.cli_infer", "fastres.cli_tune"),
    ("fastres.__main__",),
)


def sources(*suffixes: str) -> list[Path]:
    rooms = ("csrc", "triton_kernels", "fastres", "tests", "benchmarks", "examples", "docs")
    found = [p for room in rooms for p in (ROOT / room).rglob("*") if p.suffix in suffixes]
    return sorted([*found, *(p for p in ROOT.glob("*") if p.suffix in suffixes)])


@pytest.mark.parametrize("op", dispatch.LAUNCHES)
@pytest.mark.parametrize("room", ROOMS)
def test_one_name_per_op_in_every_room(room, op):
    for stem in ELSEWHERE.get((room, op), (op,)):
        assert (ROOT / room / ROOMS[room].format(stem)).is_file(), f"{op} is missing in {room}"


def test_the_exceptions_are_real():
    for (room, op), stems in ELSEWHERE.items():
        assert op in dispatch.LAUNCHES and room in ROOMS
        usual = ROOT / room / ROOMS[room].format(op)
        assert not usual.exists() or op in stems, f"{usual.name} exists: drop the exception"


def test_every_op_is_public():
    import fastres

    for op in dispatch.LAUNCHES:
        assert callable(getattr(fastres, op)) and op in fastres.__all__


def test_no_source_file_is_too_long():
    found = {}
    for path in sources(".py", ".cpp", ".h", ".cu", ".cuh", ".txt"):
        lines = path.read_text().count("\n")
        if lines > CEILING:
            found[str(path.relative_to(ROOT))] = lines
    assert not found, f"longer than {CEILING} lines, so two rooms: {found}"


# ---- imports


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "triton_kernels":
        parts = ("fastres", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(name: str) -> int:
    """The layer of the longest prefix of ``name`` that the table knows."""
    known = {module: i for i, modules in enumerate(LAYERS) for module in modules}
    while name:
        if name in known:
            return known[name]
        name = name.rpartition(".")[0]
    raise AssertionError("not a module of fastres")


def imports(path: Path) -> set[str]:
    """Modules of fastres that a file imports, at its top or inside a function."""
    here = module_name(path)
    package = here if path.name == "__init__.py" else here.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if is_module(inner) else base)
    return {name for name in found if name.split(".")[0] == "fastres"}


def is_module(name: str) -> bool:
    parts = name.split(".")
    if parts[:2] == ["fastres", "triton_kernels"]:
        parts = parts[1:]
    path = ROOT.joinpath(*parts)
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def modules() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "triton_kernels").glob("*.py")])


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_imports_go_one_way(path):
    here = module_name(path)
    for name in imports(path):
        assert layer(name) <= layer(here), f"{here} imports {name}, which lies above it"


def test_kernel_files_know_nothing_of_torch_or_python():
    for path in sources(".cpp", ".h", ".cu", ".cuh"):
        includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
        foreign = [line for line in includes if "torch/" in line or "ATen/" in line or "c10/" in line]
        assert not foreign, f"{path.relative_to(ROOT)} includes {foreign}: the C++ core is free of torch"
        inner = path.name not in ("bindings.cpp", "bindings.h", "entries.h", "module.cpp")
        assert not (inner and any("pybind11" in line for line in includes)), f"{path.name} knows Python"


def test_no_module_is_named_like_a_public_function_of_its_level():
    for package in [PACKAGE, *(p.parent for p in PACKAGE.rglob("__init__.py"))]:
        loaded = importlib.import_module(module_name(package / "__init__.py"))
        for name in getattr(loaded, "__all__", ()):
            shadowed = (package / f"{name}.py").exists() or (package / name / "__init__.py").exists()
            assert not shadowed, f"{loaded.__name__}.{name} is both a module and a public name"


# ---- what is installed


def test_triton_kernels_is_no_top_level_package():
    """A package of that name belongs to others; ours is found as fastres.triton_kernels only."""
    code = (
        "import importlib.util as u, sys\n"
        "ours = u.find_spec('fastres.triton_kernels')\n"
        "top = u.find_spec('triton_kernels')\n"
        "print(bool(ours), top.origin if top else None)\n"
    )
    # Isolated: what counts is the installation, not the folder or the variables of this process.
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd="/")
    if "No module named 'fastres'" in done.stderr:
        pytest.skip("fastres is not installed in this environment (make setup)")
    assert done.returncode == 0, done.stderr
    found, origin = done.stdout.split(maxsplit=1)
    assert found == "True", "fastres.triton_kernels is not importable: pip install -e ."
    assert not Path(origin.strip()).is_relative_to(ROOT), f"triton_kernels is importable at top level: {origin}"
