"""CUDA sources compiled with the emulator into a library of their own: kernels that no module has."""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas")


@functools.cache
def _machine(cxx: str) -> tuple[str, ...]:
    """Object files of the emulator, which no kernel changes."""
    folder = Path(tempfile.mkdtemp(prefix="fastres-emulator-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    objects = []
    for source in sorted(p for p in (CSRC / "emulator").glob("*.cpp") if p.name != "module.cpp"):
        objects.append(str(folder / f"{source.stem}.o"))
        _compile([cxx, *FLAGS, "-c", str(source), "-o", objects[-1]])
    return tuple(objects)


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, f"{' '.join(command)}\n{done.stderr}"


def build_emulated(source: Path, path: Path, *, csrc: Path = CSRC) -> ctypes.CDLL:
    """``source`` compiled against ``csrc`` as CMake compiles the module; skips without a compiler."""
    named = os.environ.get("CXX", "").split()
    cxx = next((p for c in [*named[:1], "c++", "g++", "clang++"] if (p := shutil.which(c))), None)
    if cxx is None:
        pytest.skip("no C++ compiler (CXX, c++, g++, clang++) to build the emulator's selftest")
    flags = [*FLAGS, "-Wno-psabi", "-DFASTRES_EMULATE", "-DFASTRES_BACKEND=emulator", f"-I{csrc}"]
    _compile([cxx, *flags, "-shared", "-x", "c++", str(source), "-x", "none", *_machine(cxx), "-o", str(path)])
    return ctypes.CDLL(str(path))


def build_planted(folder: Path, selftest: str, file: str, sound: str, faulty: str, *more: str) -> ctypes.CDLL:
    """A selftest of the emulator with ``sound`` in ``csrc/cuda/<file>`` replaced by ``faulty``, and likewise the pairs
    of ``more``; no file: as it is."""
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc, ignore=shutil.ignore_patterns("cpu"))
    if file:
        text, changes = (csrc / "cuda" / file).read_text(), (sound, faulty, *more)
        for right, wrong in zip(changes[::2], changes[1::2], strict=True):
            assert text.count(right) == 1, f"{file} has {text.count(right)} times {right!r}"
            text = text.replace(right, wrong)
        (csrc / "cuda" / file).write_text(text)
    return build_emulated(csrc / "emulator" / selftest, folder / "planted.so", csrc=csrc)


def call_planted(library: ctypes.CDLL, *arguments) -> str:
    """What the selftest's kernel failed with, "" if it ran. Tensors go as addresses, numbers as 64 bits."""
    message = ctypes.create_string_buffer(1024)
    plain = [ctypes.c_int64(a) if isinstance(a, int) else ctypes.c_void_p(a.data_ptr()) for a in arguments]
    status = library.selftest(*plain, message, ctypes.c_size_t(len(message)))
    error = message.value.decode()
    assert (status == 0) == (error == "")
    return error
