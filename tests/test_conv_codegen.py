"""docs/kernels/conv.md against a fresh compilation: tensor cores, asynchronous copies, shared memory, no spills.

By default a tensor-descriptor kernel for sm_90 and a pointer kernel for sm_80 are compiled again; FASTRES_FULL=1
compiles the section of the Triton that is installed. A version that the page does not have is only held to the limits.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys

import pytest

from fastres.codegen import conv as codegen
from fastres.codegen import plans

FULL = os.environ.get("FASTRES_FULL") == "1"

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: its kernels cannot be compiled"
)
compiles = [
    needs_triton,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: kernels are interpreted, not compiled"
    ),
]


def marked(test):
    for mark in compiles:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def page() -> str:
    return codegen.PATH.read_text()


def _sample() -> list[tuple]:
    if FULL:
        return codegen.work()
    found = []
    for arch, kernel in ((90, "patch"), (80, "gather")):
        found.append(next(item for item in codegen.work((arch,)) if item[-1].kernel == kernel))
    return found


@marked
def test_page_is_current_and_within_the_limits(page):
    from fastres.codegen import triton as table

    rows = codegen.rows(_sample(), jobs=2 if FULL else 1)
    problems = [problem for row in rows for problem in row.problems]
    assert not problems, "\n".join(problems)
    section = codegen.sections(page).get(table.version())
    if section is None:
        print(f"the page has no section of triton {table.version()}: only limits and spills were checked")
        return
    if FULL:
        assert page == codegen.page(rows, page), "run python -m fastres.codegen conv"
    for row in rows:
        assert row.line() in section.splitlines(), f"{row.arch}: not on the page:\n{row.line()}"


@marked
def test_page_has_every_shipped_row(page):
    expected = len(codegen.work())
    for version, section in codegen.sections(page).items():
        lines = [line for line in section.splitlines() if line.startswith(("| fprop", "| dgrad", "| wgrad"))]
        assert len(lines) == expected, f"triton {version}: {len(lines)} rows, expected {expected}"
        for arch in (*(f"sm_{a}" for a in codegen.ARCHITECTURES), codegen.AMD):
            assert f"### {arch}, triton {version}" in section


def test_page_covers_two_versions_of_triton(page):
    """The oldest supported one and another."""
    versions = list(codegen.sections(page))
    assert len(versions) >= 2 and any(v.startswith("3.6.") for v in versions), versions


def test_a_section_is_replaced_and_the_others_stay(monkeypatch):
    monkeypatch.setattr(codegen.table, "version", lambda: "3.10.0")
    before = "head\n\n## triton 3.6.0\n\nold\n\n## triton 3.10.0\n\nstale\n\n## triton 3.8.1\n\nmiddle\n"
    text = codegen.page([ROW], before)
    assert list(codegen.sections(text)) == ["3.6.0", "3.8.1", "3.10.0"]
    assert "\nold\n" in text and "\nmiddle\n" in text and "stale" not in text and ROW.line() in text
    assert codegen.page([ROW], text) == text


ROW = codegen.Row(
    arch="sm_90", type="bf16", kind="fprop", hooks="stats", problem="8x64x56x56 -> 64, 3x3",
    config="patch 2x8x8 64 64 w4 s4", kernel="patch", odd=False, steps=9, registers=168, shared=98336,
    mma="4 HGMMA", copies="2 UTMALDG", stack=0, spills=0, megabytes=6.4, gflop=1.8, us="5", bound="memory",
)  # fmt: skip


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({}, None),
        ({"spills": 3, "stack": 24}, "3 spills, 24 bytes of stack"),
        ({"shared": 240_000}, "240000 bytes of shared memory; the limit is 232448"),
        ({"arch": "sm_89", "mma": "8 HMMA", "shared": 110_000}, "110000 bytes of shared memory; the limit is 101376"),
        ({"arch": codegen.AMD, "mma": "8 MFMA", "copies": "", "shared": 70_000}, "70000 bytes of shared memory"),
        ({"registers": 256}, "256 registers"),
        ({"mma": ""}, "no tensor-core instruction"),
        ({"mma": "", "kernel": "gather", "type": "tf32"}, "no tensor-core instruction"),
        ({"mma": "", "kernel": "gather", "type": "ieee"}, None),
        ({"mma": "8 HMMA"}, "8 HMMA; expected HGMMA"),
        ({"copies": ""}, "no asynchronous copy in the main loop"),
        ({"copies": "", "odd": True}, None),
        ({"copies": "", "steps": 1}, None),
        ({"arch": codegen.AMD, "mma": "8 MFMA", "copies": "", "shared": 32_768}, None),
    ],
)  # fmt: skip
def test_limits_are_seen(changes, problem):
    found = dataclasses.replace(ROW, **changes).problems
    assert bool(found) == bool(problem), found
    assert problem is None or any(problem in text for text in found), found


def test_the_main_loop_is_the_inner_one_with_tensor_cores():
    text = """
        /*0000*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R4.64] ;
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R4.64] ;
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*0040*/              @!P0 BRA 0x30 ;
        /*0050*/               @P1 BRA 0x10 ;
        /*0060*/               @P2 BRA 0x0 ;
        /*0070*/               @P3 EXIT ;
        /*0080*/                   EXIT ;
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*00a0*/                   BRA 0x20 ;
        /*00b0*/                   BRA 0xb0 ;
