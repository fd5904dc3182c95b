"""Compiles ``csrc/cuda/*.cu`` for GPUs that are not there and tabulates what came out.

Same flags as the build (`CMakeLists.txt`), one cubin for each source and architecture, read back with `sass`.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import pathlib
import re
import subprocess
import tempfile

from fastres.backends.block_kernels import BOTTLENECKS, BottleneckConfig, BottleneckShape
from fastres.backends.cuda_conv import TILES, TileConfig
from fastres.backends.eval_kernels import BASIC_BLOCKS, STEM, Config
from fastres.backends.hopper_kernels import config_of
from fastres.backends.rotated_kernels import ROTATED, RotatedConfig
from fastres.codegen import sass

ROOT = pathlib.Path(__file__).resolve().parents[2]
PATH = ROOT / "docs" / "kernels" / "cuda.md"
ARCHITECTURES = ("80", "89", "90a", "100")
FLAGS = ("-std=c++20", "-O3", "-DFASTRES_BACKEND=cuda")

#: Shared memory of one block that needs no opt-in; the kernels declare theirs statically.
STATIC_SHARED_LIMIT = 48 * 1024

#: What the main loop of a tensor-core kernel must consist of: products, matrix loads, asynchronous copies.
TENSOR = ("HMMA", "LDSM", "LDGSTS")

#: Compiled, as every kernel is for every architecture, but refused there (``why_not``): the tile of x is too large.
REFUSED = {("89", "basic_block_eval", "128")}

#: The same of a kernel for sm_90 alone: warpgroup products, tensor copies, bulk copies, barriers. Elsewhere it traps.
HOPPER = ("HGMMA", "UTMALDG", "UBLKCP", "SYNCS")
#: Its variants by plan (csrc/cuda/hopper_pipeline.cuh) and projection, with a ResNet-50's block for each.
HOPPER_BLOCKS = {
    ("Narrow", "0"): BottleneckShape(64, 56, 56, 256, 64, 256, False),
    ("Narrow", "1"): BottleneckShape(64, 56, 56, 64, 64, 256, True),
    ("Wide", "0"): BottleneckShape(64, 28, 28, 512, 128, 512, False),
}

#: Kernels that run a whole block, the stem, or the middle of two blocks.
_BLOCKS = ("basic_block_eval", "bottleneck_eval", "rotated_stage", "stem_eval")

_TYPES = {"f": "float32", "bf16": "bfloat16", "f16": "float16"}
_BASIC = re.compile(r"f|NS_(\d+)|L[ib](\d+)E")


@dataclasses.dataclass(frozen=True)
class Row:
    """One compiled kernel. Registers and stack (bytes) of a thread, shared memory (bytes) of a block.

    ``load`` and ``store``: bytes that the widest instruction of one thread moves from and to global memory.
    """

    arch: str
    source: str
    kernel: str
    parameters: tuple[str, ...]
    registers: int
    shared: int
    load: int
    store: int
    stack: int
    spills: int
    tensor: tuple[int, ...] = ()  # instructions of each of TENSOR, or of HOPPER

    @property
    def block(self) -> BottleneckConfig | Config | RotatedConfig | TileConfig | None:
        """The configuration that this kernel was compiled for, None for the kernels that have none."""
        if self.kernel == "stem_eval":
            return STEM
        if self.kernel == "basic_block_eval":
            return next(c for c in BASIC_BLOCKS if c.channels == int(self.parameters[1]))
        sizes = tuple(map(int, self.parameters[1:])) if self.kernel in (*_BLOCKS, "conv_fprop") else ()
        if self.kernel == "bottleneck_eval":
            return next(c for c in BOTTLENECKS if (c.mid, c.projected) == sizes)
        if self.kernel == "rotated_stage":
            return next(c for c in ROTATED if (c.mid, c.next) == sizes)
        if self.kernel == "conv_fprop":
            return next(c for c in TILES if (c.BM, c.BN, c.BK, c.stages, c.warps) == sizes)
        return None

    @property
    def hopper(self) -> BottleneckShape | None:
        """A block that this kernel serves, None for the kernels that are not for sm_90 alone, or where it traps."""
        here = self.kernel == "bottleneck_hopper" and self.arch == "90a"
        return HOPPER_BLOCKS[self.parameters[1:]] if here else None

    @property
    def name(self) -> str:
        return f"{self.kernel}<{', '.join(self.parameters)}>" if self.parameters else self.kernel

    @property
    def problems(self) -> list[str]:
        where, found = f"sm_{self.arch} {self.name}", []
        if self.spills or self.stack:
            found.append(f"{where}: {self.spills} spill instructions, {self.stack} bytes of stack; expected none")
        if self.registers > sass.REGISTER_LIMIT:
            found.append(f"{where}: {self.registers} registers; the limit is {sass.REGISTER_LIMIT}")
        if self.shared > STATIC_SHARED_LIMIT:
            found.append(f"{where}: {self.shared} bytes of shared memory; the limit is {STATIC_SHARED_LIMIT}")
        if "Vector" in self.parameters and self.load < 16:
            found.append(f"{where}: loads at most {self.load} bytes an instruction; expected 16")
        if self.block is not None:
            limit, shared = sass.SHARED_LIMIT[int(re.match(r"\d+", self.arch)[0])], self.block.shared + self.shared
            refused = (self.arch, self.kernel, *self.parameters[1:]) in REFUSED
            if not refused and shared > limit + (1024 if self.shared else 0):
                found.append(f"{where}: {shared} bytes of shared memory; the limit is {limit}")
            # The stem's image lies as words, which are no rows of a matrix.
            needed = [name for name in TENSOR if (self.kernel, name) != ("stem_eval", "LDSM")]
            counts = dict(zip(TENSOR, self.tensor, strict=True))
            found += [f"{where}: no {name}" for name in needed if not counts[name]]
        if self.hopper is not None:
            shared, limit = config_of(self.hopper).bytes(self.hopper) + self.shared, sass.SHARED_LIMIT[90] + 1024
            if shared > limit:
                found.append(f"{where}: {shared} bytes of shared memory; the limit is {limit}")
            found += [f"{where}: no {name}" for name, n in zip(HOPPER, self.tensor, strict=True) if not n]
        return found


def demangle(symbol: str) -> tuple[str, tuple[str, ...]]:
    """Kernel and template parameters of a mangled name: ``_ZN4cuda8k_kernelIfNS_6VectorEEEvPKT_``, k<float32, Vector>.

    Only what the kernels use: types of their own namespace, float, numbers and bools (as 0, 1). Raises ``ValueError``
    for anything else.
    """
    head = re.match(r"_ZN4cuda(\d+)", symbol)
    if not head:
        raise ValueError(f"symbol: expected a kernel of namespace cuda, got {symbol!r}")
    at = head.end() + int(head[1])
    name, parameters = symbol[head.end() : at], []
    if not name.endswith("_kernel"):
        raise ValueError(f"symbol: expected a kernel of namespace cuda, got {symbol!r}")
    if symbol[at : at + 1] == "I":
        at += 1
        while symbol[at] != "E":
            part = _BASIC.match(symbol, at)
            if not part:
                raise ValueError(
                    f"symbol: expected float, a number or a type of namespace cuda at {at}, got {symbol!r}"
                )
            at = part.end()
            text = part[2] or part[0]
            if part[1]:
                text, at = symbol[at : at + int(part[1])], at + int(part[1]) + 1  # and the E that closes NS_
            parameters.append(_TYPES.get(text, text))
    return name.removesuffix("_kernel"), tuple(parameters)


def sources() -> list[pathlib.Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def nvcc() -> str:
    """Path of nvcc. Raises `sass.ToolMissing`."""
    return sass.find_tool("toolkit", "nvcc")


def version() -> str:
    """``"13.0.88"``."""
    text = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release [\d.]+, V([\d.]+)", text)[1]


def widest(usage: sass.Usage, opcode: str) -> int:
    """Bytes the widest instruction ``opcode`` (LDG, STG) moves, 0 if there is none."""
    for bits in (256, 128, 64):
        if usage.count(f"{opcode}.{bits}") or usage.count(f"{opcode}.ENL2.{bits}"):
            return bits // 8
    byte, half = (sum(usage.count(f"{opcode}.{sign}{bits}") for sign in "US") for bits in (8, 16))
    total = usage.count(opcode)
    return 4 if total > byte + half else 2 if half else 1 if byte else 0


def compile_one(arch: str, source: pathlib.Path) -> list[Row]:
    """Every kernel of one source. Raises ``RuntimeError`` with nvcc's output."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / f"{source.stem}.cubin"
        command = [nvcc(), *FLAGS, f"-arch=sm_{arch}", "-cubin", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or done.stderr.strip():
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}")
        rows = []
        for symbol, usage in sass.read(cubin).items():
            kernel, parameters = demangle(symbol)
            row = Row(
                arch=arch,
                source=source.name,
                kernel=kernel,
                parameters=parameters,
                registers=usage.registers,
                shared=usage.shared,
                load=widest(usage, "LDG"),
                store=widest(usage, "STG"),
                stack=usage.stack,
                spills=usage.spills,
                tensor=tuple(usage.count(opcode) for opcode in (HOPPER if kernel == "bottleneck_hopper" else TENSOR)),
            )
            rows.append(row)
    return sorted(rows, key=lambda r: r.name)


