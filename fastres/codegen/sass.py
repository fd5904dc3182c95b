"""Reads a cubin without a GPU: resources and instructions, through NVIDIA's ``cuobjdump``.

The tool comes with the CUDA toolkit and with Triton. A cubin newer than the tool cannot be read, so each
caller asks for the copy that matches its compiler first: ``find_tool("triton")`` or ``find_tool("toolkit")``.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

# Largest shared memory of one thread block in bytes, and registers of one thread, by compute capability
# (CUDA C++ Programming Guide, technical specifications per compute capability).
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
REGISTER_LIMIT = 255

# nvdisasm names the address, then an optional predicate, then the opcode.
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_FUNCTION = re.compile(r"^\s*Function : (\S+)\s*$", re.MULTILINE)
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


class ToolMissing(RuntimeError):
    """No ``cuobjdump`` was found; the message lists the places that were searched."""


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one kernel of a cubin takes: registers a thread, bytes a thread (stack, local), bytes a block (shared).

    ``instructions`` counts each opcode with its modifiers (``LDG.E.128``). ``shared`` is the static part only:
    Triton and dynamic launches add theirs at launch time.
    """

    name: str
    registers: int
    stack: int
    shared: int
    local: int
    instructions: collections.Counter

    def count(self, opcode: str) -> int:
        """Instructions of ``opcode``, whatever its modifiers: ``count("LDG")`` includes ``LDG.E.128``.

        With a modifier only those that carry it count: ``count("LDG.128")``.
        """
        head, *modifiers = opcode.split(".")
        total = 0
        for name, n in self.instructions.items():
            parts = name.split(".")
            if parts[0] == head and all(m in parts[1:] for m in modifiers):
                total += n
        return total

    @property
    def spills(self) -> int:
        """Loads and stores of local memory: registers that did not fit, or an array indexed at run time."""
        return self.count("LDL") + self.count("STL")


def _candidates(first: str):
    toolkit = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            toolkit.append(pathlib.Path(os.environ[variable]) / "bin")
    nvcc = shutil.which("nvcc")
    if nvcc:
        toolkit.append(pathlib.Path(os.path.realpath(nvcc)).parent)
    toolkit.append(pathlib.Path("/usr/local/cuda/bin"))
    spec = importlib.util.find_spec("triton")
    triton = []
    if spec is not None and spec.origin:
        triton.append(pathlib.Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    return triton + toolkit if first == "triton" else toolkit + triton


@functools.cache
def find_tool(first: str = "toolkit", tool: str = "cuobjdump") -> str:
    """Path of ``tool``, from Triton's own copy or the CUDA toolkit, whichever ``first`` names; then the other.

    Raises ``ValueError`` for another ``first``, `ToolMissing` where neither has it.
    """
    if first not in ("toolkit", "triton"):
        raise ValueError(f"first: expected 'toolkit' or 'triton', got {first!r}")
    places = _candidates(first)
    for place in places:
        path = place / tool
        if os.access(path, os.X_OK):
            return str(path)
    searched = ", ".join(str(p) for p in places)
    raise ToolMissing(f"{tool} not found; searched {searched}. Install triton or a CUDA toolkit, or set CUDA_HOME")


def _run(tool: str, option: str, path: str) -> str:
    # cuobjdump calls nvdisasm, which it looks for on PATH: its own directory must come first.
    env = dict(os.environ, PATH=os.path.dirname(tool) + os.pathsep + os.environ.get("PATH", ""))
    done = subprocess.run([tool, option, path], capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{tool} {option} failed with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout + done.stderr


def parse_usage(text: str) -> dict[str, tuple[int, int, int, int]]:
    """``cuobjdump -res-usage`` -> ``{function: (registers, stack, shared, local)}``."""
    return {m[1]: tuple(int(m[i]) for i in range(2, 6)) for m in _USAGE.finditer(text)}


def parse_sass(text: str) -> dict[str, collections.Counter]:
    """``cuobjdump -sass`` -> ``{function: Counter of opcodes}``."""
    parts = _FUNCTION.split(text)
    return {
        name: collections.Counter(_INSTRUCTION.findall(body))
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def read(cubin: bytes | str | os.PathLike, first: str = "toolkit") -> dict[str, Usage]:
    """Every kernel in a cubin of one architecture, by its (mangled) name.

    ``cubin`` is the bytes or the path of the file. Raises `ToolMissing`, and ``RuntimeError`` if the tool
    fails or names different functions in its two listings.
    """
    tool = find_tool(first)
    if isinstance(cubin, bytes):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            return read(file.name, first)
    usage = parse_usage(_run(tool, "-res-usage", os.fspath(cubin)))
    opcodes = parse_sass(_run(tool, "-sass", os.fspath(cubin)))
    if not usage or set(usage) != set(opcodes) or not all(opcodes.values()):
        raise RuntimeError(f"{tool}: functions {sorted(usage)} in the resources, {sorted(opcodes)} in the code")
    return {name: Usage(name, *usage[name], opcodes[name]) for name in usage}
