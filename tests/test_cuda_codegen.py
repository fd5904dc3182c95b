"""docs/kernels/cuda.md says what nvcc makes of the CUDA kernels; regenerated and compared here."""

from __future__ import annotations

import dataclasses
import difflib
import re
import subprocess

import pytest
import torch

from fastres.backends import cuda_conv
from fastres.backends.eval_kernels import BasicBlockShape, why_not_basic_block
from fastres.backends.one_pass import Chip
from fastres.codegen import cuda, sass

ROW = cuda.Row("90a", "k.cu", "k", ("float32", "Vector"), 64, 1024, 16, 16, 0, 0)


def page() -> str:
    return cuda.PATH.read_text()


def test_table_is_current():
    """Equal text where this nvcc wrote the page; with another one, still no spills and nothing past a limit."""
    try:
        here = cuda.version()
        sass.find_tool("toolkit")
    except sass.ToolMissing as error:
        pytest.skip(f"CUDA kernels cannot be compiled here: {error}")
    there = re.search(r"with nvcc ([\d.]+)\.", page())[1]
    known = cuda.ARCHITECTURES if here == there else cuda.ARCHITECTURES[:1]
    text = cuda.generate(jobs=2, architectures=known)
    if here != there:
        print(f"written with nvcc {there}, this is {here}: resources checked, not compared")
        return
    diff = "".join(difflib.unified_diff(page().splitlines(True), text.splitlines(True), "docs", "compiled now", n=0))
    assert not diff, f"python -m fastres.codegen cuda\n{diff}"


def test_table_is_complete():
    """Every kernel of every source on every architecture, each without spills."""
    texts = [path.read_text() for path in (cuda.ROOT / "csrc" / "cuda").glob("*.cu*")]
    kernels = {name for text in texts for name in re.findall(r"^(\w+)_kernel\(", text, re.M)}
    assert len(kernels) == 24
    tables, whole_blocks = page().split("## Whole blocks")
    whole_blocks, convolutions = whole_blocks.split("## Convolutions")
    assert whole_blocks.count("\n| sm_") == 22 * len(cuda.ARCHITECTURES)
    convolutions, hopper = convolutions.split("## On sm_90a alone")
    assert convolutions.count("\n| sm_") == 2 * len(cuda_conv.TILES) * len(cuda.ARCHITECTURES)
    assert hopper.count("\n| bottleneck_hopper") == 2 * len(cuda.HOPPER_BLOCKS)
    sections = re.split(r"^## sm_(\w+)$", tables, flags=re.M)
    assert tuple(sections[1::2]) == cuda.ARCHITECTURES
    for table in sections[2::2]:
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n") if line[:2] == "| "]
        rows = rows[1:]
        assert {row[0] for row in rows} == kernels
        assert all(row[-2:] == ["0", "0"] for row in rows)
        assert all(int(row[4]) == 16 for row in rows if "Vector" in row[1])


def test_hopper_instructions(tmp_path):
    """Warpgroup products and tensor copies on sm_90a; elsewhere the kernel traps."""
    source = next(s for s in cuda.sources() if s.name == "shifted_rows.cu")
    try:
        command = [cuda.nvcc(), *cuda.FLAGS, "-cubin", str(source), "-o", str(tmp_path / "out.cubin"), "-arch=sm_90a"]
        sass.find_tool("toolkit")
    except sass.ToolMissing as error:
        pytest.skip(f"CUDA kernels cannot be compiled here: {error}")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    (usage,) = sass.read(tmp_path / "out.cubin").values()
    assert usage.count("HGMMA") == 4 and usage.count("UTMALDG") == 2 and usage.count("SYNCS") >= 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"spills": 4}, "4 spill instructions"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"registers": 256}, "256 registers; the limit is 255"),
        ({"shared": 49153}, "49153 bytes of shared memory"),
        ({"load": 4}, "loads at most 4 bytes an instruction; expected 16"),
    ],
)
def test_problems(change, words):
    problems = dataclasses.replace(ROW, **change).problems
    if not words:
        assert problems == []
    else:
        assert len(problems) == 1 and words in problems[0] and "sm_90a k<float32, Vector>" in problems[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"tensor": (64, 0, 8)}, "no LDSM"),
        ({"parameters": ("bfloat16", "128", "0"), "shared": 48000}, "142208 bytes of shared memory"),
        ({"kernel": "conv_fprop", "parameters": ("bfloat16", "256", "64", "32", "4", "4")}, ""),
        (
            {"kernel": "conv_fprop", "parameters": ("bfloat16", "256", "64", "32", "4", "4"), "tensor": (64, 8, 0)},
            "no LDGSTS",
        ),
    ],
)
def test_problems_of_whole_blocks(change, words):
    row = cuda.Row("89", "b.cu", "bottleneck_eval", ("float16", "64", "1"), 128, 0, 16, 16, 0, 0, (64, 8, 8))
    problems = dataclasses.replace(row, **change).problems
    assert len(problems) == (words != "") and words in "".join(problems)


