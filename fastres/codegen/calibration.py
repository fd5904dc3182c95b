"""What was measured for the performance model: chips, kernel times of a ResNet-50 step, cuDNN's time per layer.

Source of every measured number: one NVIDIA H100 80GB, torch 2.11, CUDA 13.0, triton 3.6, 2026-11-24; ResNet-50, batch
256, 224 x 224, bfloat16, channels_last; kernel times of a whole training step by the profiler, layers alone by events.
"""

from __future__ import annotations

import dataclasses

SOURCE = "H100 80GB, torch 2.11, triton 3.6, 2026-11-24, ResNet-50, batch 256, bf16"


@dataclasses.dataclass(frozen=True)
class Chip:
    """``bandwidth`` of a copy in bytes/s, ``rate`` of a large bf16 product in FLOP/s; ``source`` of both."""

    name: str
    bandwidth: float
    rate: float
    source: str


CHIPS = {
    "h100": Chip("H100 80GB", 3.0e12, 800e12, "measured: copy of 1 GiB, product of 8192 x 8192"),
    "a100-80": Chip("A100 80GB", 1.75e12, 260e12, "from memory, not measured"),
    "l4": Chip("L4", 0.27e12, 90e12, "from memory, not measured"),
    "b200": Chip("B200", 7.2e12, 1700e12, "from memory, not measured"),
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """Kernels of one plan that share a kind of work: how many a step, their total in ms."""

    work: str
    plan: str
    what: str
    launches: int
    ms: float


#: Kernel totals of one step, as the profiler summed them.
STEP = (
    Measured("bn stats", "eager", "batch_norm_collect_statistics", 53, 8.995),
    Measured("bn", "eager", "batch_norm transform_input, backward_reduce, backward_elemt", 159, 5.367 + 5.701 + 7.021),
    Measured("map", "eager", "add, threshold backward, clamp", 130, 5.469 + 4.702 + 3.179),
    Measured("fused", "fastres", "bn_stats, bn_apply, bn_bwd_reduce, bn_bwd_apply, mask_add, add", 213, 19.977),
    Measured("pool", "eager", "max_pool forward, backward", 2, 0.860 + 1.836),
    Measured("fused pool", "fastres", "stem_fwd, stem_bwd_reduce, stem_bwd_apply", 3, 0.388 + 0.288 + 0.879),
    Measured("stem", "eager", "cuDNN fprop and wgrad of the first convolution", 2, 1.535 + 0.883),
)

#: Whole steps: (plan, wall ms, sum of kernels ms, launches).
STEPS = (
    ("eager", 65.47, 63.09, 1023),
    ("compile", 47.37, 44.71, 923),
    ("fastres", 63.66, 41.94, 1107),
)

# ---- constants of the model, each from the tables here

#: Share of the copy bandwidth that a kind of pass reaches: bytes of the model over `STEP`'s time, rounded.
BANDWIDTH = {"bn stats": 0.21, "bn": 0.73, "map": 1.0, "fused": 0.89, "pool": 0.23, "fused pool": 0.45}
#: Share of the tensor cores' rate that the first convolution reaches (three channels): from `STEP`.
STEM_RATE = 0.0625
#: The two constants of a convolution, from `LAYERS`. Loads and products overlap but for this share of the shorter one.
EXPOSED = 0.45
#: Channels (of the narrower side, per group) from which on the tensor cores run at full rate.
FULL_WIDTH = 100
#: Small launches a convolution beside the modelled ones (casts, memsets, cuDNN's workspaces, running statistics, BN
#: finalisation in ours), rounded from the launches of `STEPS`; microseconds each from what `STEP` leaves of the total.
HELPERS = {"eager": 10, "compile": 10, "fastres": 14, "A'": 14, "A": 14}
HELPER_US = 2.8
#: Microseconds between two launches: wall time less kernels of eager and compile in `STEPS`, over their launches.
GAP_US = 2.6

#: cuDNN alone: (C, K, size of the image, R, stride): microseconds of fprop, dgrad, wgrad.
LAYERS = {
    (64, 64, 56, 3, 1): (150.8, 147.6, 154.0),
    (128, 128, 28, 3, 1): (93.8, 95.1, 104.6),
    (256, 256, 14, 3, 1): (82.5, 78.6, 101.0),
    (512, 512, 7, 3, 1): (78.3, 77.1, 92.2),
    (128, 128, 56, 3, 2): (109.9, 175.4, 135.3),
    (256, 256, 28, 3, 2): (85.2, 112.6, 106.5),
    (512, 512, 14, 3, 2): (82.1, 98.7, 94.8),
    (64, 64, 56, 1, 1): (79.8, 76.6, 87.7),
    (64, 256, 56, 1, 1): (186.2, 182.3, 192.7),
    (256, 64, 56, 1, 1): (184.4, 184.9, 194.0),
    (256, 128, 56, 1, 1): (215.0, 221.8, 231.4),
    (128, 512, 28, 1, 1): (103.6, 99.6, 108.0),
    (512, 128, 28, 1, 1): (97.3, 190.3, 107.5),
    (512, 256, 28, 1, 1): (114.9, 119.5, 128.4),
    (256, 1024, 14, 1, 1): (60.1, 55.9, 74.8),
    (1024, 256, 14, 1, 1): (56.4, 56.6, 73.1),
    (1024, 512, 14, 1, 1): (79.5, 83.7, 78.1),
    (512, 2048, 7, 1, 1): (45.9, 42.9, 47.5),
    (2048, 512, 7, 1, 1): (41.8, 88.7, 49.9),
    (256, 512, 56, 1, 2): (123.3, 231.4, 130.7),
    (512, 1024, 28, 1, 2): (93.4, 150.7, 105.7),
    (1024, 2048, 14, 1, 2): (80.9, 129.5, 80.6),
}
