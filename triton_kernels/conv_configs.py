"""Tile shapes of the convolution kernels: frozen rows, and which of them fit a problem.

``problem`` is anything with the attributes N, H, W, C, K, R, S, P, Q, stride, padding, dilation, groups (height
before width). Nothing is autotuned in here: `candidates` lists what may serve, best first by rule; ``fastres.tuning``
decides by measurement.
"""

from __future__ import annotations

import dataclasses

from .conv_left_out import LEFT_OUT

#: ConvConfig.kernel -> file of its launchers.
FILES = {
    "patch": "conv_patch",
    "rows": "conv_patch",
    "narrow": "conv_narrow",
    "image": "conv_image",
    "gather": "conv_gather",
    "wgrad_patch": "conv_wgrad",
    "wgrad_gather": "conv_wgrad",
}
#: Fed by tensor descriptors: addresses that are multiples of 16, compute capability 9.0 and later.
DESCRIPTORS = ("patch", "rows", "image", "wgrad_patch")


@dataclasses.dataclass(frozen=True)
class ConvConfig:
    """One launch configuration.

    kernel      "patch" (tensor descriptors; compute capability 9.0 and later), "gather" (pointers, everywhere),
                "wgrad_patch", "wgrad_gather".
    BM          output pixels of a tile (for a wgrad: pixels of a step); BN: output channels; BK: input channels a step.
                For a wgrad BN counts channels of dy (K) and BK channels of x (C).
    patch       images, rows, columns of a patch tile, powers of two with product BM; () where pixels are flattened.
    """

    kernel: str
    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    patch: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("BM", "BN", "BK", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name}: got {value}, expected a power of two")
        if self.patch:
            images, rows, columns = self.patch
            if images * rows * columns != self.BM:
                raise ValueError(f"patch: got {self.patch}, expected three factors of BM = {self.BM}")

    def __str__(self) -> str:
        patch = "x".join(map(str, self.patch)) if self.patch else str(self.BM)
        return f"{self.kernel} {patch}|{self.BN}|{self.BK} w{self.num_warps} s{self.num_stages}"


