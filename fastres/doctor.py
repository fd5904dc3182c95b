"""What this machine is, what was built, which backend serves what, and why. Plain data; ``cli.py`` prints it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from pathlib import Path

import torch

import fastres
from fastres.backends import native
from fastres.machine import cpu

#: Extension -> the backend it carries.
EXTENSIONS = {"_cpu": "cpu", "_cuda": "cuda", "_emulator": "emulator"}

_PACKAGES = (
    "torchvision", "triton", "numpy", "pillow", "matplotlib", "rich", "typer", "safetensors", "pytest", "scikit-learn",
)  # fmt: skip

#: (op, channels) of a ResNet-50's typical requests.
TYPICAL = (
    ("add_relu", None), ("batch_norm_act", 256), ("conv_bn_act", 64), ("basic_block", 64), ("bottleneck", 256),
    ("stem", 64),
)  # fmt: skip


def gpus() -> list[dict]:
    """Name, compute capability, multiprocessors and memory (GiB) of each CUDA device torch can use."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": p.name,
                "capability": f"{p.major}.{p.minor}",
                "multiprocessors": p.multi_processor_count,
                "memory_gib": round(p.total_memory / 2**30, 1),
            }
        )
    return found


def openmp_runtimes() -> list[str] | None:
    """File names of the OpenMP runtimes mapped into this process; None where the system does not tell.

    More than one means two thread pools fighting for the same cores.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    files = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line}
    return sorted({Path(f).name for f in files if re.match(r"lib(gomp|iomp5|omp)\b", Path(f).name)})


def versions() -> dict[str, str]:
    """Versions of fastres, Python, torch with its CUDA, and of the packages installed beside it."""
    found = {"fastres": fastres.__version__, "python": platform.python_version(), "torch": torch.__version__}
    found["cuda"] = torch.version.cuda or "none (CPU build of torch)"
    if torch.cuda.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def tools() -> dict[str, str]:
    """Where the compilers are that ``torch.compile`` and the build use; "not found" otherwise."""
    cuda_home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{cuda_home}/bin")
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    return {"C++ compiler": compiler or "not found", "nvcc": nvcc or "not found"}


def extensions() -> dict[str, dict]:
    """Each compiled extension: whether it loads, from which file, how it was built, or why it was not."""
    record = native.build_info()
    found = {}
    for module in EXTENSIONS:
        try:
            loaded = importlib.import_module(f"fastres.{module}")
        except ImportError as error:
            why = record.get("absent", {}).get(f"fastres.{module}") or _one_line(error)
            found[module] = {"built": False, "why": why}
            continue
        entry = {"built": True, "file": Path(loaded.__file__).name, "compiler": record.get("compiler", "unknown")}
        if module == "_cpu":
            entry |= {"isa in use": loaded.isa(), "isas": loaded.available_isas(), "flags": record.get("cpu_isas", {})}
            # The backend hands the module torch's OpenMP runtime when it loads.
            entry["OpenMP"] = "torch's" if _cpu_has_openmp(loaded) else "none: one thread"
        if module == "_cuda":
            entry |= record.get("cuda") or {}
        found[module] = entry
    return found


def _cpu_has_openmp(module) -> bool:
    from fastres import dispatch

    dispatch.load("cpu")
    return module.has_openmp()


def backends() -> dict[str, dict]:
    """Each backend: available for a plain fp32 request on its own kind of device, or the reasons why not."""
    from fastres import dispatch

    device_of = {"cuda": "cuda", "triton": "cuda"}
    found = {}
    for name in dispatch.BACKENDS:
        request = dispatch.Request("add_relu", torch.device(device_of.get(name, "cpu")), torch.float32)
        try:
            reasons = dispatch.load(name).why_not(request)
        except ImportError as error:
            reasons = [_one_line(error)]
        found[name] = {"available": not reasons, "why_not": reasons}
    return found


def choices(verify: bool = False) -> list[dict]:
    """For typical requests on each device: the backend chosen and why the ones before it were not.

    ``verify`` runs the self-check of a GPU kernel that would run on first use, so that the answer is final.
    """
    from fastres import dispatch

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = []
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            for op, channels in TYPICAL:
                request = dispatch.Request(op, torch.device(device), dtype, channels, True)
                passed_over = {}
                for name, reasons in dispatch.explain(request):
                    reasons = list(reasons)
                    if verify and not reasons:
                        reasons = _self_check(request, name)
                    if not reasons:
                        break
                    passed_over[name] = reasons
                rows.append(
                    {
                        "op": op,
                        "device": device,
                        "dtype": str(dtype).removeprefix("torch."),
                        "channels": channels,
                        "backend": name,
                        "passed_over": passed_over,
                    }
                )
    return rows


def _self_check(request, name: str) -> list[str]:
    from fastres import dispatch, verify

    wrong = verify.failure(request, name, dispatch.load(name), dispatch.LAUNCHES[request.op])
    return [wrong] if wrong else []


def tuning() -> dict:
    """Where the verdicts and winners of the tuning are kept, which are in force on each GPU, what was rejected."""
    from fastres.tuning import status

    return status()


def cpu_convolutions() -> list[dict]:
    """Whose convolutions serve on this CPU, by dtype and kind, for a 3x3 of 64 channels on 8 images of 56 x 56.

    In 16 bit this is measured, once per process, in about 20 ms.
    """
    from fastres.backends import cpu as cpu_backend
    from fastres.backends import cpu_conv

    geometry, rows = ((1, 1), (1, 1), (1, 1), 1), []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = cpu_backend.stand_in((8, 64, 56, 56), dtype)
        w = cpu_backend.stand_in((64, 64, 3, 3), dtype)
        reasons = cpu_conv.why_not(x, w, geometry)
        ours = [kind for kind in ("fprop", "dgrad", "wgrad") if not reasons and cpu_conv.wins(kind, x, w, geometry)]
        isa = cpu_backend.isa_or_none()
        if reasons:
            why = "; ".join(reasons)
        elif isa == "scalar":
            why = "no kernel for this instruction set"
        elif dtype == torch.float32:
            why = f"from measurements on {isa}" if ours else f"none was measured faster on {isa}"
        elif cpu_conv.narrow_ratio(dtype) == float("inf"):
            why = "PyTorch has no kernel for it here"
        else:
            why = f"ours take 1/{cpu_conv.narrow_ratio(dtype):.2g} of PyTorch's time, measured now"
        rows.append({"dtype": str(dtype).removeprefix("torch."), "ours": ours, "why": why})
    return rows


def matrix_unit() -> str:
    """Whether inference sessions have this CPU's matrix unit, and for what."""
    from fastres.backends import cpu_matrix

    if cpu_matrix.unit() == "instructions":
        return 'AMX with bfloat16: offered to bf16, fp16 and precision="high"'
    return "none (AMX with bfloat16)"


