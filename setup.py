"""Build of the compiled cores: CMake + ninja + pybind11, without torch, without a GPU.

Environment
    FASTRES_CPU=auto|0|1       CPU kernels. auto: built unless there is no C++ compiler at all. 1: must be built.
    FASTRES_CUDA=auto|0|1      CUDA kernels. auto: built if nvcc is found. 1: must be built. Never asks for a GPU.
    FASTRES_CUDA_ARCHS         e.g. "80;90a", or "native" for the GPU of this machine. Default: 80;89;90a;100 + PTX.
    FASTRES_EMULATOR=1         also the CUDA sources compiled as C++ (fastres._emulator), for tests without a GPU.
    FASTRES_SANITIZE=1         CPU kernels and emulator with AddressSanitizer and UndefinedBehaviorSanitizer
                               (`make sanitize-cpu`, `make sanitize`).
    FASTRES_TEST_ISAS=1        also the 16-wide CPU code compiled for AVX2 ("avx512_sim"), for tests without AVX-512.
    CXX, CUDACXX, CMAKE_BUILD_PARALLEL_LEVEL as everywhere.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def setting(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, "").strip().lower() or default
    if value not in allowed:
        sys.exit(f"fastres: {name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


CPU = setting("FASTRES_CPU", "auto", ("auto", "0", "1"))
CUDA = setting("FASTRES_CUDA", "auto", ("auto", "0", "1"))
EMULATOR = setting("FASTRES_EMULATOR", "0", ("0", "1"))
TEST_ISAS = setting("FASTRES_TEST_ISAS", "0", ("0", "1"))
SANITIZE = setting("FASTRES_SANITIZE", "0", ("0", "1"))


def loud(sentence: str) -> None:
    bar = "*" * 100
    print(f"{bar}\n* fastres: {sentence}\n{bar}", file=sys.stderr, flush=True)


def find_cxx() -> str | None:
    """The C++ compiler CMake would take, or None."""
    named = os.environ.get("CXX", "").split()
    return next((path for c in [*named[:1], "c++", "g++", "clang++"] if (path := shutil.which(c))), None)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [os.environ.get("CUDACXX"), os.path.join(home, "bin", "nvcc") if home else None, "nvcc"]
    candidates.append("/usr/local/cuda/bin/nvcc")
    return next((path for c in candidates if c and (path := shutil.which(c))), None)


def why_not_cuda() -> str:
    """Why the CUDA kernels cannot be compiled here, an empty string if they can."""
    nvcc = find_nvcc()
    if not nvcc:
        return "nvcc was not found (CUDACXX, CUDA_HOME, PATH, /usr/local/cuda)"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    if not release:
        return f"{nvcc} --version names no release"
    if int(release[1]) < 12:
        return f"{nvcc} is release {release[1]}.{release[2]}, older than 12.0 (C++20)"
    return ""


def find_tool(name: str, module: str, attribute: str) -> str:
    """A build tool from the Python package of the build environment, else from PATH."""
    try:
        folder = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        folder = None
    path = (folder and shutil.which(name, path=folder)) or shutil.which(name)
    if not path:
        sys.exit(f"fastres: {name} was not found; install it (pip install {module}) or build with build isolation")
    return path


def plan() -> tuple[list[str], dict[str, str]]:
    """Modules to build, and for each module that is left out the reason."""
    modules, absent = [], {}
    cxx = find_cxx()
    no_cxx = "no C++ compiler was found (CXX, c++, g++, clang++)"
    if CPU == "0":
        absent["_cpu"] = "FASTRES_CPU=0"
    elif cxx:
        modules.append("_cpu")
    elif CPU == "1":
        sys.exit(f"fastres: FASTRES_CPU=1 but {no_cxx}")
    else:
        absent["_cpu"] = no_cxx
    reason = "FASTRES_CUDA=0" if CUDA == "0" else why_not_cuda() or ("" if cxx else no_cxx)
    if not reason:
        modules.append("_cuda")
    elif CUDA == "1":
        sys.exit(f"fastres: FASTRES_CUDA=1 but {reason}")
    else:
        absent["_cuda"] = reason
    if EMULATOR == "1" and not cxx:
        sys.exit(f"fastres: FASTRES_EMULATOR=1 but {no_cxx}")
    if EMULATOR == "1":
        modules.append("_emulator")
    else:
        absent["_emulator"] = "FASTRES_EMULATOR=0 (a test target)"
    return modules, absent


class CMakeBuild(build_ext):
    """All modules in one CMake build; each lands where setuptools expects it."""

    def run(self) -> None:
        if self.extensions:
            self.build_all()
        for name, reason in ABSENT.items():
            if name == "_cpu":
                loud(f"fastres.{name} is NOT built: {reason}. Everything runs through PyTorch instead.")
            else:
                print(f"fastres: fastres.{name} is not built: {reason}", flush=True)
        self.write_info()

    def build_all(self) -> None:
        import pybind11

        started = time.perf_counter()
        build = self.build_folder()
        build.mkdir(parents=True, exist_ok=True)
        self.outputs = {}
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            self.outputs[ext.name.rpartition(".")[2]] = target
        cmake = find_tool("cmake", "cmake", "CMAKE_BIN_DIR")
        define = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": find_tool("ninja", "ninja", "BIN_DIR"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "FASTRES_MODULES": ";".join(self.outputs),
            "FASTRES_OUTPUT": str(build / "out"),
            "FASTRES_TEST_ISAS": "ON" if TEST_ISAS == "1" else "OFF",
            "FASTRES_SANITIZE": "ON" if SANITIZE == "1" else "OFF",
        }
        if "_cuda" in self.outputs:
            define["CMAKE_CUDA_COMPILER"] = find_nvcc()
            define["FASTRES_CUDA_ARCHS"] = os.environ.get("FASTRES_CUDA_ARCHS", "").strip()
        arguments = [f"-D{k}={v}" for k, v in define.items()]
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(available_cpus())
        hint = "; FASTRES_CUDA=0 leaves the CUDA kernels out" if "_cuda" in self.outputs and CUDA == "auto" else ""
        self.step([cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *arguments], hint)
        self.step([cmake, "--build", str(build), "--parallel", jobs], hint)
        for target in self.outputs.values():
            # A fresh inode: a process that has the old file mapped keeps it.
            target.unlink(missing_ok=True)
            shutil.copy2(build / "out" / target.name, target)
        print(f"fastres: built {', '.join(self.outputs)} in {time.perf_counter() - started:.0f} s", flush=True)

    def build_folder(self) -> Path:
        """An editable install keeps its objects: installing again compiles what has changed."""
        return ROOT / "build" / f"editable-{self.plat_name}" if self.inplace else Path(self.build_temp).resolve()

    @staticmethod
    def step(command: list[str], hint: str) -> None:
        print("fastres:", " ".join(command), flush=True)
        code = subprocess.run(command).returncode
        if code:
            sys.exit(
                f"fastres: building the compiled core failed (exit status {code} of {Path(command[0]).name}){hint}"
            )

    def write_info(self) -> None:
        """_build.json: what `fastres doctor` says about the installation."""
        info = json.loads((self.build_folder() / "fastres_build.json").read_text()) if self.extensions else {}
        info["modules"] = [ext.name for ext in self.extensions]
        info["absent"] = {f"fastres.{name}": reason for name, reason in ABSENT.items()}
        now = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
        info["date"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
        info["python"] = platform.python_version()
        info["platform"] = platform.platform()
        self.info_path().write_text(json.dumps(info, indent=1) + "\n")

    def info_path(self) -> Path:
        package = ROOT / "fastres" if self.inplace else Path(self.build_lib) / "fastres"
        package.mkdir(parents=True, exist_ok=True)
        return package / "_build.json"

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(self.info_path())] if not self.inplace else super().get_outputs()


class AlwaysBuildExt(build):
    """build_ext runs without extensions too: it then says why there are none, and records it."""

    sub_commands = [(name, None if name == "build_ext" else when) for name, when in build.sub_commands]


def available_cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


MODULES, ABSENT = plan()

setup(
    packages=[*find_packages(include=["fastres", "fastres.*"]), "fastres.triton_kernels"],
    # Never a top-level package: that name belongs to others.
    package_dir={"fastres": "fastres", "fastres.triton_kernels": "triton_kernels"},
    ext_modules=[Extension(f"fastres.{name}", sources=[]) for name in MODULES],
    cmdclass={"build": AlwaysBuildExt, "build_ext": CMakeBuild},
    zip_safe=False,
)