def _patch_shapes(P: int, Q: int, N: int, BM: int) -> list[tuple[int, int, int]]:
    """Patches of BM pixels that waste least on P x Q images, flattest images first among equals."""
    shapes = []
    for rows in (1, 2, 4, 8, 16):
        for columns in (1, 2, 4, 8, 16, 32):
            images = BM // (rows * columns)
            if images < 1 or rows * columns * images != BM or images > 256:
                continue
            covered = -(-P // rows) * rows * -(-Q // columns) * columns * -(-N // images) * images
            # A large patch reads a smaller rim a second time.
            shapes.append((covered, -rows * columns, abs(rows - columns), (images, rows, columns)))
    return [shape for *_, shape in sorted(shapes)[:1]]


def pointwise(problem) -> bool:
    """A 1x1 convolution of stride 1 without padding: a product of matrices."""
    usual = (1, 1)
    return (problem.R, problem.S) == usual == tuple(problem.stride) and tuple(problem.padding) == (0, 0)


def _sizes(kind: str, problem) -> tuple[int, int, int, int]:
    """Channels in and out of the product, rows and columns of its output."""
    if kind == "dgrad":
        return problem.K, problem.C, problem.H, problem.W
    return problem.C, problem.K, problem.P, problem.Q


#: (BM, BN, warps, stages) of the descriptor kernels, in the order of their wins over ResNet-50's shapes on an H100
#: (bf16, batch 256, triton 3.6; benchmarks/results).
_PATCH_ROWS = (
    (128, 128, 4, 3),
    (128, 64, 4, 4),
    (128, 256, 8, 4),
    (64, 128, 4, 4),
    (128, 128, 8, 3),
)
_ROWS_ROWS = (
    (128, 128, 4, 3),
    (128, 128, 8, 3),
    (128, 64, 4, 4),
)


def descriptor_reasons(kind: str, problem, hooks, itemsize: int, capability) -> list[str]:
    """Why the descriptor kernels cannot serve; empty if they can."""
    reasons = []
    if capability < (9, 0):
        reasons.append("tensor descriptors need compute capability 9.0 or later")
    if kind == "wgrad":
        reasons.append("wgrad has kernels of its own")
    if problem.groups != 1:
        reasons.append("groups are not served")
    if tuple(problem.stride) != (1, 1):
        reasons.append("strides are not served")
    cin, cout, _, _ = _sizes(kind, problem)
    if itemsize != 2:
        reasons.append("16-bit activations only")
    if cin % 64 or cout % 64:
        reasons.append(f"channels must be multiples of 64, got {cin} and {cout}")
    if "prologue" in hooks or "pre" in hooks:
        reasons.append("operands go from memory to the tensor cores as they are: no prologue")
    return reasons


def patch_candidates(kind: str, problem, hooks, itemsize: int, capability) -> list[ConvConfig]:
    """Configurations of conv_patch.py, best first."""
    if descriptor_reasons(kind, problem, hooks, itemsize, capability):
        return []
    cin, cout, P, Q = _sizes(kind, problem)
    flat = pointwise(problem)
    # Buffers for steps that do not exist would only cost occupancy.
    steps = problem.R * problem.S * (cin // 64)
    found = []
    if flat and set(hooks) & {"add", "mask", "residual", "act"} and problem.N * P * Q >= 64:
        for BM, BN, warps, stages in _ROWS_ROWS:
            if capability >= (10, 0) and "mask" in hooks and BM * BN == 4096 * warps:
                continue  # spills there
            if cout % BN == 0 and ("act" not in hooks or BM * BN <= 2048 * warps):
                found.append(ConvConfig("rows", BM, BN, 64, warps, min(stages, steps)))
    if "mask" in hooks:
        return found
    for BM, BN, warps, stages in _PATCH_ROWS:
        held = BM * BN // (32 * warps)  # accumulators of a thread; more than these spill beside what the hooks need
        if BN > cout or held > (64 if "act" in hooks else 128):
            continue
        shapes = [(BM, 1, 1)] if flat else _patch_shapes(P, Q, problem.N, BM)
        found += [ConvConfig("patch", BM, BN, 64, warps, min(stages, steps), shape) for shape in shapes]
    return list(dict.fromkeys(found))


#: Compute capabilities that were compiled for; those between are taken for the one below.
COMPILED = ((8, 0), (8, 9), (9, 0), (10, 0))


def _compiles(kind: str, hooks, itemsize: int, capability, config: ConvConfig) -> bool:
    """Whether nothing is known against a configuration on the compiler's side."""
    chip = max((c for c in COMPILED if c <= tuple(capability)), default=COMPILED[0])
    name = f"{config.kernel} {config.BM} {config.BN} {config.BK} w{config.num_warps} s{config.num_stages}"
    return (chip, kind, tuple(hooks), name) not in LEFT_OUT.get(itemsize, {})


def candidates(kind: str, problem, hooks, itemsize: int, capability) -> tuple[ConvConfig, ...]:
    """Every configuration that can serve, the likeliest winner first."""
    found = _candidates(kind, problem, hooks, itemsize, capability)
    return tuple(c for c in found if _compiles(kind, hooks, itemsize, capability, c))


def _candidates(kind: str, problem, hooks, itemsize: int, capability) -> tuple[ConvConfig, ...]:
    narrow = image_candidates(kind, problem, hooks, itemsize, capability)
    narrow += narrow_candidates(kind, problem, hooks)
    if kind == "wgrad":
        return (*narrow, *wgrad_candidates(kind, problem, hooks, itemsize, capability))
    found = patch_candidates(kind, problem, hooks, itemsize, capability)
    others = gather_candidates(kind, problem, hooks, itemsize)
    # Where descriptors serve, pointers have hardly ever won: the likeliest one stays in the race.
    return (*narrow, *found, *(others[:1] if narrow or found else others))


def narrow_candidates(kind: str, problem, hooks) -> list[ConvConfig]:
    """Configurations of conv_narrow.py: images with few channels."""
    values = problem.C * problem.S
    if problem.groups != 1 or problem.dilation[1] != 1 or problem.C > 8 or values > 64 or problem.R > 8:
        return []
    if problem.elements[0] >= 2**31:
        return []
    if kind == "fprop" and not set(hooks) & {"prologue", "residual"}:
        rows = ((128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 8, 3), (256, 64, 8, 3))
        return [ConvConfig("narrow", BM, BN, 16, warps, stages) for BM, BN, warps, stages in rows]
    if kind == "wgrad" and not hooks:
        rows = ((64, 64, 128, 8, 2), (64, 64, 64, 4, 2), (32, 64, 128, 4, 3), (64, 64, 64, 8, 2), (128, 64, 64, 8, 2))
        return [ConvConfig("narrow", BM, BN, BK, warps, stages) for BM, BN, BK, warps, stages in rows]
    return []


def image_candidates(kind: str, problem, hooks, itemsize: int, capability) -> list[ConvConfig]:
    """Configurations of conv_image.py: images of at most four channels, an even stride along the rows."""
    served = ("stats" in hooks and not set(hooks) & {"prologue", "residual", "relu"}) if kind == "fprop" else not hooks
    fits = problem.C <= 4 and problem.S <= 8 and problem.R <= 8 and problem.stride[1] % 2 == 0
    usual = problem.groups == 1 and tuple(problem.dilation) == (1, 1) and itemsize == 2 and capability >= (9, 0)
    if kind == "dgrad" or not (served and fits and usual) or problem.K % 64:
        return []
    if kind == "fprop":
        rows = ((128, 4, 3), (128, 4, 4), (256, 8, 3), (64, 4, 4))
    else:
        rows = ((128, 4, 2), (64, 4, 3), (64, 4, 2))
    shapes = {64: (1, 4, 16), 128: (1, 8, 16), 256: (1, 16, 16)}
    return [ConvConfig("image", BM, 64, 32, warps, stages, shapes[BM]) for BM, warps, stages in rows]


#: (BM, BN, BK, warps, stages) of the pointer kernel: 16-bit, float32 (FMA or TF32), and channels that are no multiple
#: of 8, whose element-wise loads take an address each.
_GATHER_ROWS = (
    (128, 128, 64, 8, 3),
    (128, 64, 64, 8, 3),
    (64, 128, 64, 8, 3),
    (128, 64, 64, 4, 4),
    (64, 64, 64, 4, 4),
    (256, 128, 64, 8, 3),
    (128, 256, 64, 8, 3),
    (128, 32, 32, 4, 4),
)
_GATHER_ROWS_32 = ((64, 32, 32, 4, 3), (64, 32, 16, 4, 2))
_GATHER_ROWS_ODD = ((64, 64, 32, 8, 3), (64, 32, 32, 4, 3), (64, 64, 16, 4, 2))


def gather_candidates(kind: str, problem, hooks, itemsize: int) -> list[ConvConfig]:
    """Configurations of conv_gather.py: any problem, by pointers."""
    cin, cout, _, _ = _sizes(kind, problem)
    cin, cout = cin // problem.groups, cout // problem.groups
    odd = cin % 8 or cout % 8
    rows = _GATHER_ROWS_ODD if odd else _GATHER_ROWS_32 if itemsize == 4 else _GATHER_ROWS
    # What a thread holds beside its accumulators: what the epilogue normalises with, addresses of its rows in a second
    # tensor. More than this spills.
    heavy = set(hooks) & {"pre", "prologue", "add", "residual", "act"}
    most = 32 if "act" in hooks else 64 if heavy else 128
    found = []
    for BM, BN, BK, warps, stages in rows[-1:] if itemsize == 4 and "pre" in hooks else rows:
        config = ConvConfig("gather", BM, min(BN, _least(cout)), min(BK, _least(cin)), warps, stages)
        fits = BM * config.BN <= 32 * warps * most and (not heavy or BM <= 16 * warps)
        if fits and config not in found:
            found.append(config)
    return found


def wgrad_candidates(kind: str, problem, hooks, itemsize: int, capability) -> list[ConvConfig]:
    """Configurations of conv_wgrad.py: descriptors where they serve, pointers anywhere."""
    K, C = problem.K // problem.groups, problem.C // problem.groups
    found = []
    usual = tuple(problem.stride) == (1, 1) and problem.groups == 1 and itemsize == 2
    if usual and capability >= (9, 0) and K % 64 == 0 and C % 64 == 0:
        flat = pointwise(problem)
        for BM, BN, BK, warps, stages in ((64, 128, 128, 8, 3), (64, 64, 64, 4, 3), (128, 64, 64, 4, 4)):
            if hooks and BN * BK > 4096:
                continue  # operands that change on their way are held in registers
            if BN <= K and BK <= C:
                shapes = [()] if flat else _patch_shapes(problem.P, problem.Q, problem.N, BM)
                found += [ConvConfig("wgrad_patch", BM, BN, BK, warps, stages, shape) for shape in shapes]
    for BM, BN, BK, warps, stages in ((64, 128, 128, 8, 3), (64, 64, 64, 4, 3), (32, 32, 32, 4, 3)):
        config = ConvConfig("wgrad_gather", BM, min(BN, _least(K)), min(BK, _least(C)), warps, stages)
        # Fewer than 64 channels of dy leave no room for Hopper's larger instruction.
        small = capability >= (9, 0) and itemsize == 2 and found and config.BN < 64
        if config not in found and not small and not ((itemsize == 4 or hooks) and BN * BK > 4096):
            found.append(config)
            if found[0].kernel == "wgrad_patch":
                break
    return found


def _least(channels: int) -> int:
    """The smallest legal block that holds so many channels."""
    return max(16, 1 << (channels - 1).bit_length())


#: Defaults for compute capability 9.0 in 16 bit: (kind, hooks, filter rows, channels in, channels out of the product)
#: -> kernel, BM, BN, warps. Each won on an H100 SXM 80 GB (bf16, batch 256, ResNet-50's layers, cold L2; triton 3.6,
#: torch 2.11) over PyTorch's call with the separate passes; the comment has the medians in us, ours / PyTorch's.
SHIPPED = {
    ("fprop", ("stats",), 7, 3, 64): ("image", 256, 64, 8),  # 566 / 1951
    ("fprop", ("stats",), 1, 64, 64): ("patch", 128, 64, 4),  # 90 / 129
    ("fprop", ("stats",), 1, 64, 256): ("patch", 128, 128, 4),  # 263 / 348
    ("fprop", ("stats",), 1, 256, 64): ("patch", 128, 64, 4),  # 190 / 230
    ("fprop", ("stats",), 1, 256, 128): ("patch", 128, 128, 4),  # 228 / 301
    ("fprop", ("stats",), 1, 128, 512): ("patch", 128, 128, 4),  # 151 / 193
    ("fprop", ("stats",), 1, 512, 128): ("patch", 128, 128, 8),  # 107 / 127
    ("fprop", ("stats",), 1, 512, 256): ("patch", 128, 128, 4),  # 154 / 166
    ("fprop", ("stats",), 1, 256, 1024): ("patch", 128, 128, 8),  # 105 / 109
    ("fprop", ("stats",), 1, 512, 2048): ("patch", 128, 128, 8),  # 58 / 75
    ("fprop", ("stats",), 3, 128, 128): ("patch", 128, 128, 8),  # 122 / 127
    ("dgrad", ("add", "mask"), 1, 64, 256): ("rows", 128, 128, 4),  # 358 / 641
    ("dgrad", ("add", "mask"), 1, 128, 512): ("rows", 128, 128, 4),  # 190 / 328
    ("dgrad", ("add", "mask"), 1, 256, 1024): ("rows", 128, 128, 4),  # 112 / 173
    ("dgrad", ("add", "mask"), 1, 512, 2048): ("rows", 128, 128, 8),  # 74 / 101
    ("dgrad", ("add",), 1, 64, 64): ("patch", 128, 64, 4),  # 109 / 181
    ("dgrad", ("add",), 1, 128, 256): ("patch", 128, 128, 4),  # 350 / 624
    ("dgrad", ("add",), 1, 256, 512): ("patch", 128, 128, 4),  # 202 / 323
    ("dgrad", ("add",), 1, 512, 1024): ("patch", 128, 128, 4),  # 132 / 189
    ("dgrad", ("act", "reduce", "y"), 1, 256, 64): ("patch", 128, 64, 4),  # 265 / 296
    ("dgrad", ("act", "reduce", "y"), 1, 512, 128): ("patch", 128, 64, 4),  # 151 / 158
    ("dgrad", ("act", "reduce", "y"), 3, 64, 64): ("patch", 128, 64, 4),  # 244 / 263
    ("wgrad", (), 7, 3, 64): ("image", 64, 64, 4),  # 485 / 1168
}


def shipped(kind: str, problem, hooks, itemsize: int, capability) -> ConvConfig | None:
    """The default before any tuning: a row of `SHIPPED`; None, PyTorch's own call, for what has none."""
    if itemsize != 2 or capability[0] != 9:
        return None
    cin, cout, _, _ = _sizes(kind, problem)
    wanted = SHIPPED.get((kind, tuple(hooks), problem.R, cin, cout))
    found = candidates(kind, problem, hooks, itemsize, capability) if wanted and problem.R == problem.S else ()
    return next((c for c in found if (c.kernel, c.BM, c.BN, c.num_warps) == wanted), None)


#: ResNet-50's convolutions at 224 pixels: H = W, C, K, R, stride, padding.
RESNET50 = (
    (224, 3, 64, 7, 2, 3),
    *((56, C, K, 1, 1, 0) for C, K in ((64, 64), (64, 256), (256, 64), (256, 128))),
    *((28, C, K, 1, 1, 0) for C, K in ((128, 512), (512, 128), (512, 256))),
    *((14, C, K, 1, 1, 0) for C, K in ((256, 1024), (1024, 256), (1024, 512))),
    *((7, C, K, 1, 1, 0) for C, K in ((512, 2048), (2048, 512))),
    *((H, C, C, 3, 1, 1) for H, C in ((56, 64), (28, 128), (14, 256), (7, 512))),
    *((H, C, C, 3, 2, 1) for H, C in ((56, 128), (28, 256), (14, 512))),
    *((H, C, K, 1, 2, 0) for H, C, K in ((56, 256, 512), (28, 512, 1024), (14, 1024, 2048))),
)
#: Every set of hooks that an op asks for, by kind; of images (fewer than 16 channels) apart.
ASKED = {
    "fprop": (
        (), ("stats",), ("bias",), ("bias", "relu"), ("bias", "relu", "residual"), ("prologue",), ("prologue", "stats"),
    ),
    "dgrad": (
        (), ("act", "reduce"), ("act", "reduce", "y"), ("add",), ("add", "mask"), ("pre",), ("act", "pre", "reduce"),
        ("act", "bits", "pre", "reduce"), ("add", "mask", "pre"), ("add", "pre"),
    ),
    "wgrad": ((), ("prologue",), ("pre",), ("bits", "pre"), ("pre", "prologue"), ("bits", "pre", "prologue")),
}  # fmt: skip
ASKED_OF_IMAGES = {"fprop": ((), ("stats",), ("bias", "relu")), "dgrad": (), "wgrad": ((),)}
#: What rides along in training by default, by kind.
TRAINING_HOOKS = {
    "fprop": (("stats",),),
    "dgrad": ((), ("act", "reduce", "y"), ("add",), ("add", "mask")),
    "wgrad": ((),),
}


def shipped_rows(make_problem) -> list[tuple]:
    """(kind, problem, hooks, config) on the layers of ResNet-50 at batch 256 in 16 bit: every row of `SHIPPED`, and of
    each portable kernel what serves where there is none, once for each kind, hooks and stride.
    ``make_problem(N, H, W, C, K, R, S, stride, padding)``."""
    rows, seen = [], set()
    for H, C, K, R, stride, padding in RESNET50:
        problem = make_problem(256, H, H, C, K, R, R, (stride, stride), (padding, padding))
        for kind, sets in TRAINING_HOOKS.items():
            for hooks in sets:
                if kind == "dgrad" and (C < 16 or ("add" in hooks and (R, stride) != (1, 1))):
                    continue  # nobody wants the image's gradient; a block's input meets its first convolution only
                default = shipped(kind, problem, hooks, 2, (9, 0))
                if default is not None:
                    rows.append((kind, problem, hooks, default))
                portable = (c for c in candidates(kind, problem, hooks, 2, (8, 0)) if c.kernel != "image")
                config = next(portable, None)
                if config is not None and (kind, hooks, stride, config.kernel) not in seen:
                    seen.add((kind, hooks, stride, config.kernel))
                    rows.append((kind, problem, hooks, config))
    return rows
