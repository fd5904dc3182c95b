"""Sessions as files: safetensors, with a JSON description in its header and a hash over description and weights."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastres import machine
from fastres.inference import choices
from fastres.inference.checking import Verdict
from fastres.inference.executors import PRECISIONS
from fastres.inference.plan import NODES, Conv, Plan, Segment, Shape
from fastres.inference.session import InferenceSession, Sample
from fastres.ops.params import DTYPES

FORMAT = 1
_KEY = "fastres"
_TYPES = {kind.__name__: kind for kind in (*NODES, Conv)}
_DTYPES = {str(dtype)[6:]: dtype for dtype in DTYPES}


class SessionFileError(ValueError):
    """A file that is no whole session of this version. The message is one line."""


@dataclass(frozen=True, eq=False)
class Stored:
    """What a file holds."""

    plan: Plan
    dtype: torch.dtype
    precision: str
    accepts: tuple[torch.dtype, ...]
    example: Shape
    title: str
    notes: tuple[str, ...]
    verdict: Verdict
    sample: Sample
    choices: dict


def write(session: InferenceSession, path: Path) -> Path:
    """Write ``session``; the file appears under its name when it is complete."""
    foreign = [f"{f.name or '(the model)'} ({type(f.module).__name__})" for f in session.plan.foreign()]
    if foreign:
        raise ValueError(
            f"session: got torch modules in it that no data file can carry: {', '.join(foreign)}; save the model's "
            "state_dict and optimize again, or optimize and save the known part alone"
        )
    if session.sample is None or session.verdict is None:
        raise ValueError("session: got one whose output is not one tensor with a row an image, expected such a one")
    import safetensors.torch

    tensors: dict[str, Tensor] = {"sample.x": session.sample.x, "sample.truth": session.sample.truth}
    nodes = [_encode(n, f"{i}.{n.name}", tensors) for i, n in enumerate(session.plan.nodes())]
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    head = {
        "format": FORMAT,
        "nodes": nodes,
        "dtype": str(session.dtype)[6:],
        "precision": session.precision,
        "accepts": [str(d)[6:] for d in session.accepts],
        "example": list(session.example),
        "title": session.title,
        "notes": list(session._notes),
        "verdict": session.verdict.to_dict(),
        "choices": {"chip": machine.chip(session.device), "segments": choices.gather(session.runner)},
        "torch": torch.__version__,
    }
    head["sha256"] = _hash(head, tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        safetensors.torch.save_file(tensors, part, metadata={_KEY: json.dumps(head)})
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _encode(value, key: str, tensors: dict[str, Tensor]):
    if isinstance(value, Tensor):
        tensors[key] = value
        return {"tensor": key}
    if is_dataclass(value):
        inner = {f.name: _encode(getattr(value, f.name), f"{key}.{f.name}", tensors) for f in fields(value)}
        return {"type": type(value).__name__, **inner}
    if isinstance(value, tuple):
        return [_encode(item, f"{key}.{i}", tensors) for i, item in enumerate(value)]
    return value


def _decode(value, tensors: dict[str, Tensor]):
    if isinstance(value, list):
        return tuple(_decode(item, tensors) for item in value)
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        t = tensors.pop(value["tensor"])
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
    arguments = {name: _decode(item, tensors) for name, item in value.items() if name != "type"}
    return _TYPES[value["type"]](**arguments)


def _hash(head: dict, tensors: dict[str, Tensor]) -> str:
    """Over the description without its hash, and name, dtype, shape and bytes of every tensor."""
    described = {name: value for name, value in head.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"\n{name} {t.dtype} {tuple(t.shape)}\n".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read(path: Path) -> Stored:
    """Everything in the file, its hash verified. Raises SessionFileError, or OSError where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    with open(path, "rb"):  # a missing or unreadable file is the system's error, in its words
        pass
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if set(metadata) != {_KEY}:
                raise SessionFileError(f"{path}: is a safetensors file, but no saved session of fastres")
            head = _head(path, metadata[_KEY])
            # Copied to where an allocator puts tensors: the bits of some products depend on the alignment (MKL).
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except SafetensorError as error:
        raise SessionFileError(f"{path}: is damaged, cut off or no saved session: {error}") from error
    if head.get("sha256") != _hash(head, tensors):
        raise SessionFileError(f"{path}: is damaged: its contents do not match the hash it was saved with")
    try:
        return _stored(head, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise SessionFileError(f"{path}: describes no session: {type(error).__name__}: {error}") from error


def _head(path: Path, text: str) -> dict:
    try:
        head = json.loads(text)
    except ValueError as error:
        raise SessionFileError(f"{path}: is damaged: its description is no JSON: {error}") from error
    version = head.get("format") if isinstance(head, dict) else None
    if type(version) is not int:
        raise SessionFileError(f"{path}: is damaged: its description names no format")
    if version > FORMAT:
        raise SessionFileError(f"{path}: has format {version}; this fastres reads up to {FORMAT}: install a later one")
    if version < 1:
        raise SessionFileError(f"{path}: has format {version}, expected 1 to {FORMAT}")
    return head


def _stored(head: dict, tensors: dict[str, Tensor]) -> Stored:
    sample = Sample(tensors.pop("sample.x"), tensors.pop("sample.truth"))
    segment = Segment(_decode(head["nodes"], tensors))
    if tensors:
        raise ValueError(f"tensors that no node names: {', '.join(sorted(tensors))}")
    shapes = segment.shapes(tuple(sample.x.shape))
    if shapes[-1] != tuple(sample.truth.shape):
        raise ValueError(f"its nodes make {shapes[-1]} of its image, its output has {tuple(sample.truth.shape)}")
    if head["precision"] not in PRECISIONS:
        raise ValueError(f"precision {head['precision']!r}")
    accepts = tuple(_DTYPES[name] for name in head["accepts"])
    return Stored(
        Plan((segment,)), _DTYPES[head["dtype"]], head["precision"], accepts, tuple(head["example"]), head["title"],
        tuple(head["notes"]), Verdict(**head["verdict"]), sample, head.get("choices", {}),
    )  # fmt: skip
