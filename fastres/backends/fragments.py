"""Weights in the order in which the tensor-core kernels multiply them (``csrc/cuda/fragments.cuh``).

A product on tensor cores takes B in fragments of 16 x 16: 32 lanes x (4 registers of 2 elements). Which channel is
which row or column of a fragment is ours to say, as long as both operands agree; it is chosen so that a lane's channels
lie side by side in memory. Written for any device and 16-bit dtype; run once for a set of weights.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _rows(k: int, loaded: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of k channels as (16-row step, ...) and where (step, half, pair, element) of a fragment lie in it.

    ``loaded``: lane t of four holds channels 4t..4t+3 of each 16 (operands straight from global memory), else
    2t, 2t+1, 2t+8, 2t+9 (from shared memory or from a product's registers).
    """
    if loaded:
        return (k // 16, 4, 2, 2), (0, 2, 1, 3)  # step, pair, half, element
    return (k // 16, 2, 4, 2), (0, 1, 2, 3)  # step, half, pair, element


def _columns(n: int, stored: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of n channels and where (block of 32, fragment of the block, tile of the fragment, column) lie in it.

    ``stored``: lane t of four gets channels 8t..8t+7 of each 32 (what goes to memory), else columns are channels.
    The column is two numbers, its pair (of lanes) and the element in it.
    """
    if stored:
        return (n // 32, 4, 2, 2, 2), (0, 2, 3, 1, 4)  # block, pair, fragment, tile, element
    return (n // 32, 2, 2, 4, 2), (0, 1, 2, 3, 4)  # block, fragment, tile, pair, element


def fragments(matrix: Tensor, *, loaded: bool, stored: bool) -> Tensor:
    """B ``[k, n]`` as ``[k/16, n/16, 256]``: the fragments of each step along k. k a multiple of 16, n of 32."""
    k, n = matrix.shape
    if k % 16 or n % 32:
        raise ValueError(f"matrix: got {k} x {n}, expected multiples of 16 and 32")
    k_shape, (step, half, pair, element) = _rows(k, loaded)
    n_shape, n_at = _columns(n, stored)
    block, fragment, tile, column, parity = (4 + at for at in n_at)
    # lane 4*column + pair (the column of a tile is 2*column + parity), register 2*tile + half, element
    order = (step, block, fragment, column, parity, pair, tile, half, element)
    return matrix.reshape(*k_shape, *n_shape).permute(order).reshape(k // 16, n // 16, 256)


def bottleneck(w1: Tensor, w2: Tensor, w3: Tensor, projection: Tensor | None = None) -> Tensor:
    """The stream of weights of ``bottleneck_eval``, flat.

    w1 ``[mid, C, 1, 1]``, w2 ``[mid, mid, 3, 3]``, w3 ``[K, mid, 1, 1]``, projection ``[K, C, 1, 1]``; one dtype.
    """
    mid, K = w1.shape[0], w3.shape[0]
    first = fragments(w1[:, :, 0, 0].t(), loaded=True, stored=True)
    taps = [fragments(w2[:, :, r, s].t(), loaded=False, stored=False) for r in range(3) for s in range(3)]
    last = fragments(w3[:, :, 0, 0].t(), loaded=False, stored=True).reshape(mid // 16, K // 32, 2, 256)
    if projection is not None:
        beside = fragments(projection[:, :, 0, 0].t(), loaded=True, stored=True).reshape(-1, K // 32, 2, 256)
        last = torch.cat((last, beside))
    # Of conv3 all steps along k for 32 columns, then the next 32.
    return torch.cat([t.reshape(-1) for t in (first, *taps, last.transpose(0, 1))]).contiguous()


def basic_block(w1: Tensor, w2: Tensor) -> Tensor:
    """The stream of weights of ``basic_block_eval``, flat. w1 and w2 ``[C, C, 3, 3]``, one dtype."""
    taps = [
        fragments(w[:, :, r, s].t(), loaded=False, stored=True) for w in (w1, w2) for r in range(3) for s in range(3)
    ]
    return torch.cat([t.reshape(-1) for t in taps]).contiguous()


def stem(w: Tensor) -> Tensor:
    """The weights of ``stem_eval``, flat. w ``[64, 3, 7, 7]``.

    Along k lie the rows of the filter, 21 elements (column, channel) filled up to 24, and 8 zeros.
    """
    K = w.shape[0]
    rows = w.new_zeros(K, 176)
    rows[:, :168].unflatten(1, (7, 24))[:, :, :21] = w.permute(0, 2, 3, 1).reshape(K, 7, 21)
    return fragments(rows.t(), loaded=False, stored=True).reshape(-1).contiguous()
