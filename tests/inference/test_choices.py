"""A saved session brings the choice of its kernels along: the same bits without a new measurement, or a reason."""

from __future__ import annotations

import re

import pytest
import torch
from session_cases import alternating, narrow, pixels, rewrite

import fastres
from fastres.backends import cpu, cpu_conv
from fastres.inference import SessionFileError
from fastres.inference.cpu_executor import CpuSegment
from fastres.inference.cpu_weights import Choice

pytestmark = pytest.mark.skipif(cpu._module is None, reason=f"fastres._cpu is not built: {cpu._missing}")


@pytest.fixture(autouse=True)
def served_on_every_instruction_set(monkeypatch):
    monkeypatch.setattr(cpu_conv, "wins", lambda kind, x, w, g: not cpu_conv.why_not(x, w, g))


def refuse(segment, shape, kinds):
    raise AssertionError("measured again")


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.setattr(CpuSegment, "_measured", alternating)
    session = fastres.optimize(narrow(), pixels())
    session(pixels(2, 193, 257))
    return session, session.save(tmp_path / "s")


def kernels(session, shape=(2, 3, 33, 41)) -> list[tuple[str, str]]:
    return [(row.kernel, row.note) for row in session.report(shape, measure=False).rows]


def test_a_loaded_session_has_the_same_kernels_and_bits(saved, tmp_path, monkeypatch):
    session, path = saved
    assert {"direct", "winograd 2x2", "winograd 4x4"} <= {k for row in kernels(session) for k in row[0].split(", ")}
    monkeypatch.setattr(CpuSegment, "_measured", lambda s, shape, kinds: refuse(s, shape, kinds) if shape[0] > 1 else {
        p: Choice(0) for p in kinds
    })  # fmt: skip
    loaded = fastres.load(path)
    again = fastres.load(loaded.save(tmp_path / "again"))
    for size in ((2, 33, 41), (2, 193, 257)):
        x = pixels(*size)
        assert torch.equal(loaded(x), session(x)) and torch.equal(again(x), session(x))
        assert kernels(loaded, tuple(x.shape)) == kernels(session, tuple(x.shape))
    assert not [note for note in loaded.notes if "kernels" in note]
    with pytest.raises(AssertionError, match="measured again"):
        loaded(pixels(9))  # a size that the saved session had not seen


def test_other_threads_choose_for_themselves(saved, monkeypatch):
    seen = []
    monkeypatch.setattr(CpuSegment, "_measured", lambda s, shape, kinds: seen.append(shape) or alternating(s, 0, kinds))
    loaded, before = fastres.load(saved[1]), torch.get_num_threads()
    seen.clear()
    loaded(pixels())
    assert not seen
    try:
        torch.set_num_threads(before + 1)
        loaded(pixels())
    finally:
        torch.set_num_threads(before)
    assert seen == [(2, 3, 33, 41)]


def first_kernels(head) -> list:
    (entry,) = head["choices"]["segments"]
    return entry["measured"]


def misplace(head, tensors):
    head["choices"]["segments"][0]["first"] = 3


def another_isa(head, tensors):
    for measured in first_kernels(head):
        measured["isa"] = "avx9"


def another_kernel(head, tensors):
    for measured in first_kernels(head):
        measured["kernels"][-1][0][0] = 4  # Winograd for the classifier


def fewer_nodes(head, tensors):
    for measured in first_kernels(head):
        measured["kernels"].pop()


LEFT = {
    "kernel": (another_kernel, r"winograd 4x4 does not serve \d+ here"),
    "instruction set": (another_isa, r"chosen for avx9 with \d+ threads are not taken over: this machine runs"),
    "nodes": (fewer_nodes, "they are those of other nodes"),
    "place": (misplace, "does not serve exactly nodes 4 to"),
}


@pytest.mark.parametrize("change", LEFT)
def test_what_does_not_serve_is_left_with_a_reason(saved, tmp_path, monkeypatch, change):
    seen = []
    monkeypatch.setattr(CpuSegment, "_measured", lambda s, shape, kinds: seen.append(shape) or alternating(s, 0, kinds))
    how, text = LEFT[change]
    rewrite(saved[1], tmp_path / "changed", how, rehash=True)
    loaded = fastres.load(tmp_path / "changed")
    assert any(re.search(text, note) for note in loaded.notes), loaded.notes
    seen.clear()
    assert torch.equal(loaded(pixels()), saved[0](pixels())) and seen == [(2, 3, 33, 41)]


def test_another_processor_is_named(saved, tmp_path):
    rewrite(saved[1], tmp_path / "s2", lambda head, tensors: head["choices"].update(chip="Abacus 9"), rehash=True)
    assert any("those chosen on Abacus 9; optimize again" in note for note in fastres.load(tmp_path / "s2").notes)


def test_files_without_choices_load(saved, tmp_path):
    rewrite(saved[1], tmp_path / "old", lambda head, tensors: head.pop("choices"), rehash=True)
    assert torch.equal(fastres.load(tmp_path / "old")(pixels()), saved[0](pixels()))


@pytest.mark.parametrize("bad", [5, {"segments": [{}]}, {"segments": 3}, {"segments": [[1]]}], ids=str)
def test_choices_that_are_none_are_one_clear_error(saved, tmp_path, bad):
    rewrite(saved[1], tmp_path / "bad", lambda head, tensors: head.update(choices=bad), rehash=True)
    with pytest.raises(SessionFileError, match="describes choices of kernels that are none") as error:
        fastres.load(tmp_path / "bad")
    assert str(tmp_path / "bad") in str(error.value) and len(str(error.value).splitlines()) == 1


def test_exact_sessions_have_nothing_to_choose(tmp_path, monkeypatch):
    monkeypatch.setattr(CpuSegment, "_measured", refuse)
    session = fastres.optimize(narrow(), pixels(), precision="exact")
    assert torch.equal(fastres.load(session.save(tmp_path / "s"))(pixels()), session(pixels()))
    assert {k for k, _ in kernels(session) if "winograd" in k} == set()
