"""Batch normalisation in one cooperative launch: when it can serve, and its checked launch functions.

The kernels of ``csrc/cuda/batch_norm_act_one_pass.cu`` keep the tensor in shared memory between the statistics and
the map: forward reads x and writes out where the separate launches read x twice; backward reads the gradient and x
once instead of twice. All blocks must be on the GPU at once, so only tensors that fit are served.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fastres.backends import native
from fastres.backends.native import _flag, _need

# csrc/cuda: kThreads, kVec, lanes of a block at most (rows.cuh); kResidentBlocks; static shared memory of a block,
# float [2 * kTile] and double [kWarps * kFinalChannels]; what the system takes of each block's.
_THREADS, _VEC, _LANES, _BLOCKS = 256, 8, 32, 2
_STATIC, _RESERVED = 2 * 8 * 260 * 4 + 8 * 8 * 8, 1024
#: Rows of a thread, at least, before a tensor is cut into more tiles.
_ROWS_PER_THREAD = 4


@dataclass(frozen=True)
class Chip:
    """What bounds a cooperative grid. Shared memory in bytes; ``shared_per_block`` with the opt-in."""

    name: str
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int

    @property
    def store(self) -> int:
        """Bytes that one of the resident blocks can keep."""
        whole = self.shared_per_multiprocessor // _BLOCKS - _RESERVED
        return max(0, min(whole, self.shared_per_block) - _STATIC)


@functools.cache
def chip_of(index: int) -> Chip:
    """The GPU ``index``."""
    p = torch.cuda.get_device_properties(index)
    return Chip(p.name, p.multi_processor_count, p.shared_memory_per_block_optin, p.shared_memory_per_multiprocessor)


@functools.lru_cache(maxsize=4096)
def tiles(M: int, C: int, itemsize: int, tensors: int, chip: Chip) -> int:
    """Row tiles T of one launch over ``[M, C]`` that keeps so many tensors on ``chip``, 0 where they do not fit."""
    if M < 1 or C < 1:
        return 0
    groups = -(-C // _VEC)
    channel_blocks = -(-groups // _LANES)
    depth = _THREADS // -(-groups // channel_blocks)
    kept = chip.store // (tensors * _THREADS * _VEC * itemsize)  # rows of a thread
    if kept < 1:
        return 0
    T = min(chip.multiprocessors * _BLOCKS // channel_blocks, -(-M // (depth * min(kept, _ROWS_PER_THREAD))))
    if T < 1:
        return 0
    tile = -(-M // T)
    return T if -(-tile // depth) <= kept else 0


class Launcher:
    """Mixed into the backends whose module has the kernels: `why_not_one_pass` and the launch functions."""

    def chip(self, device: torch.device) -> Chip:
        raise NotImplementedError

    def one_pass_tiles(self, x: torch.Tensor, M: int, C: int, tensors: int) -> int:
        """T for one launch that keeps ``tensors`` of the size of ``x``, 0 where there can be none."""
        return tiles(M, C, x.element_size(), tensors, self.chip(x.device))

    def why_not_one_pass(self, device: torch.device, dtype: torch.dtype, M: int, C: int, tensors: int) -> list[str]:
        """Reasons why one launch cannot serve ``[M, C]``, keeping 1 tensor (forward) or 2 (backward)."""
        if self.missing:
            return [self.missing]
        chip, reasons = self.chip(device), []
        if not tiles(M, C, dtype.itemsize, tensors, chip):
            keeps = chip.multiprocessors * _BLOCKS * chip.store
            reasons.append(
                f"{tensors} x {M} x {C} elements do not fit on chip: {chip.name} keeps at most {keeps / 2**20:.1f} MiB"
            )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            reasons.append("torch.distributed is initialised: a grid that needs the whole GPU waits for its kernels")
        return reasons

    def bn_one_pass_fwd(self, x, M, C, weight, bias, eps, residual, rstat, relu, T, part, stat, out, mask):
        fn = "bn_one_pass_fwd"
        a: native.Arguments = self._args(fn, "x", x)
        _need(fn, T >= 1, f"T must be at least 1, got {T}")
        _need(fn, rstat is None or residual is not None, "rstat was given without residual")
        xp = a.act("x", x, M, C)
        wp = a.array("weight", weight, C, optional=True)
        bp = a.array("bias", bias, C, optional=True)
        rp = a.act("residual", residual, M, C, optional=True)
        rs = a.array("rstat", rstat, 5, C, optional=True)
        pp = a.array("part", part, 3, T, C, out=())
        sp = a.array("stat", stat, 5, C, out=())
        op = a.act("out", out, M, C, out=("x",))
        mp = a.mask("mask", mask, M, C, out=(), optional=True)
        flag = _flag(fn, "relu", relu)
        self.invoke(fn, a.device, a.code, xp, M, C, wp, bp, float(eps), rp, rs, flag, T, pp, sp, op, mp)

    def bn_one_pass_bwd(self, grad, x, M, C, stat, mask, relu, batch_stats, T, part, dweight, dbias, coef, dx, dres, y):
        fn = "bn_one_pass_bwd"
        a: native.Arguments = self._args(fn, "grad", grad)
        _need(fn, T >= 1, f"T must be at least 1, got {T}")
        _need(fn, not relu or mask is not None or dres is None, "with relu and dres, mask is required")
        _need(fn, y is None or dres is None, "y can be recomputed without a residual only")
        gp = a.act("grad", grad, M, C)
        xp = a.act("x", x, M, C)
        sp = a.array("stat", stat, 5, C)
        mp = a.mask("mask", mask, M, C, optional=True)
        pp = a.array("part", part, 2, T, C, out=())
        wp = a.array("dweight", dweight, C, out=(), optional=True)
        bp = a.array("dbias", dbias, C, out=(), optional=True)
        cp = a.array("coef", coef, 3, C, out=())
        dp = a.act("dx", dx, M, C, out=("grad",))
        dr = a.act("dres", dres, M, C, out=(), optional=True)
        yp = a.act("y", y, M, C, out=(), optional=True)
        flags = _flag(fn, "relu", relu), _flag(fn, "batch_stats", batch_stats)
        self.invoke(fn, a.device, a.code, gp, xp, M, C, sp, mp, *flags, T, pp, wp, bp, cp, dp, dr, yp)
