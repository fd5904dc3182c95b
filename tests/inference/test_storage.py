"""save and load: the same session, or one clear error."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from session_cases import pixels, rewrite, tiny
from torch import nn

import fastres
from fastres.inference import SessionFileError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("sessions") / "deep" / "tiny.safetensors"
    # "exact": a choice of kernels by the clock may differ from one session to the next, and with it the last bits.
    session = fastres.optimize(tiny(width_per_group=64), pixels(), precision="exact")
    assert session.save(str(path)) == path and [p.name for p in path.parent.iterdir()] == [path.name]
    return session, path


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_round_trip(tmp_path, kind, dtype):
    session = fastres.optimize(tiny(kind), pixels(), dtype, "exact")
    loaded = fastres.load(session.save(tmp_path / "s"))
    assert (loaded.dtype, loaded.precision, loaded.example) == (dtype, "exact", (2, 3, 33, 41))
    assert loaded.accepts == session.accepts and loaded.verdict.ok
    for x in (pixels(), pixels(3, 50, 32)):
        assert torch.equal(loaded(x), session(x))
    again = fastres.load(loaded.save(tmp_path / "s"))  # over itself, from what was loaded
    assert torch.equal(again(pixels()), session(pixels()))


def nudge(head, tensors):
    tensors["6.fc.bias"][0] += 1e-6


DAMAGE = {
    "empty": (lambda b: b"", "is damaged, cut off or no saved session"),
    "half": (lambda b: b[: len(b) // 2], "cut off"),
    "one byte short": (lambda b: b[:-1], "cut off"),
    "header cut": (lambda b: b[:100], "cut off"),
    "one byte long": (lambda b: b + b"\0", "cut off or no saved session"),
    "a flipped bit in a weight": (lambda b: b[:-1000] + bytes([b[-1000] ^ 1]) + b[-999:], "do not match the hash"),
    "a pickle": (lambda b: b"PK\x03\x04" + b[4:], "no saved session"),
    "random bytes": (lambda b: bytes(range(256)) * 40, "no saved session"),
}
EDITS = {
    "a weight": (nudge, False, "do not match the hash"),
    "a name": (lambda h, t: t.update(other=t.pop("6.fc.bias")), False, "do not match the hash"),
    "a stride": (lambda h, t: h["nodes"][0]["conv"].update(stride=[1, 1]), False, "do not match the hash"),
    "the dtype": (lambda h, t: h.update(dtype="bfloat16"), False, "do not match the hash"),
    "no hash": (lambda h, t: h.pop("sha256"), False, "do not match the hash"),
    "a later version": (lambda h, t: h.update(format=99), True, "has format 99; this fastres reads up to 1"),
    "version zero": (lambda h, t: h.update(format=0), True, "has format 0, expected 1"),
    "no version": (lambda h, t: h.pop("format"), True, "names no format"),
    "an unknown node": (lambda h, t: h["nodes"][1].update(type="Attention"), True, "describes no session: KeyError"),
    "another width": (lambda h, t: t.update({"6.fc.bias": torch.zeros(3)}), True, "describes no session: ValueError"),
    "nodes that do not chain": (lambda h, t: h["nodes"].reverse(), True, "describes no session: ValueError"),
    "a tensor too many": (lambda h, t: t.update(more=torch.zeros(1)), True, "tensors that no node names: more"),
    "a missing tensor": (lambda h, t: t.pop("6.fc.bias"), True, "describes no session: KeyError: '6.fc.bias'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_give_one_clear_error(saved, tmp_path, damage):
    how, text = DAMAGE[damage]
    bad = tmp_path / "bad"
    bad.write_bytes(how(saved[1].read_bytes()))
    with pytest.raises(SessionFileError, match=text) as error:
        fastres.load(bad)
    assert str(bad) in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("edit", EDITS)
def test_edited_files_give_one_clear_error(saved, tmp_path, edit):
    change, rehash, text = EDITS[edit]
    rewrite(saved[1], tmp_path / "bad", change, rehash)
    with pytest.raises(SessionFileError, match=text) as error:
        fastres.load(tmp_path / "bad")
    assert len(str(error.value).splitlines()) == 1


def test_an_unchanged_rewrite_loads(saved, tmp_path):
    """The helper of the tests above damages nothing by itself."""
    rewrite(saved[1], tmp_path / "same", rehash=True)
    assert torch.equal(fastres.load(tmp_path / "same")(pixels()), saved[0](pixels()))


def test_bits_flipped_anywhere_in_the_file_are_noticed(saved, tmp_path):
    """Or change nothing: white space and the order of names in the header mean nothing."""
    whole, expected = bytearray(saved[1].read_bytes()), saved[0](pixels())
    generator = torch.Generator().manual_seed(0)
    bad = tmp_path / "bad"
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [
        *torch.randint(header, (20,), generator=generator),
        *torch.randint(len(whole), (10,), generator=generator),
    ]
    noticed = 0
    for at in map(int, places):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << (at % 8)
        bad.write_bytes(flipped)
        try:
            assert torch.equal(fastres.load(bad)(pixels()), expected)
        except SessionFileError:
            noticed += 1
    assert noticed >= 25


def test_foreign_safetensors_and_missing_files(tmp_path):
    save_file({"fc.weight": torch.zeros(3, 3)}, tmp_path / "weights.safetensors")
    save_file({"fc.weight": torch.zeros(3, 3)}, tmp_path / "other", metadata={"format": "pt"})
    for name in ("weights.safetensors", "other"):
        with pytest.raises(SessionFileError, match="is a safetensors file, but no saved session of fastres"):
            fastres.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        fastres.load(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        fastres.load(tmp_path)
    with pytest.raises(ValueError, match="device: got 'abacus'"):
        fastres.load(tmp_path / "other", device="abacus")


def test_sessions_with_foreign_modules_are_not_written(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)).eval()
    session = fastres.optimize(model, pixels())
    with pytest.raises(ValueError, match=r"torch modules in it that no data file can carry: 1 \(GroupNorm\)"):
        session.save(tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing_behind(saved, tmp_path, monkeypatch):
    import safetensors.torch

    (tmp_path / "s").write_text("before")

    def full(tensors, path, metadata):
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        saved[0].save(tmp_path / "s")
    assert (tmp_path / "s").read_text() == "before" and len(list(tmp_path.iterdir())) == 1
