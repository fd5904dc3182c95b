"""docs/kernels/triton.md against a fresh compilation: registers, shared memory, access widths, no spills.

By default the bfloat16 rows and the merges for sm_80 and sm_90 are compiled again; FASTRES_FULL=1 compiles the whole
page. With another Triton version than the page's the numbers may differ: then only the limits are checked.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil

import pytest

from fastres.backends.native import FUNCTIONS
from fastres.codegen import sass
from fastres.codegen import triton as codegen

FULL = os.environ.get("FASTRES_FULL") == "1"

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed: its kernels cannot be compiled"
    ),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: kernels are interpreted, not compiled"
    ),
]


@pytest.fixture(scope="module")
def page() -> str:
    return codegen.PATH.read_text()


def _subset() -> list:
    if FULL:
        return codegen.work()
    return [
        (arch, index, dtype, C)
        for arch, index, dtype, C in codegen.work((80, 90))
        if (dtype, C) == ("bf16", codegen.C_WIDE) or not codegen.CASES[index].act
    ]


def test_page_is_current_and_nothing_spills(page):
    rows = codegen.rows(_subset())
    problems = [problem for row in rows for problem in row.problems]
    assert not problems, "\n".join(problems)
    written = re.search(r"with triton (\S+)\. Do not edit", page)[1]
    if written != codegen.version():
        print(f"the page is of triton {written}, this is {codegen.version()}: only limits and spills were checked")
        return
    if FULL:
        assert page == codegen.page(rows), "run python -m fastres.codegen triton"
    sections = dict(re.findall(r"^## sm_(\d+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    for row in rows:
        assert row.line() in sections[str(row.arch)].splitlines(), (
            f"sm_{row.arch}: not in {codegen.PATH.name}:\n{row.line()}\nrun python -m fastres.codegen triton"
        )


def test_page_covers_every_launch_function_and_architecture(page):
    assert set(re.findall(r"^## sm_(\d+)$", page, re.MULTILINE)) == {str(arch) for arch in codegen.ARCHITECTURES}
    assert {case.function for case in codegen.CASES} == set(FUNCTIONS)
    lines = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| function")]
    assert len(lines) == len(codegen.work())
    assert all(line.endswith("| 0 |") for line in lines)


def test_aligned_activations_move_in_16_byte_accesses(page):
    """bf16 and fp32 rows with C a multiple of 8: all stores of activations and loads but mask bytes are wide."""
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 11 or cells[0] not in ("bn_apply", "bn_bwd_apply", "bias_act") or cells[3] != "256":
            continue
        wide, loads = map(int, cells[8].split("/"))
        wide_stores, stores = map(int, cells[9].split("/"))
        mask_in, mask_out = ("mask" in cells[1] and cells[0] == name for name in ("bn_bwd_apply", "bn_apply"))
        # 16 elements a thread carry two mask bytes.
        assert loads - wide == 2 * mask_in and stores - wide_stores == 2 * mask_out, line


def test_spills_and_limits_are_seen():
    text = """
		Function : kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;    /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R4.64] ;  /* 0x0000000404047981 */
        /*0020*/                   STL.64 [R1], R2 ;         /* 0x0000000201007387 */
        /*0030*/               @P1 LDL R2, [R1] ;            /* 0x0000000001027983 */
        /*0040*/              @UP0 UIADD3 UR4, UR4, 0x1, URZ ;
"""
    counts = sass.parse_sass(text)["kernel"]
    usage = sass.Usage("kernel", 40, 8, 0, 0, counts)
    assert (usage.spills, usage.count("LDG"), usage.count("LDG.128"), usage.count("UIADD3")) == (2, 1, 1, 1)
    assert sass.parse_usage(" Function kernel:\n  REG:40 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:576") == {
        "kernel": (40, 8, 1024, 0)
    }
    row = codegen.Row(89, "f", "", "bf16", 8, 1, 8, 4, 256, 200 * 1024, 1, 1, 1, 1, 8, 2)
    assert [p.split(": ")[1].split(";")[0] for p in row.problems] == [
        "2 spill instructions, 8 bytes of stack",
        "256 registers",
        f"{200 * 1024} bytes of shared memory",
    ]


def test_a_missing_tool_says_where_it_was_sought(monkeypatch, tmp_path):
    sass.find_tool.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(sass, "_candidates", lambda first: [tmp_path])
        with pytest.raises(sass.ToolMissing, match=f"cuobjdump not found; searched {re.escape(str(tmp_path))}"):
            sass.find_tool("triton")
    with pytest.raises(ValueError, match="expected 'toolkit' or 'triton', got 'cuda'"):
        sass.find_tool("cuda")
    assert shutil.which(sass.find_tool("triton"))
