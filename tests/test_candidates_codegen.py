"""docs/kernels/candidates.md: every configuration that tuning may try, against what the compiler makes of it.

By default one configuration of each kernel is compiled again for sm_90, of the pointer kernels one with a prologue;
FASTRES_FULL=1 compiles all of them (about an hour on two quiet cores).
"""

from __future__ import annotations

import dataclasses
import os

import pytest
from test_conv_codegen import ROW, marked, needs_triton

from fastres.codegen import candidates as codegen
from fastres.codegen import conv

FULL = os.environ.get("FASTRES_FULL") == "1"


@pytest.fixture(scope="module")
def page() -> str:
    return codegen.PATH.read_text()


def _sample() -> list[tuple]:
    """All; or of each pointer kernel one with a prologue and one of each other kernel, on sm_90."""
    if FULL:
        return codegen.work()
    found = {}
    for item in codegen.work((90,)):
        _, _, _, hooks, config, type = item
        plain = config.kernel not in ("gather", "wgrad_gather")
        if plain or set(hooks) & {"bits", "prologue"}:
            found.setdefault((config.kernel, type), item)
    return list(found.values())


@marked
def test_page_is_current_and_within_the_limits(page):
    rows = conv.rows(_sample(), jobs=2 if FULL else 1)
    problems = [problem for row in rows for problem in codegen.problems(row)]
    assert not problems, "\n".join(problems)
    section = conv.sections(page).get(conv.table.version())
    if section is None:
        print(f"the page has no section of triton {conv.table.version()}: only limits and spills were checked")
        return
    if FULL:
        assert page == codegen.page(rows, page), "run python -m fastres.codegen candidates"
    for row in rows:
        lines = [line for line in section.splitlines() if line.startswith(f"| {codegen.label(row)} |")]
        assert any(f" {codegen.cell(row)} |" in line for line in lines), f"{row.arch}: {codegen.label(row)}: {lines}"


@needs_triton
def test_page_has_every_candidate(page):
    """Under every Triton version of the page: as many cells as there are candidates, and none from elsewhere."""
    work = codegen.work()
    for version, section in conv.sections(page).items():
        cells = sum(line.count(" r, ") for line in section.splitlines() if line.startswith("| "))
        assert cells == len(work), f"triton {version}: {cells} cells, expected {len(work)}"


def _offered() -> set[tuple]:
    found = set()
    for arch, kind, _, hooks, c, type in codegen.work():
        name = f"{c.kernel} {c.BM} {c.BN} {c.BK} w{c.num_warps} s{c.num_stages}"
        found.add((codegen.TYPES[type][0], arch, kind, hooks, name))
    return found


@needs_triton
def test_what_was_left_out_is_not_offered(page, monkeypatch):
    from fastres.triton_kernels import conv_configs

    left_out, offered = conv_configs.LEFT_OUT, _offered()
    with monkeypatch.context() as patch:
        patch.setattr(conv_configs, "LEFT_OUT", {})
        otherwise = _offered()
    for size, rows in left_out.items():
        for (capability, kind, hooks, config), why in rows.items():
            key = (size, 10 * capability[0] + capability[1], kind, hooks, config)
            assert capability in conv_configs.COMPILED and key not in offered
            assert key in otherwise, f"{key}: would not be offered anyway"
            assert f"| {config} | {why} |" in page
    assert not conv_configs._compiles("fprop", ("stats",), 2, (12, 0), _config("gather 128 256 64 w8 s3"))
    assert conv_configs._compiles("fprop", ("stats",), 2, (8, 6), _config("gather 128 256 64 w8 s3"))


def _config(words: str):
    from fastres.triton_kernels.conv_configs import ConvConfig

    kernel, BM, BN, BK, warps, stages = words.split()
    return ConvConfig(kernel, int(BM), int(BN), int(BK), int(warps[1:]), int(stages[1:]))


def test_pointer_kernels_too_must_use_the_larger_instruction_on_hopper():
    hmma = dataclasses.replace(ROW, kernel="wgrad_gather", mma="8 HMMA", copies="4 LDGSTS")
    assert not hmma.problems and "expected HGMMA" in codegen.problems(hmma)[0]
    assert not codegen.problems(dataclasses.replace(hmma, odd=True))
    assert not codegen.problems(dataclasses.replace(hmma, arch="sm_80"))


def test_rows_of_one_configuration_share_a_line():
    rows = [ROW, dataclasses.replace(ROW, arch="sm_100", registers=99, mma="4 UTCHMMA, unrolled", copies="")]
    (line,) = codegen.lines(rows)
    assert (
        line
        == "| patch 2x8x8 64 64 w4 s4, 3x3 | - | - | 168 r, 97 K, 4 HGMMA, 2 UTMALDG | 99 r, 97 K, 4 UTCHMMA* | - |"
    )