def rows(architectures=ARCHITECTURES, jobs: int = 2) -> list[Row]:
    """Every row for the given architectures, ``jobs`` compilers at a time."""
    items = [(arch, source) for arch in architectures for source in sources()]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return [row for part in pool.map(lambda item: compile_one(*item), items) for row in part]


def section(arch: str, table: list[Row]) -> str:
    """The part of the page about one architecture."""
    lines = [
        f"## sm_{arch}",
        "",
        "| kernel | variant | registers | shared | load | store | stack | spills |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for r in table:
        if r.arch == arch:
            lines.append(
                f"| {r.kernel} | {', '.join(r.parameters)} | {r.registers} | {r.shared} | {r.load} | {r.store} "
                f"| {r.stack} | {r.spills} |"
            )
    return "\n".join(lines) + "\n"


def blocks(table: list[Row], title: str = "Whole blocks", kernels: tuple[str, ...] = _BLOCKS) -> str:
    """The part of the page about kernels that run on tensor cores."""
    lines = [
        f"## {title}",
        "",
        "Dynamic shared memory: bytes of one block. blocks: that the launch counts on for one multiprocessor. Then the",
        "instructions in the code: products of tensor cores, matrix loads, asynchronous copies. The stem has no matrix",
        "loads: its image lies as words. A block of 128 channels is refused on sm_89, which has less shared memory.",
        "",
        f"| architecture | kernel | variant | dynamic shared | blocks | {' | '.join(TENSOR)} |",
        "|---|---|---|--:|--:|" + "--:|" * len(TENSOR),
    ]
    for r in table:
        if r.kernel in kernels:
            cells = [f"sm_{r.arch}", r.kernel, ", ".join(r.parameters), r.block.shared, r.block.blocks, *r.tensor]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def hopper(table: list[Row]) -> str:
    """The part of the page about the kernel for sm_90 alone."""
    lines = [
        "## On sm_90a alone",
        "",
        "Tensor copies, warpgroup products. The launch gives each of 384 threads 168 registers; those that compute",
        "take 232, those that copy give theirs back. Dynamic shared memory: bytes of one block, one to a",
        "multiprocessor, for the block of ResNet-50 named.",
        "",
        f"| kernel | variant | block | dynamic shared | {' | '.join(HOPPER)} |",
        "|---|---|---|--:|" + "--:|" * len(HOPPER),
    ]
    for r in table:
        if r.hopper is not None:
            s = r.hopper
            cells = [r.kernel, ", ".join(r.parameters), f"{s.H}x{s.W}x{s.C}", config_of(s).bytes(s), *r.tensor]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def header() -> str:
    return f"""# CUDA kernels as compiled

Generated by `python -m fastres.codegen cuda` with nvcc {version()}. Do not edit.

Each row is one kernel of `csrc/cuda/`, compiled offline for the architecture and read back from the machine
code. No GPU was involved: this page says what was generated, not how fast it is. Every block has 256 threads, but of
`bottleneck_hopper` 384.

variant: activation dtype; `Vector` (C a multiple of 8, addresses aligned to 16 bytes) or `Scalar`; where the
ReLU mask comes from; what joins before the ReLU; of `bottleneck_eval` dtype, channels inside, and whether the
shortcut is a projection; of `basic_block_eval` dtype and channels; of `rotated_stage` dtype, channels inside, and
whether a block follows; of `conv_fprop` dtype, pixels and channels of a tile, input channels of a step, steps in
shared memory, warps side by side along pixels. registers: of one thread (limit {sass.REGISTER_LIMIT}).
shared: bytes of one block, from sm_90 on with the 1024 bytes the system keeps of it. load, store: bytes moved by
the widest instruction of one thread from or to global memory. stack, spills: bytes and local-memory instructions
of one thread, expected 0. `bn_one_pass_*` take dynamic shared memory beside: all that two blocks of a multiprocessor
leave, at most.
"""


def generate(jobs: int = 2, architectures=ARCHITECTURES) -> str:
    """The text of ``PATH``. Raises ``RuntimeError`` listing every kernel that spills or passes a limit."""
    table = rows(architectures, jobs)
    problems = [problem for row in table for problem in row.problems]
    if problems:
        raise RuntimeError("\n".join(problems))
    tensor_cores = blocks(table), blocks(table, "Convolutions", ("conv_fprop",)), hopper(table)
    return "\n".join([header(), *(section(arch, table) for arch in architectures), *tensor_cores])