"""
    loop, looped = codegen.main_loop(text)
    assert looped
    # Of the loops at 0x10 and 0x0 the inner one; not the wait at 0x30, nor the slow path that branches back.
    assert (loop["HGMMA"], loop["LDGSTS"], loop["SYNCS"], loop["EXIT"]) == (1, 1, 1, 0)
    # Without the branches back: from the first HGMMA to the last.
    flat = "\n".join(line for line in text.splitlines() if "BRA" not in line and "EXIT" not in line)
    unrolled, looped = codegen.main_loop(flat + "\n" + flat)
    assert not looped and (unrolled["HGMMA"], unrolled["LDGSTS"]) == (2, 2)
    assert codegen.main_loop("        /*0010*/                   IADD3 R1, R2, R3 ;\n") == ({}, False)


def test_bytes_of_a_launch_with_its_hooks():
    p = plans.conv(2, 8, 64, 256)
    x, y, w = 2 * 2 * 64 * 64, 2 * 2 * 64 * 256, 2 * 64 * 256
    assert codegen.kernel_of("fprop", p, ("stats",)).bytes == x + y + w
    assert codegen.kernel_of("fprop", p, ("bias", "relu", "residual")).bytes == x + 2 * y + w
    assert codegen.kernel_of("dgrad", p, ("add", "mask")).bytes == x + y + w + x + x // 16
    assert codegen.kernel_of("dgrad", p, ("act", "pre", "reduce", "y")).bytes == x + y + w + x + y + x
    assert codegen.kernel_of("wgrad", p, ("pre", "prologue")).bytes == x + y + w + y
    assert codegen.kernel_of("fprop", plans.conv(2, 8, 3, 64, 7, 2), ()).width == 64


@needs_triton
def test_bare_entry_needs_no_torch():
    """The command line of an environment with only triton in it, here with torch made unimportable."""
    code = (
        "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['bare.py', 'conv', '--jobs', '0'];"
        f"runpy.run_path({str(codegen.PATH.parents[2] / 'fastres' / 'codegen' / 'bare.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert "--jobs: expected at least 1, got 0" in done.stderr, done.stderr
    code = code.split("sys.argv")[0] + (
        f"sys.path.insert(0, {str(codegen.PATH.parents[2] / 'fastres' / 'codegen')!r}); import bare; sys.path.pop(0);"
        "bare.prepare(); from fastres.codegen import conv, plans;"
        "from fastres.triton_kernels.conv_configs import ConvConfig;"
        "found = conv.launch('fprop', plans.conv(2, 8, 64, 64, 3), ('stats',), ConvConfig('gather', 64, 64, 32, 4, 3));"
        "print(len(found))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) == 1, done.stderr
