"""The package nvidia-cudnn-frontend, and cuDNN's plans for the graphs of ``cudnn_graphs.py``.

Planning asks cuDNN which of its engines could run a graph (milliseconds); compiling a plan of a fused graph takes
seconds and happens at its first run.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import threading
from types import ModuleType

import torch

from fastres.backends import cudnn_graphs
from fastres.backends.cudnn_graphs import GraphConfig
from fastres.problem import ConvRequest

#: The cuDNN that the oldest supported torch brings, and the package the graphs were written against.
MIN_CUDNN = 91900
MIN_FRONTEND = (1, 32)

_INSTALL = "pip install fastres[cudnn]"


class Unsupported(ValueError):
    """cuDNN has no plan for a request, or the plan breaks a promise of fastres."""


# ---- the package


def _frontend() -> ModuleType:
    return importlib.import_module("cudnn")


@functools.cache
def missing() -> str:
    """Why the package cannot be used in this process, or an empty string."""
    try:
        if importlib.util.find_spec("cudnn") is None:
            return f"nvidia-cudnn-frontend is not installed ({_INSTALL})"
        # First: the package then finds the library that PyTorch has loaded.
        loaded = torch.backends.cudnn.version()
        frontend = _frontend()
        if not hasattr(frontend, "pygraph"):
            return f"the module cudnn is not nvidia-cudnn-frontend's ({getattr(frontend, '__file__', 'no file')})"
        version = str(frontend.__version__)
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < MIN_FRONTEND:
            return f"nvidia-cudnn-frontend {version} is older than {'.'.join(map(str, MIN_FRONTEND))} ({_INSTALL})"
        found = frontend.backend_version()
    except Exception as error:  # a broken installation may fail in any way, and must not break fastres
        return f"nvidia-cudnn-frontend cannot be used: {type(error).__name__}: {_line(error)}"
    if found < MIN_CUDNN:
        return f"cuDNN {_dotted(MIN_CUDNN)} or later is needed, got {_dotted(found)}"
    if found != loaded:
        return f"nvidia-cudnn-frontend loaded cuDNN {_dotted(found)}, PyTorch {_dotted(loaded)}: they must be the same"
    return ""


def _dotted(version: int | None) -> str:
    return "none" if version is None else f"{version // 10000}.{version % 10000 // 100}.{version % 100}"


def version() -> str:
    """Versions that plans depend on, for the key of a cache; empty where the package cannot be used."""
    if missing():
        return ""
    frontend = _frontend()
    return f"cudnn {_dotted(frontend.backend_version())}, frontend {frontend.__version__}"


def _line(error: BaseException, limit: int = 300) -> str:
    return " ".join(str(error).split())[:limit]


# ---- planning


class Plans:
    """A graph with cuDNN's ranked plans for it; those asked for are compiled and kept."""

    def __init__(self, request: ConvRequest, wording: GraphConfig, dw_dtype: str):
        cudnn = _frontend()
        self._cudnn, self.request = cudnn, request
        self.device = torch.device("cuda", request.device)
        self._sizes: dict[int, int] = {}
        self._refused: dict[int, str] = {}
        self._repeatable: set[int] = set()
        self._lock = threading.Lock()
        with torch.cuda.device(self.device):
            types = cudnn.data_type
            self._graph = cudnn.pygraph(
                name=str(request),
                io_data_type=types.BFLOAT16 if request.dtype == "bfloat16" else types.HALF,
                intermediate_data_type=types.FLOAT,
                compute_data_type=types.FLOAT,
                handle=handle(request.device),
            )
            drawing = cudnn_graphs.Drawing(cudnn, self._graph, request.dtype)
            cudnn_graphs.draw(drawing, request, wording, dw_dtype)
            self.uids = drawing.uids
            self._graph.validate()
            self._graph.build_operation_graph()
            self._graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            # fp32 accumulation and the same bits on every run are promises of fastres.
            note = cudnn.numerical_note
            barred = [note.NONDETERMINISTIC, note.REDUCED_PRECISION_REDUCTION, note.DOWN_CONVERT_INPUTS, note.WINOGRAD]
            self._graph.deselect_numeric_notes(barred)
            self.count = self._graph.get_execution_plan_count()

    def ranks(self, wording: GraphConfig, limit: int) -> list[GraphConfig]:
        """The first ``limit`` plans as configs."""
        fields = {"prologue": wording.prologue, "vectors": wording.vectors, "sums": wording.sums}
        return [GraphConfig(**fields, rank=rank) for rank in range(min(limit, self.count))]

    def compile(self, rank: int) -> int:
        """Compile the plan of that rank, once; bytes of workspace it needs. Raises `Unsupported`."""
        with self._lock:
            if rank in self._sizes:
                return self._sizes[rank]
            if rank in self._refused:
                raise Unsupported(self._refused[rank])
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(f"cuDNN's graph of {self.request} is not compiled yet: run it once before capture")
            try:
                with torch.cuda.device(self.device):
                    self._graph.build_plan_at_index(rank)
                    self._sizes[rank] = int(self._graph.get_workspace_size_plan_at_index(rank))
            except Exception as error:
                self._refused[rank] = f"plan {rank} for {self.request}: {_reason(error)}"
                raise Unsupported(self._refused[rank]) from error
            return self._sizes[rank]

    def run(self, config: GraphConfig, addresses: dict[str, int], sums: torch.Tensor | None) -> None:
        """Launch on the current stream, and see at the first time whether the sums repeat. Raises `Unsupported`.

        addresses   of every tensor in ``uids``, by name.
        sums        the float32 buffer that the sums go to, or None.
        """
        self._launch(config, addresses, sums)
        if config.sums != "reductions" or not config.repeatable or config.rank in self._repeatable:
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"cuDNN's sums for {self.request} are not checked yet: run them once before capture")
        first = sums.clone()
        for _ in range(3):
            self._launch(config, addresses, sums)
            # As bits: a NaN equals itself.
            if not torch.equal(first.view(torch.int32), sums.view(torch.int32)):
                raise Unsupported(f"plan {config.rank} for {self.request}: its sums differ from run to run")
        self._repeatable.add(config.rank)

    def _launch(self, config: GraphConfig, addresses: dict[str, int], sums: torch.Tensor | None) -> None:
        size = self.compile(config.rank)
        if config.sums == "reductions":
            # An engine that adds into its output needs it cleared; the others overwrite it.
            sums.zero_()
        with torch.cuda.device(self.device):
            context = handle(self.request.device)
            self._cudnn.set_stream(handle=context, stream=torch.cuda.current_stream().cuda_stream)
            workspace = torch.empty(size, dtype=torch.uint8, device=self.device) if size else None
            self._graph.execute_plan_at_index(
                {uid: addresses[key] for key, uid in self.uids.items()},
                0 if workspace is None else workspace.data_ptr(),
                config.rank,
                context,
            )


def _reason(error: BaseException) -> str:
    """cuDNN's own words for a refusal: the distinct causes it logged, or the first line of the message."""
    causes = dict.fromkeys(re.findall(r"CUDNN_STATUS_(NOT_SUPPORTED_\w+; Reason: [^\n]{1,120})", str(error)))
    return f"cuDNN has no plan: {'; '.join(list(causes)[:3])}" if causes else f"{type(error).__name__}: {_line(error)}"


_contexts = threading.local()


def handle(device: int):
    """A handle of this thread on ``device``, which must be current: cuDNN's handles are not shared between threads."""
    by_device = _contexts.__dict__.setdefault("by_device", {})
    if device not in by_device:
        by_device[device] = _frontend().create_handle()
    return by_device[device]


@functools.lru_cache(maxsize=4096)
def plans(request: ConvRequest, wording: GraphConfig, dw_dtype: str) -> Plans | str:
    """The plans of a wording (a config of rank 0), or why there are none."""
    try:
        found = Plans(request, wording, dw_dtype)
    except Exception as error:  # what cuDNN or its package refuses, in whatever way, is not served
        return _reason(error)
    return found if found.count else "cuDNN has no plan"
