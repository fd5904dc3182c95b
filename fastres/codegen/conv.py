"""Compiles the convolution kernels for GPUs that are not there and tabulates what came out, next to the model's time.

Every row of ``conv_configs.shipped_rows()`` for every NVIDIA architecture that it can run on, and what takes pointers
for AMD's gfx942 as a check of portability. As in `fastres.codegen.triton` the launchers themselves are called, on
stand-ins for tensors. The page has one section for each Triton version it was made with.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import importlib
import multiprocessing
import re
import tempfile

from fastres.codegen import model, plans, sass
from fastres.codegen import triton as table
from fastres.problem import ConvProblem, arguments

PATH = table.PATH.with_name("conv.md")
ARCHITECTURES = (80, 89, 90, 100)
AMD = "gfx942"
LDS_LIMIT = 64 * 1024
#: The chip whose time the model gives for an architecture.
CHIP = {80: "a100-80", 89: "l4", 90: "h100", 100: "b200"}
#: Instructions of the tensor cores and asynchronous copies, by their opcodes.
MMA = ("HGMMA", "UTCHMMA", "HMMA")
COPIES = ("UTMALDG", "LDGSTS")
#: Of float32 products.
PRECISIONS = ("tf32", "ieee")


def _configs():
    # Not with this module: it imports Triton.
    return importlib.import_module("fastres.triton_kernels.conv_configs")


@dataclasses.dataclass(frozen=True)
class _Dtype:
    itemsize: int


@dataclasses.dataclass(frozen=True)
class Tensor(table.Operand):
    """Stands in for a tensor with a shape; what a launcher does to it beside launching is void."""

    shape: tuple[int, ...] = ()

    @property
    def dtype(self) -> _Dtype:
        return _Dtype(self.element_size())

    def data_ptr(self) -> int:
        return 0

    def numel(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total

    def float(self) -> Tensor:
        return dataclasses.replace(self, type="fp32")

    def new_empty(self, *shape, dtype: _Dtype | None = None) -> Tensor:
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        return Tensor("fp32" if dtype is not None and dtype.itemsize == 4 else self.type, shape)

    def _same(self, *args, **kwargs) -> Tensor:
        return self

    view = permute = sum = copy_ = __getitem__ = _same

    def new_zeros(self, shape: tuple[int, ...]) -> Tensor:
        return Tensor(self.type, shape)


def launch(kind: str, problem, hooks: tuple[str, ...], config, type: str = "bf16") -> list:
    """What the launcher of ``config`` would run for the problem: (kernel, args, kwargs) each. ``type``: a 16-bit one,
    or the precision of float32 products, "tf32" or "ieee"."""
    module = importlib.import_module(f"fastres.triton_kernels.{_configs().FILES[config.kernel]}")
    parts = module.parts(kind, problem, config) if set(hooks) & {"stats", "reduce"} else 0
    precision = type if type in PRECISIONS else "ieee"
    elements = "fp32" if type in PRECISIONS else type
    types = {"float32": "fp32", "uint8": "u8", elements: elements}
    given, named = arguments(kind, problem, hooks, parts, elements, lambda t, shape: Tensor(types[t], shape))
    with table.intercepted() as launches:
        getattr(module, f"conv_{kind}")(*given, config=config, precision=precision, **named)
    return launches


def source(kernel, args: tuple, kwargs: dict):
    """As `table.source`, for launches with tensor descriptors among the arguments."""
    from triton.compiler import ASTSource

    values = dict(zip(kernel.arg_names, args, strict=False))
    descriptors = {n: v for n, v in values.items() if hasattr(v, "block_shape")}
    plain = [None if hasattr(v, "block_shape") else v for v in args]
    ast, options = table.source(kernel, tuple(plain), kwargs)
    signature, constants = dict(ast.signature), {k: v for k, v in ast.constants.items()}
    for name, value in descriptors.items():
        block = ",".join(map(str, value.block_shape))
        signature[name] = f"tensordesc<{value.base.type}[{block}]>"
        constants.pop((kernel.arg_names.index(name),), None)
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=ast.attrs), options


def kernel_of(kind: str, problem, hooks: tuple[str, ...]) -> plans.Kernel:
    """The launch as the performance model sees it, bf16."""
    p, hooks = problem, set(hooks)
    x, y = plans.Buffer("x", 2 * p.elements[0]), plans.Buffer("y", 2 * p.elements[2])
    mask, bits = plans.Buffer("mask", p.elements[0] // 8), plans.Buffer("bits", p.elements[2] // 8)
    extra = {"residual": y, "pre": y, "bits": bits, "add": x, "mask": mask, "act": x}
    reads = tuple(extra[h] for h in sorted(hooks & set(extra)))
    found = plans.product(kind, p, "", "", "", reads, (x,) if "y" in hooks else ())
    # A row of a filter over few channels is one dense step (conv_narrow.py): its width is not that of a channel.
    return dataclasses.replace(found, width=p.K) if p.groups == 1 and p.C <= 8 else found


# ---- machine code

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P[T\d]\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.MULTILINE)
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")


def _code(text: str) -> list[tuple[int, str, str]]:
    """(address, opcode without modifiers, operands) of a kernel in ``cuobjdump -sass``, up to its end."""
    code = []
    for address, predicate, opcode, rest in _INSTRUCTION.findall(text):
        code.append((int(address, 16), opcode.split(".")[0], rest.strip()))
        if code[-1][1] == "EXIT" and not predicate:
            break  # what follows are the slow paths of waits, which branch back to where they came from
    return code


def main_loop(text: str) -> tuple[collections.Counter, bool]:
    """Opcodes of the innermost loops that use the tensor cores, from ``cuobjdump -sass``, and True.

    A loop is what lies between a branch and its target above it. Where the compiler has unrolled it: opcodes from the
    first tensor-core instruction to the last, and False.
    """
    code = _code(text)
    loops = []
    for address, opcode, rest in code:
        target = _TARGET.search(rest) if opcode == "BRA" else None
        if target and int(target[1], 16) < address:
            body = [name for at, name, _ in code if int(target[1], 16) <= at <= address]
            if any(name in MMA for name in body):
                loops.append((int(target[1], 16), address, body))
    inner = [i for i in loops if not any(j is not i and i[0] <= j[0] and j[1] <= i[1] for j in loops)]
    if inner:
        return collections.Counter(name for *_, body in inner for name in body), True
    places = [i for i, (_, name, _) in enumerate(code) if name in MMA]
    body = code[places[0] : places[-1] + 1] if places else []
    return collections.Counter(name for _, name, _ in body), False


def _sass(cubin: bytes, short: bool) -> tuple[sass.Usage, collections.Counter, bool]:
    """Resources, and what `main_loop` finds. ``short``: the loop's loads are all issued ahead of it, so copies are
    those of the whole kernel."""
    ((_, usage),) = sass.read(cubin, "triton").items()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        found, looped = main_loop(sass._run(sass.find_tool("triton"), "-sass", file.name))
    if short:
        found.update({name: usage.count(name) - found[name] for name in COPIES})
    return usage, found, looped


def steps(kind: str, problem, config) -> int:
    """Trips of the loop over filter taps and channels; a reduction over pixels (wgrad) always has many."""
    if kind == "wgrad" or config.kernel == "narrow":
        return problem.N * problem.P * problem.Q if kind == "wgrad" else problem.R
    channels = problem.C if kind == "fprop" else problem.K
    return problem.R * problem.S * -(-(channels // problem.groups) // config.BK)


_AMD_FIELDS = {
    "registers": r"\.vgpr_count:\s+(\d+)",
    "accumulators": r"\.agpr_count:\s+(\d+)",
    "spills": r"\.vgpr_spill_count:\s+(\d+)",
    "stack": r"\.private_segment_fixed_size:\s+(\d+)",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One compiled launch. ``arch``: "sm_90" or "gfx942"; ``type``: "bf16", or the precision of float32 products;
    ``mma`` and ``copies``: instructions in the main loop ("16 HGMMA"), see `main_loop`; ``steps``: trips of that loop;
    ``odd``: of an odd number of channels; ``us`` and ``bound`` by the model, "" where no chip stands for the
    architecture. The model's figures are those of 16 bits."""

    arch: str
    type: str
    kind: str
    hooks: str
    problem: str
    config: str
    kernel: str
    odd: bool
    steps: int
    registers: int
    shared: int
    mma: str
    copies: str
    stack: int
    spills: int
    megabytes: float
    gflop: float
    us: str
    bound: str

    def line(self) -> str:
        return (
            f"| {self.kind} | {self.hooks or '-'} | {self.problem} | {self.config} | {self.registers} | {self.shared} "
            f"| {self.mma or '-'} | {self.copies or '-'} | {self.spills} | {self.megabytes:.0f} | {self.gflop:.1f} "
            f"| {self.us} | {self.bound} |"
        )

    @property
    def problems(self) -> list[str]:
        name = f"{self.arch} {self.type} {self.kind} ({self.hooks}) {self.problem}, {self.config}"
        limit = LDS_LIMIT if self.arch == AMD else sass.SHARED_LIMIT[int(self.arch[3:])]
        found = []
        if self.spills or self.stack:
            found.append(f"{name}: {self.spills} spills, {self.stack} bytes of stack; expected none")
        if self.shared > limit:
            found.append(f"{name}: {self.shared} bytes of shared memory; the limit is {limit}")
        if self.arch != AMD and self.registers > sass.REGISTER_LIMIT:
            found.append(f"{name}: {self.registers} registers; the limit is {sass.REGISTER_LIMIT}")
        if not self.mma and self.type != "ieee":
            found.append(f"{name}: no tensor-core instruction")
        if self.arch == "sm_90" and self.kernel in _configs().DESCRIPTORS and "HGMMA" not in self.mma:
            found.append(f"{name}: {self.mma}; expected HGMMA")
        # Of an odd number of channels nothing is aligned to the 4 bytes of the smallest asynchronous copy; a single
        # step has nothing to overlap with.
        if self.arch != AMD and not self.odd and self.steps > 1 and not self.copies:
            found.append(f"{name}: no asynchronous copy in the main loop")
        return found


