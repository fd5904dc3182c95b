"""Compiles the Triton kernels for GPUs that are not there and tabulates what came out.

The launchers themselves are called, on stand-ins for tensors, with the launch intercepted: what is compiled
here is what would run, tile, flags and all. No GPU, no driver, no torch tensor is involved.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib
import multiprocessing
import pathlib
from collections.abc import Callable, Iterator
from unittest import mock

from fastres.codegen import sass

PATH = pathlib.Path(__file__).resolve().parents[2] / "docs" / "kernels" / "triton.md"
ARCHITECTURES = (80, 89, 90, 100)

# A layer of ResNet-50 (batch 256, 14x14), and the narrow, unaligned extreme (for add_relu, an odd n).
M, C_WIDE, C_ODD = 50176, 256, 3
_IMAGE = (256, 112, 112)
_POOL = (56, 56, 3, 2, 1)


@dataclasses.dataclass(frozen=True)
class Operand:
    """Stands in for a tensor: an element type and an address that is a multiple of 16."""

    type: str

    def element_size(self) -> int:
        return {"fp32": 4, "bf16": 2, "fp16": 2, "u8": 1}[self.type]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a launcher: ``call(launchers, activation, C)``. ``act`` False: no activations, float32 only."""

    function: str
    flags: str
    call: Callable
    act: bool = True


