"""The tuning's file: found where the platform keeps caches, never trusted blindly, never a reason to crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from fastres import tuning_cache
from fastres.tuning_cache import Store, file_name, merged

KEY = {"gpu": "Fake GPU 80GB", "driver": "1", "torch": "2"}


def verdict(wrong: str = "", when: str = "2026-01-01T00:00:00") -> dict:
    return {"wrong": wrong, "when": when}


def entry(**verdicts) -> dict:
    return {"verdicts": verdicts}


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("FASTRES_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---- where


def test_the_directory_can_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTRES_CACHE_DIR", str(tmp_path))
    assert tuning_cache.directory() == tmp_path
    monkeypatch.setenv("FASTRES_CACHE_DIR", "~/somewhere")
    assert tuning_cache.directory() == Path.home() / "somewhere"


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "home/.cache/fastres"),
        ("linux", {"XDG_CACHE_HOME": "xdg"}, "xdg/fastres"),
        ("darwin", {}, "home/Library/Caches/fastres"),
        ("win32", {"LOCALAPPDATA": "local"}, "local/fastres"),
    ],
)
def test_without_platformdirs(monkeypatch, tmp_path, platform, variables, expected):
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    monkeypatch.setattr(sys, "platform", platform)
    for name in ("FASTRES_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    assert tuning_cache.directory() == tmp_path / expected


def test_a_relative_xdg_cache_home_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert tuning_cache._cache_home() == tmp_path / ".cache"


def test_without_a_home_it_stays_in_memory(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setitem(sys.modules, "platformdirs", None)
    for name in ("FASTRES_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert tuning_cache.directory() is None
    with pytest.warns(RuntimeWarning, match="no cache directory is known .set FASTRES_CACHE_DIR.*in memory only"):
        store = Store(KEY)
    store.put("a", entry(x=verdict()))
    assert store.get("a") == entry(x=verdict()) and not store.on_disk


# ---- for whom


@pytest.mark.parametrize("name", KEY)
def test_another_key_is_another_file(folder, name):
    Store(KEY).put("a", entry(x=verdict()))
    other = dict(KEY, **{name: "other"})
    assert file_name(other) != file_name(KEY)
    assert Store(other).entries == {} and Store(KEY).entries == {"a": entry(x=verdict())}


def test_the_key_names_everything_a_verdict_depends_on(monkeypatch):
    class Properties:
        name, major, minor, multi_processor_count = "Fake", 9, 0, 132

    monkeypatch.setattr(tuning_cache.torch.cuda, "get_device_properties", lambda device: Properties)
    key = tuning_cache.key.__wrapped__(0)
    wanted = {"gpu", "capability", "driver", "runtime", "torch", "triton", "cudnn", "fastres"}
    assert wanted <= key.keys() and all(isinstance(value, str) for value in key.values())
    assert key["capability"] == "9.0" and key["fastres"].startswith("0.")


def test_an_edited_kernel_has_another_key(monkeypatch, tmp_path):
    (tmp_path / "conv.py").write_text("one")

    class Spec:
        submodule_search_locations = [str(tmp_path)]

    monkeypatch.setattr(tuning_cache.importlib.util, "find_spec", lambda name: Spec)
    before = tuning_cache.sources.__wrapped__()
    (tmp_path / "conv.py").write_text("two")
    assert tuning_cache.sources.__wrapped__() != before


# ---- entries


def test_what_was_put_is_found_by_the_next_process(folder):
    store = Store(KEY)
    store.put("a", entry(x=verdict("output out")))
    store.put("a", {"verdicts": {}, "chosen": "library", "us": 1.0, "library_us": 1.0, "when": "2026-01-02"})
    found = Store(KEY).get("a")
    assert found["verdicts"] == {"x": verdict("output out")} and found["chosen"] == "library"
    assert [p.name for p in folder.iterdir()] == [file_name(KEY)], "no temporary file stays behind"


def test_the_newer_verdict_and_the_newer_winner_count():
    old = {
        **entry(x=verdict("bad", "2026-01-01")),
        "chosen": "triton x",
        "us": 1.0,
        "library_us": 2.0,
        "when": "2026-3",
    }
    new = {**entry(x=verdict("", "2026-01-02")), "chosen": "library", "us": 2.0, "library_us": 2.0, "when": "2026-2"}
    for a, b in ((old, new), (new, old)):
        both = merged(a, b)
        assert both["verdicts"]["x"]["wrong"] == "" and both["chosen"] == "triton x"


def test_two_stores_on_one_file_keep_each_others_entries(folder):
    a, b = Store(KEY), Store(KEY)
    a.put("a", entry(x=verdict()))
    b.put("b", entry(y=verdict()))
    assert Store(KEY).entries.keys() == {"a", "b"} == b.entries.keys()


def test_two_processes_write_at_once(folder):
    code = (
        "import sys; from fastres.tuning_cache import Store\n"
        f"store = Store({KEY!r})\n"
        "for i in range(40):\n"
        "    store.put(f'{sys.argv[1]} {i}', {'verdicts': {'x': {'wrong': '', 'when': '1'}}})\n"
    )
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code]
    writers = [subprocess.Popen([*command, name], stderr=subprocess.PIPE, text=True) for name in ("a", "b")]
    reader = 0
    while any(w.poll() is None for w in writers):
        reader += len(tuning_cache.read(folder / file_name(KEY), KEY)) >= 0  # raises on half a file
    for w in writers:
        assert w.wait() == 0, w.stderr.read()
        w.stderr.close()
    found = Store(KEY).entries
    # The last writer wrote all of its own. What the other wrote between its last look and its last write is lost.
    assert reader and any(all(f"{name} {i}" in found for i in range(40)) for name in "ab")
    assert [p.name for p in folder.iterdir()] == [file_name(KEY)]


# ---- broken files


GOOD = {"format": 1, "key": KEY, "entries": {"a": entry(x=verdict())}}
BROKEN = {
    "empty": b"",
    "truncated": json.dumps(GOOD).encode()[:-20],
    "binary": b"\x80\x00\xff",
    "a list": b"[]",
    "another format": json.dumps(dict(GOOD, format=2)).encode(),
    "another key": json.dumps(dict(GOOD, key=dict(KEY, torch="3"))).encode(),
    "no entries": json.dumps({"format": 1, "key": KEY}).encode(),
    "a foreign entry": json.dumps(dict(GOOD, entries={"a": {"verdicts": {"x": "good"}}})).encode(),
    "a foreign number": json.dumps(dict(GOOD, entries={"a": {"verdicts": {}, "us": "fast"}})).encode(),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_set_aside(folder, content):
    folder.mkdir()
    path = folder / file_name(KEY)
    path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="it was set aside as .*broken") as caught:
        store = Store(KEY)
    assert path.name in str(caught[0].message) and len(caught) == 1
    assert store.entries == {} and path.with_name(path.name + ".broken").read_bytes() == content
    store.put("b", entry(x=verdict()))
    assert Store(KEY).entries.keys() == {"b"}


def test_a_file_that_breaks_later_is_written_anew(folder):
    store = Store(KEY)
    store.put("a", entry(x=verdict()))
    store.path.write_text("{")
    with pytest.warns(RuntimeWarning, match="set aside"):
        store.put("b", entry(x=verdict()))
    assert Store(KEY).entries.keys() == {"a", "b"}


def refuse(*args, **kwargs):
    raise PermissionError(13, "Permission denied")


def test_a_directory_that_cannot_be_written_is_one_warning(folder, monkeypatch):
    store = Store(KEY)
    monkeypatch.setattr(tuning_cache.tempfile, "mkstemp", refuse)
    with pytest.warns(RuntimeWarning, match="cannot be written .Permission denied.*in memory only") as caught:
        store.put("a", entry(x=verdict()))
        store.put("b", entry(x=verdict()))
    assert len(caught) == 1 and store.entries.keys() == {"a", "b"} and not store.on_disk


def test_a_path_that_is_no_directory_is_one_warning(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTRES_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="in memory only"):
        store = Store(KEY)
        store.put("a", entry(x=verdict()))
    assert store.entries.keys() == {"a"}


def test_a_file_that_cannot_be_read_is_left_alone(folder, monkeypatch):
    Store(KEY).put("a", entry(x=verdict()))
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.warns(RuntimeWarning, match="cannot be read .Permission denied"):
        assert Store(KEY).entries == {}


def test_a_broken_file_that_cannot_be_moved_is_no_crash(folder, monkeypatch):
    folder.mkdir()
    (folder / file_name(KEY)).write_text("{")
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.warns(RuntimeWarning, match="cannot be set aside"):
        store = Store(KEY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.put("a", entry(x=verdict()))
    assert store.entries.keys() == {"a"}