def test_refused_where_it_does_not_fit():
    """One variant needs more shared memory than sm_89 has, and is refused there."""
    row = cuda.Row("89", "b.cu", "basic_block_eval", ("float16", "128"), 214, 0, 16, 16, 0, 0, (64, 8, 8))
    assert row.problems == []
    (arch, _, channels), chip = next(iter(cuda.REFUSED)), Chip("L4", 58, sass.SHARED_LIMIT[89], 100 * 1024)
    assert arch == "89" and why_not_basic_block(BasicBlockShape(1, 14, 14, int(channels)), torch.float16, chip)
    assert "112704 bytes" not in "".join(dataclasses.replace(row, arch="80").problems)


def test_problems_of_a_stem():
    """It needs no matrix loads; its patch is static and counts beside the dynamic part."""
    row = cuda.Row("80", "s.cu", "stem_eval", ("bfloat16",), 128, 7568, 16, 16, 0, 0, (176, 0, 1))
    assert row.problems == []
    assert "no HMMA" in "".join(dataclasses.replace(row, tensor=(0, 0, 1)).problems)
    assert "102928 bytes" in "".join(dataclasses.replace(row, arch="89", shared=48000).problems)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"tensor": (22, 0, 9, 52)}, "no UTMALDG"),
        ({"tensor": (0, 0, 0, 0), "arch": "100"}, ""),
        ({"shared": 2500}, "233924 bytes of shared memory; the limit is 233472"),
    ],
)
def test_problems_on_hopper(change, words):
    variant = ("bfloat16", "Narrow", "1")
    row = cuda.Row("90a", "b.cu", "bottleneck_hopper", variant, 168, 1120, 16, 16, 0, 0, (22, 7, 9, 52))
    problems = dataclasses.replace(row, **change).problems
    assert len(problems) == (words != "") and words in "".join(problems)


@pytest.mark.parametrize(
    ("symbol", "expected"),
    [
        (
            "_ZN4cuda24bottleneck_hopper_kernelINS_4bf16ENS_4WideELb0EEEvNS_11HopperShapeE14CUtensorMap_st",
            ("bottleneck_hopper", ("bfloat16", "Wide", "0")),
        ),
        ("_ZN4cuda8k_kernelINS_4bf16ELi128ELb0EEEvv", ("k", ("bfloat16", "128", "0"))),
        ("_ZN4cuda15mask_add_kernelIfNS_6ScalarEEEvNS_4RowsEPKT_S4_PKhPS2_", ("mask_add", ("float32", "Scalar"))),
        ("_ZN4cuda6a_kernINS_4bf16ENS_6VectorENS_10NoResidualEEEvv", None),
        ("_ZN4cuda8k_kernelINS_4bf16ENS_6VectorENS_10NoResidualEEEvv", ("k", ("bfloat16", "Vector", "NoResidual"))),
        ("_ZN4cuda14bn_fold_kernelEPKfS1_S1_S1_dlPf", ("bn_fold", ())),
    ],
)
def test_demangle(symbol, expected):
    if expected is None:
        with pytest.raises(ValueError, match="expected a kernel of namespace cuda"):
            cuda.demangle(symbol)
    else:
        assert cuda.demangle(symbol) == expected


def test_demangle_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="expected float, a number or a type of namespace cuda"):
        cuda.demangle("_ZN4cuda8k_kernelIdEEvv")