_V, _U8 = Operand("fp32"), Operand("u8")
CASES = (
    Case("add_relu_fwd", "mask", lambda k, a, C: k.add_relu_fwd(a, a, M * C - C % 2, a, _U8)),
    Case("add_relu_bwd", "", lambda k, a, C: k.add_relu_bwd(a, _U8, M * C - C % 2, a)),
    Case("bn_stats", "", lambda k, a, C: k.bn_stats(a, M, C, 128, _V)),
    Case("bn_finalize", "weight, bias", lambda k, a, C: k.bn_finalize(_V, 128, C, _V, _V, 1e-5, _V), act=False),
    Case("bn_fold", "weight, bias", lambda k, a, C: k.bn_fold(_V, _V, _V, _V, 1e-5, C, _V), act=False),
    Case("bn_apply", "relu", lambda k, a, C: k.bn_apply(a, M, C, _V, None, None, 1, a, None)),
    Case("bn_apply", "residual, relu, mask", lambda k, a, C: k.bn_apply(a, M, C, _V, a, None, 1, a, _U8)),
    Case("bn_apply", "residual with BN, relu, mask", lambda k, a, C: k.bn_apply(a, M, C, _V, a, _V, 1, a, _U8)),
    Case(
        "bn_bwd_reduce",
        "relu recomputed, y",
        lambda k, a, C: k.bn_bwd_reduce(a, a, M, C, _V, None, None, None, 1, 128, _V, a),
    ),
    Case("bn_bwd_reduce", "mask", lambda k, a, C: k.bn_bwd_reduce(a, a, M, C, _V, a, None, _U8, 1, 128, _V, None)),
    Case(
        "bn_bwd_reduce",
        "mask, residual with BN",
        lambda k, a, C: k.bn_bwd_reduce(a, a, M, C, _V, a, _V, _U8, 1, 128, _V, None),
    ),
    Case(
        "bn_bwd_finalize",
        "batch statistics",
        lambda k, a, C: k.bn_bwd_finalize(_V, 1, 128, M, C, _V, 1, _V, _V, _V),
        act=False,
    ),
    Case(
        "bn_bwd_apply",
        "relu recomputed",
        lambda k, a, C: k.bn_bwd_apply(a, a, M, C, _V, _V, None, None, None, None, 1, a, None),
    ),
    Case(
        "bn_bwd_apply",
        "mask, dres",
        lambda k, a, C: k.bn_bwd_apply(a, a, M, C, _V, _V, a, None, None, _U8, 1, a, a),
    ),
    Case(
        "bn_bwd_apply",
        "mask, dres with BN",
        lambda k, a, C: k.bn_bwd_apply(a, a, M, C, _V, _V, a, _V, _V, _U8, 1, a, a),
    ),
    Case("bias_act", "bias, relu", lambda k, a, C: k.bias_act(a, M, C, _V, None, 1, a)),
    Case("bias_act", "bias, residual, relu", lambda k, a, C: k.bias_act(a, M, C, _V, a, 1, a)),
    Case("mask_add", "", lambda k, a, C: k.mask_add(a, a, _U8, M, C, a)),
    Case("stem_fwd", "3x3/2", lambda k, a, C: k.stem_fwd(a, *_IMAGE, C, _V, *_POOL, a, None)),
    Case("stem_fwd", "3x3/2, idx", lambda k, a, C: k.stem_fwd(a, *_IMAGE, C, _V, *_POOL, a, _U8)),
    Case("stem_bwd_reduce", "3x3/2", lambda k, a, C: k.stem_bwd_reduce(a, _U8, a, *_IMAGE, C, _V, *_POOL, 512, _V)),
    Case("stem_bwd_apply", "3x3/2", lambda k, a, C: k.stem_bwd_apply(a, _U8, a, *_IMAGE, C, _V, _V, *_POOL, a)),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One compiled kernel. ``shared`` in bytes a block; global loads and stores by instruction, ``wide``: 16 bytes."""

    arch: int
    function: str
    flags: str
    dtype: str
    C: int
    BM: int
    BC: int
    warps: int
    registers: int
    shared: int
    loads: int
    wide_loads: int
    stores: int
    wide_stores: int
    stack: int
    spills: int

    def line(self) -> str:
        return (
            f"| {self.function} | {self.flags} | {self.dtype} | {self.C} | {self.BM}x{self.BC} | {self.warps} "
            f"| {self.registers} | {self.shared} | {self.wide_loads}/{self.loads} | {self.wide_stores}/{self.stores} "
            f"| {self.spills} |"
        )

    @property
    def problems(self) -> list[str]:
        limit = sass.SHARED_LIMIT[self.arch]
        name = f"sm_{self.arch} {self.function} ({self.flags}) {self.dtype} C={self.C}"
        found = []
        if self.spills or self.stack:
            found.append(f"{name}: {self.spills} spill instructions, {self.stack} bytes of stack; expected none")
        if self.registers > sass.REGISTER_LIMIT:
            found.append(f"{name}: {self.registers} registers; the limit is {sass.REGISTER_LIMIT}")
        if self.shared > limit:
            found.append(f"{name}: {self.shared} bytes of shared memory; the limit is {limit}")
        return found


def work(architectures=ARCHITECTURES) -> list[tuple[int, int, str, int]]:
    """What is compiled: (arch, index into CASES, dtype, C). float16 and the odd float32 on sm_90 only."""
    items = []
    for arch in architectures:
        for index, case in enumerate(CASES):
            if not case.act:
                items.append((arch, index, "fp32", C_WIDE))
                continue
            items += [(arch, index, "bf16", C_WIDE), (arch, index, "fp32", C_WIDE), (arch, index, "bf16", C_ODD)]
            if arch == 90:
                items += [(arch, index, "fp16", C_WIDE), (arch, index, "fp32", C_ODD)]
    return items


@contextlib.contextmanager
def intercepted() -> Iterator[list]:
    """Launches in the block are recorded as (kernel, args, kwargs) and do not run."""
    from triton.runtime.jit import JITFunction

    launches = []

    def run(self, *args, grid, warmup, **kwargs):
        launches.append((self, args, kwargs))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def source(kernel, args: tuple, kwargs: dict):
    """The launch as Triton's compiler takes it: (ASTSource, options). Specialised as the JIT would."""
    from triton.compiler import ASTSource

    values = dict(zip(kernel.arg_names, args, strict=False))
    options = {key: kwargs[key] for key in kwargs if key not in kernel.arg_names}
    values.update({key: value for key, value in kwargs.items() if key in kernel.arg_names})
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        key, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[key], constants[key] = "constexpr", value
        elif isinstance(value, Operand):
            signature[key] = f"*{value.type}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif parameter.do_not_specialize:
            signature[key] = "i32" if -(2**31) <= value < 2**31 else "i64"
        else:
            raise TypeError(f"{kernel.__name__}: {key} is specialised by value, which would compile it per shape")
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes), options