def pairs_unit() -> str:
    """Whether inference sessions in bf16 multiply pairs of bfloat16 on this CPU."""
    from fastres.backends import cpu_conv

    return {
        "full": "AVX512-BF16 at the rate of other products: serves sessions in bf16",
        "slow": "AVX512-BF16 at half that rate or less: not used, float32 products are as fast",
    }.get(cpu_conv.pairs_unit(), "none (AVX512-BF16)")


def whole_blocks(verify: bool = False) -> dict:
    """Evaluation blocks in one kernel: what was decided in this process, and which typical ones each GPU could take.

    ``verify`` proves the kernels on those (not their speed, which the first call of a block measures). And, with why,
    the blocks of a ResNet that no GPU takes as one kernel.
    """
    from fastres import block_geometry, dispatch, whole_block

    kernels, rows = dispatch.load("cuda"), []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", index)
        for shape in block_geometry.TYPICAL:
            why = getattr(kernels, f"why_not_{shape.op}")(device, torch.bfloat16, shape)
            if verify and not why:
                why = [wrong] if (wrong := whole_block.check(kernels, device, torch.bfloat16, shape)) else []
            rows.append({"gpu": index, "shape": str(shape), "dtype": "bfloat16", "why_not": why})
    unserved = [{"shape": str(shape), "why_not": shape.reasons} for shape in block_geometry.TYPICALLY_UNSERVED]
    return {"verdicts": whole_block.verdicts(), "typical": rows, "unserved": unserved}


def one_pass() -> dict:
    """Batch normalisation in one launch: whether it was asked for, and why each GPU could not take a typical tensor."""
    from fastres import dispatch

    kernels, gpus_ = dispatch.load("cuda"), {}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        reasons = kernels.why_not_one_pass(torch.device("cuda", index), torch.bfloat16, 8 * 56 * 56, 64, 1)
        gpus_[torch.cuda.get_device_name(index)] = reasons
    return {"asked": os.environ.get("FASTRES_ONE_PASS") == "1", "gpus": gpus_}


def settings() -> dict[str, str]:
    """The switches in force: threads, fp32 precision, and the FASTRES_* variables that are set."""
    found = {
        "torch threads": str(torch.get_num_threads()),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "deterministic algorithms": str(torch.are_deterministic_algorithms_enabled()),
    }
    for variable in sorted(os.environ):
        if variable.startswith("FASTRES_") or variable in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
            found[variable] = os.environ[variable]
    return found


def examine(verify: bool = False) -> dict:
    """Everything ``fastres doctor`` prints, as JSON-ready data."""
    return {
        "machine": {"os": platform.platform(), "cpu": cpu(), "gpus": gpus(), "executable": sys.executable},
        "versions": versions(),
        "tools": tools(),
        "settings": settings(),
        "extensions": extensions(),
        "backends": backends(),
        "choices": choices(verify),
        "tuning": tuning(),
        "cpu_convolutions": cpu_convolutions(),
        "matrix_unit": matrix_unit(),
        "pairs_unit": pairs_unit(),
        "whole_blocks": whole_blocks(verify),
        "one_pass": one_pass(),
        "openmp": openmp_runtimes(),
    }


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
