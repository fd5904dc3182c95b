"""Verdicts and winners of the tuning on disk: one JSON file for each GPU and set of library versions.

``{"format": 1, "key": {...}, "entries": {request: entry}}``. An entry holds ``verdicts`` (choice -> what is wrong with
it, "" for nothing, and when that was found) and, once tuned, ``chosen``, ``us``, ``library_us``, ``when``. A file is
read whole, merged with what this process knows and replaced in one step: no locks, no half-written file, the last
writer wins. Whatever a cache can do to a program is to make it measure again.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

import torch

FORMAT = 1


# ---- where


def directory() -> Path | None:
    """``FASTRES_CACHE_DIR``, else the platform's cache directory; None on a system that names neither."""
    if given := os.environ.get("FASTRES_CACHE_DIR"):
        return Path(given).expanduser()
    try:
        import platformdirs
    except ImportError:
        base = _cache_home()
        return None if base is None else base / "fastres"
    return Path(platformdirs.user_cache_dir("fastres", appauthor=False))


def _cache_home() -> Path | None:
    """What platformdirs would say of the parent directory."""
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local)
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # the specification has relative paths ignored
        return Path(given)
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache"


# ---- for whom


@functools.cache
def key(device: int) -> dict[str, str]:
    """What a verdict depends on beside the request: GPU ``device``, driver and every compiler and library involved."""
    p = torch.cuda.get_device_properties(device)
    return {
        "gpu": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": str(p.multi_processor_count),
        "driver": _driver(),
        "runtime": str(torch.version.cuda or torch.version.hip),
        "torch": torch.__version__,
        "triton": _version("triton", "pytorch-triton", "pytorch-triton-rocm"),
        "cudnn": str(torch.backends.cudnn.version()),
        "cudnn_frontend": _version("nvidia-cudnn-frontend"),
        "fastres": f"{getattr(sys.modules[__package__], '__version__', 'unknown')}+{sources()}",
    }


def _driver() -> str:
    try:
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    # CUDA's own number moves with the driver too, if less finely.
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    return f"{found.group(1) if found else 'unknown'}, CUDA {ask() if ask else 'unknown'}"


def _version(*packages: str) -> str:
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


@functools.cache
def sources() -> str:
    """Digest of the kernels, Triton's sources and the compiled CUDA module: one that was edited has no verdict yet,
    whatever the version number says."""
    digest = hashlib.sha256()
    package = importlib.util.find_spec("fastres.triton_kernels")
    folders = [Path(p) for p in (package.submodule_search_locations or ())] if package else []
    files = [f for folder in folders for f in folder.glob("*.py")]
    files += [f for f in (Path(__file__).parent / "backends").glob("*.py") if re.match(r"triton|cud", f.name)]
    compiled = getattr(importlib.util.find_spec("fastres._cuda"), "origin", None)
    files += [Path(compiled)] if compiled else []
    for file in sorted(files, key=lambda f: f.name):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:8]


def file_name(k: dict[str, str]) -> str:
    """Readable by the GPU's name, told apart by a hash of the whole key."""
    gpu = re.sub(r"[^a-z0-9]+", "-", k["gpu"].lower()).strip("-")
    return f"{gpu}-{hashlib.sha256(json.dumps(k, sort_keys=True).encode()).hexdigest()[:12]}.json"


# ---- entries


def now() -> str:
    """UTC to the microsecond: sorts as text."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds")


def merged(a: dict, b: dict) -> dict:
    """One entry of two: of each verdict and of the winner the newer one, ``b``'s where they are of one age."""
    verdicts = dict(a.get("verdicts", {}))
    for choice, verdict in b.get("verdicts", {}).items():
        if choice not in verdicts or verdict["when"] >= verdicts[choice]["when"]:
            verdicts[choice] = verdict
    winner = b if b.get("when", "") >= a.get("when", "") else a
    return {"verdicts": verdicts, **{k: winner[k] for k in ("chosen", "us", "library_us", "when") if k in winner}}


def _valid(entry) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("verdicts"), dict):
        return False
    for verdict in entry["verdicts"].values():
        if not isinstance(verdict, dict) or not all(isinstance(verdict.get(k), str) for k in ("wrong", "when")):
            return False
    numbers = all(isinstance(entry.get(k, 0), (int, float)) for k in ("us", "library_us"))
    return numbers and all(isinstance(entry.get(k, ""), str) for k in ("chosen", "when"))


class Foreign(ValueError):
    """A file that is not what this process would have written."""


def read(path: Path, k: dict[str, str] | None = None) -> dict[str, dict]:
    """Entries of a file; {} if there is none. Raises Foreign, or OSError where it cannot be read.

    ``k``: the key the file must have been written under, None for any.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return {}
    try:
        content = json.loads(text)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise Foreign(f"not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise Foreign(f"not a tuning file of format {FORMAT}")
    if k is not None and content.get("key") != k:
        raise Foreign("written for another machine or other versions")
    entries = content.get("entries")
    if not isinstance(entries, dict) or not all(map(_valid, entries.values())):
        raise Foreign("entries of another form")
    return entries


class Store:
    """Entries of one GPU, in memory and, where the system lets us, on disk."""

    def __init__(self, k: dict[str, str]):
        self.key = k
        self._complained = False
        folder = directory()
        self.path = None if folder is None else folder / file_name(k)
        if folder is None:
            self._in_memory("no cache directory is known (set FASTRES_CACHE_DIR)")
        self._entries: dict[str, dict] = {}
        self._entries = self._read()

    @property
    def entries(self) -> dict[str, dict]:
        """By request in words. Not to be changed."""
        return self._entries

    @property
    def on_disk(self) -> bool:
        return self.path is not None

    def get(self, request: str) -> dict:
        return self._entries.get(request, {"verdicts": {}})

    def put(self, request: str, entry: dict) -> None:
        """Add what was found out about a request, then bring the file up to date."""
        self._entries[request] = merged(self.get(request), entry)
        if self.path is None:
            return
        for text, other in self._read().items():
            self._entries[text] = merged(other, self._entries[text]) if text in self._entries else other
        content = {"format": FORMAT, "key": self.key, "entries": self._entries}
        try:
            self._write(json.dumps(content, indent=1, sort_keys=True))
        except OSError as error:
            self._in_memory(f"{self.path} cannot be written ({error.strerror or error})")

    def _read(self) -> dict[str, dict]:
        if self.path is None:
            return {}
        try:
            return read(self.path, self.key)
        except Foreign as error:
            self._set_aside(str(error))
        except OSError as error:
            self._in_memory(f"{self.path} cannot be read ({error.strerror or error})")
        return {}

    def _set_aside(self, why: str) -> None:
        aside = self.path.with_name(self.path.name + ".broken")
        try:
            os.replace(self.path, aside)
        except FileNotFoundError:
            return  # another process was faster
        except OSError as error:
            self._in_memory(f"{self.path} is {why} and cannot be set aside ({error.strerror or error})")
            return
        warnings.warn(f"fastres: {self.path} is {why}; it was set aside as {aside.name}", RuntimeWarning, stacklevel=2)

    def _in_memory(self, why: str) -> None:
        self.path = None
        if not self._complained:
            self._complained = True
            text = f"fastres: {why}: what tuning and verification find out is kept in memory only"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _write(self, text: str) -> None:
        """A reader meets the old file or the new one, never a part of either."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=self.path.stem, suffix=".tmp", dir=self.path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(name, self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
