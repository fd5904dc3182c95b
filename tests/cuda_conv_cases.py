"""The cases of the CUDA C++ convolution, shared by its tests: the kernel's, and those of who is served."""

from __future__ import annotations

import types

import conv_cases
import pytest
import torch

from fastres.backends import cuda_conv
from fastres.problem import ConvProblem

BF16, F16 = torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
KERNELS = types.SimpleNamespace(parts=cuda_conv.conv_parts, conv_fprop=cuda_conv.conv_fprop)

#: What every backend is tried on, as far as the channels go in eights, and what trips this kernel.
PROBLEMS = {name: p for name, p in conv_cases.PROBLEMS.items() if not (p.C % (8 * p.groups) or p.K % (8 * p.groups))}
PROBLEMS |= {
    # More steps than stages, tiles of pixels and channels in a row, each ragged; channels that end within a step.
    "several tiles": ConvProblem(1, 13, 11, 40, 136, 3, 3, padding=(1, 1)),
    "long": ConvProblem(3, 13, 15, 16, 72, 1, 1),
    "deep 1x1": ConvProblem(1, 9, 15, 264, 64, 1, 1),
    "groups 2 ragged": ConvProblem(1, 9, 8, 48, 80, 3, 3, padding=(1, 1), groups=2),
    "groups 3, all mixed": ConvProblem(2, 8, 9, 24, 72, 3, 2, (2, 1), (1, 2), (1, 2), groups=3),
    "7x7 stride 2": ConvProblem(1, 13, 12, 8, 16, 7, 7, (2, 2), (3, 3)),
    "1x7": ConvProblem(1, 5, 9, 16, 24, 1, 7, padding=(0, 3)),
    "mostly padding": ConvProblem(2, 3, 2, 16, 16, 3, 3, padding=(4, 3)),
    "one pixel each": ConvProblem(150, 1, 1, 16, 24, 3, 3, padding=(1, 1)),
}
#: Fewer steps than stages, many steps, groups, strides.
HOOKED = ("1x1 stride 2", "several tiles", "groups 2 ragged")
FPROP_HOOKS = [hooks for hooks in conv_cases.HOOKS["fprop"] if "prologue" not in hooks]
FPROP_HOOKS += [("residual",), ("relu", "residual"), ("bias", "relu")]
EVERYTHING = ("bias", "relu", "residual")


def make(name: str, hooks=(), dtype=BF16, values="normal", seed=0):
    return conv_cases.case("fprop", name, hooks, dtype, values, seed, PROBLEMS)


def run(c, config):
    return conv_cases.run(c, config, module=KERNELS)
