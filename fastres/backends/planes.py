"""Weights as the warpgroup products of sm_90 read them from shared memory (``csrc/cuda/bottleneck_hopper.cuh``).

B ``[k, n]`` of a product lies in planes: all n columns of eight rows along k, 16 bytes each, then the next eight. That
is the canonical layout without swizzle whose neighbours along n follow each other; any slice of k is one piece of
memory. Which channel is which row or column is ours to say, as in `fragments`: so that four lanes hold channels that
lie side by side in memory. Written for any device and 16-bit dtype; run once for a set of weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Output channels that conv3 makes at a time: csrc/cuda/bottleneck_hopper.cuh, kBlockK.
BLOCK = 64


def planes(matrix: Tensor, *, loaded: bool = False, stored: bool = False) -> Tensor:
    """B ``[k, n]`` as ``[k/8, n, 8]``; k a multiple of 16, n of 32.

    ``loaded``: lane t of four holds channels 4t..4t+3 of each 16 of A, straight from global memory, else A's channels
    are the rows. ``stored``: lane t gets channels 8t..8t+7 of each 32, else the channels are the columns.
    """
    k, n = matrix.shape
    if k % 16 or n % 32:
        raise ValueError(f"matrix: got {k} x {n}, expected multiples of 16 and 32")
    if loaded:  # channel (step, lane, half, element) is row (step, half, lane, element)
        matrix = matrix.reshape(k // 16, 4, 2, 2, n).transpose(1, 2).reshape(k, n)
    if stored:  # channel (block, lane, tile, element) is column (block, tile, lane, element)
        matrix = matrix.reshape(k, n // 32, 4, 4, 2).transpose(2, 3).reshape(k, n)
    return matrix.reshape(k // 8, 8, n).transpose(1, 2).contiguous()


def bottleneck(w1: Tensor, w2: Tensor, w3: Tensor, projection: Tensor | None = None) -> Tensor:
    """The weights of ``bottleneck_hopper``, flat, in the order in which they are multiplied.

    w1 ``[mid, C, 1, 1]``, w2 ``[mid, mid, 3, 3]``, w3 ``[K, mid, 1, 1]``, projection ``[K, C, 1, 1]``; one dtype; K a
    multiple of 64.
    """
    parts = [planes(w1[:, :, 0, 0].t(), stored=True)]
    parts += [planes(w2[:, :, r, s].t()) for r in range(3) for s in range(3)]
    for channels in range(0, w3.shape[0], BLOCK):
        rows = slice(channels, channels + BLOCK)
        parts.append(planes(w3[rows, :, 0, 0].t(), stored=True))
        if projection is not None:
            parts.append(planes(projection[rows, :, 0, 0].t(), loaded=True, stored=True))
    return torch.cat([part.reshape(-1) for part in parts])