def compile_one(item: tuple[int, int, str, int]) -> Row:
    """Compiles one item of `work`."""
    import triton
    from triton.backends.compiler import GPUTarget

    launchers = importlib.import_module("fastres.triton_kernels")
    arch, index, dtype, C = item
    case = CASES[index]
    with intercepted() as launches:
        case.call(launchers, Operand(dtype), C)
    ((kernel, args, kwargs),) = launches
    ast, options = source(kernel, args, kwargs)
    compiled = triton.compile(ast, target=GPUTarget("cuda", arch, 32), options=options)
    ((_, usage),) = sass.read(compiled.asm["cubin"], "triton").items()
    return Row(
        arch=arch,
        function=case.function,
        flags=case.flags,
        dtype=dtype,
        C=C,
        BM=kwargs.get("BM", 1),
        BC=kwargs["BC"],
        warps=kwargs["num_warps"],
        registers=usage.registers,
        shared=compiled.metadata.shared,
        loads=usage.count("LDG"),
        wide_loads=_wide(usage, "LDG"),
        stores=usage.count("STG"),
        wide_stores=_wide(usage, "STG"),
        stack=usage.stack,
        spills=usage.spills,
    )


def _wide(usage: sass.Usage, opcode: str) -> int:
    # From compute capability 10.0 on there are 32-byte accesses as well.
    return usage.count(f"{opcode}.128") + usage.count(f"{opcode}.256")


def rows(items: list[tuple[int, int, str, int]], jobs: int = 2) -> list[Row]:
    """The rows of ``items`` (from `work`) in their order, compiled by ``jobs`` processes."""
    if jobs == 1:
        return [compile_one(item) for item in items]
    # spawn: the parent may hold threads (torch) that a fork would not survive.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        return list(pool.map(compile_one, items, chunksize=4))


def version() -> str:
    import triton

    return triton.__version__


def section(arch: int, table: list[Row]) -> str:
    """The part of the page about one architecture."""
    lines = [
        f"## sm_{arch}",
        "",
        "| function | flags | dtype | C | tile | warps | registers | shared | loads | stores | spills |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [row.line() for row in table if row.arch == arch]
    return "\n".join(lines) + "\n"


def header() -> str:
    return f"""# Triton kernels as compiled

Generated by `python -m fastres.codegen triton` with triton {version()}. Do not edit.

Each row is one launch of `triton_kernels/`, compiled offline for the architecture with the tile and the flags
the launcher chose, and read back from the machine code. No GPU was involved: this page says what was
generated, not how fast it is. `C` = {C_WIDE} takes the vectorised variant, `C` = {C_ODD} the element-wise one.

registers: of one thread (limit {sass.REGISTER_LIMIT}). shared: bytes of one block. loads, stores: instructions on
global memory, those of 16 bytes or more / all. spills: instructions on local memory; the stack is 0 bytes in every
row.
"""


def page(table: list[Row]) -> str:
    """The whole page from the rows of ``work()``."""
    return "\n".join([header(), *(section(arch, table) for arch in ARCHITECTURES)])


def generate(jobs: int = 2) -> str:
    """The text of ``PATH``. Raises ``RuntimeError`` listing every kernel that spills or passes a limit."""
    table = rows(work(), jobs)
    problems = [problem for row in table for problem in row.problems]
    if problems:
        raise RuntimeError("\n".join(problems))
    return page(table)