def shipped() -> list[tuple]:
    """(kind, problem, hooks, ConvConfig) of every configuration that may serve, each with a layer it is meant for."""
    configs = _configs()
    return [(kind, problem, tuple(hooks), config) for kind, problem, hooks, config in configs.shipped_rows(ConvProblem)]


def work(architectures=(*ARCHITECTURES, AMD)) -> list[tuple]:
    """What is compiled: (arch, kind, problem, hooks, config), in bfloat16."""
    configs = _configs()
    items = []
    for arch in architectures:
        for kind, problem, hooks, config in shipped():
            serves = config.kernel not in configs.DESCRIPTORS
            if arch != AMD:
                serves = config in configs.candidates(kind, problem, hooks, 2, divmod(arch, 10)) or (
                    serves and arch < 90
                )
            if serves:
                items.append((arch, kind, problem, hooks, config))
    return items


def compile_one(item: tuple) -> Row:
    """Compiles one item of `work`, in bfloat16 or the type that follows: of its call's launches the one with most taps
    (a strided dgrad has one for each parity class; a split reduction ends with the merge of its slabs)."""
    import triton
    from triton.backends.compiler import GPUTarget

    arch, kind, problem, hooks, config, type = (*item, "bf16")[:6]
    launches = [found for found in launch(kind, problem, hooks, config, type) if "num_stages" in found[2]]
    kernel, args, kwargs = max(launches, key=lambda found: found[2].get("TR", 1) * found[2].get("TS", 1))
    ast, options = source(kernel, args, kwargs)
    modelled = kernel_of(kind, problem, hooks)
    fixed = {
        "type": type,
        "kind": kind,
        "hooks": ", ".join(hooks),
        "problem": str(problem),
        "config": str(config).replace("|", " "),  # a bar would end the cell
        "kernel": config.kernel,
        "odd": bool(problem.C // problem.groups % 2),
        "steps": steps(kind, problem, config),
        "megabytes": modelled.bytes / 1e6,
        "gflop": modelled.flops / 1e9,
    }
    if arch == AMD:
        # AMD's pipeliner counts stages differently: two are its usual double buffering.
        options["num_stages"] = 2
        compiled = triton.compile(ast, target=GPUTarget("hip", AMD, 64), options=options)
        text = compiled.asm["amdgcn"]
        found = {name: int(m[1]) if (m := re.search(p, text)) else 0 for name, p in _AMD_FIELDS.items()}
        mfma = len(re.findall(r"\bv_mfma_\w+", text))
        return Row(
            arch=AMD, registers=found["registers"] + found["accumulators"], shared=compiled.metadata.shared,
            mma=f"{mfma} MFMA" if mfma else "", copies="", stack=found["stack"], spills=found["spills"], us="",
            bound="", **fixed,
        )  # fmt: skip
    compiled = triton.compile(ast, target=GPUTarget("cuda", arch, 32), options=options)
    usage, loop, looped = _sass(compiled.asm["cubin"], fixed["steps"] <= config.num_stages)
    time = model.time(modelled, model.CHIPS[CHIP[arch]])
    return Row(
        arch=f"sm_{arch}", registers=usage.registers, shared=compiled.metadata.shared,
        mma=", ".join(f"{loop[name]} {name}{'' if looped else ', unrolled'}" for name in MMA if loop[name]),
        copies=", ".join(f"{loop[name]} {name}" for name in COPIES if loop[name]),
        stack=usage.stack, spills=usage.spills, us=f"{time.seconds * 1e6:.0f}", bound=time.bound, **fixed,
    )  # fmt: skip


def rows(items: list[tuple], jobs: int = 2) -> list[Row]:
    """The rows of ``items`` (from `work`) in their order, compiled by ``jobs`` processes."""
    if jobs == 1:
        return [compile_one(item) for item in items]
    # spawn: the parent may hold threads (torch) that a fork would not survive.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        return list(pool.map(compile_one, items))


# ---- page


def section(version: str, found: list[Row]) -> str:
    """The part of the page that one Triton version made."""
    lines = [f"## triton {version}", ""]
    for arch in dict.fromkeys(row.arch for row in found):
        own = [row for row in found if row.arch == arch]
        chip = "" if arch == AMD else f"us, {model.CHIPS[CHIP[int(arch[3:])]].name}"
        lines += [
            f"### {arch}, triton {version}",
            "",
            "| kind | hooks | problem | config | registers | shared | tensor cores | copies | spills | MB | GFLOP "
            f"| {chip} | bound |",
            "|---|---|---|---|--:|--:|---|---|--:|--:|--:|--:|---|",
            *(row.line() for row in own),
            "",
        ]
    return "\n".join(lines)


def header() -> str:
    return f"""# Convolution kernels as compiled

Generated by `python -m fastres.codegen conv`, and by `python fastres/codegen/bare.py conv` in an environment that has
only triton; each run renews the section of its own Triton version. Do not edit.

Each row is a configuration of `triton_kernels/conv_configs.py` on a layer of ResNet-50 (batch 256, bfloat16) that it
may serve, compiled offline with what the launcher passes, and read back from the machine code. No GPU was involved.

config: kernel, pixels (or images x rows x columns), output channels, input channels a step; w warps, s stages. For a
wgrad: pixels a step, channels of dy, channels of x. registers: of one thread (limit {sass.REGISTER_LIMIT}). shared:
bytes of one block. spills: instructions on local memory; the stack is 0 bytes in every row.

tensor cores, copies: instructions in the main loop; unrolled: from its first tensor-core instruction to the last. Where
it has no more trips than stages all copies come before it: then those of the whole kernel. UTMALDG loads by tensor
descriptor, LDGSTS is an asynchronous copy. Images of three channels have none (nothing is aligned to the 4 bytes of the
smallest), and a kernel of one step, with nothing to overlap it with, may have none. Kernels fed by tensor descriptors
({", ".join(_configs().DESCRIPTORS)}) need sm_90 or later.

MB, GFLOP, us, bound: memory traffic and work of the launch with its hooks, and the time that the
[performance model](model.md) gives it on the chip in the heading. That is a prediction, not a measurement.

{AMD} is a check that the kernels with plain pointers are portable (MFMA instructions, registers with accumulators, LDS
within 64 KB); fastres does not run on it. It is compiled with two stages, AMD's usual double buffering.
"""


def sections(text: str) -> dict[str, str]:
    """The page's sections by Triton version."""
    parts = re.split(r"^## triton (\S+)$", text, flags=re.MULTILINE)
    return {version: f"## triton {version}{body}" for version, body in zip(parts[1::2], parts[2::2], strict=True)}


def page(found: list[Row], before: str) -> str:
    """The whole page: ``found`` under the running Triton, the other versions' sections as they stood in ``before``."""
    return assembled(header(), section(table.version(), found), before)


def assembled(head: str, mine: str, before: str) -> str:
    """A page of ``head``, the running Triton's section and those of other versions in ``before``, in order."""
    parts = {**sections(before), table.version(): mine}
    ordered = sorted(parts, key=lambda v: [int(n) for n in re.findall(r"\d+", v)])
    return "\n".join([head, *(parts[v].rstrip() + "\n" for v in ordered)])


def generate(jobs: int = 2) -> str:
    """The text of ``PATH``. Raises ``RuntimeError`` listing every kernel that spills, passes a limit or lacks
    tensor-core instructions or asynchronous copies."""
    found = rows(work(), jobs)
    problems = [problem for row in found for problem in row.problems]
    if problems:
        raise RuntimeError("\n".join(problems))
    return page(found, PATH.read_text() if PATH.is_file() else "")
