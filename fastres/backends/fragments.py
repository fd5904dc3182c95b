"""Weights in the order in which the tensor-core kernels multiply them (``csrc/cuda/fragments.cuh``).

A product on tensor cores takes B in fragments of 16 x 16: 32 lanes x (4 registers of 2 elements). Which channel is
which row or column of a fragment is ours to say, as long as both operands agree; it is chosen so that a lane's channels
lie side by side in memory. Written for any device and 16-bit dtype; run once for a set of weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Which channels of k a lane holds, lane t of four. loaded: straight from global memory, 4t..4t+3 of each 16. kept:
#: from shared memory or a product's registers, 2t, 2t+1, 2t+8, 2t+9. stored: of a product whose columns are in that
#: order, 8t..8t+7 of each 32. (channels of a block, its shape, where in it steps, half, pair and element lie).
_ROWS = {
    "loaded": (16, (4, 2, 2), (), (1, 0, 2)),
    "kept": (16, (2, 4, 2), (), (0, 1, 2)),
    "stored": (32, (4, 2, 2, 2), (1,), (2, 0, 3)),
}


def _columns(n: int, stored: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of n channels and where (block of 32, fragment of the block, tile of the fragment, column) lie in it.

    ``stored``: lane t of four gets channels 8t..8t+7 of each 32 (what goes to memory), else columns are channels.
    The column is two numbers, its pair (of lanes) and the element in it.
    """
    if stored:
        return (n // 32, 4, 2, 2, 2), (0, 2, 3, 1, 4)  # block, pair, fragment, tile, element
    return (n // 32, 2, 2, 4, 2), (0, 1, 2, 3, 4)  # block, fragment, tile, pair, element


def fragments(matrix: Tensor, *, rows: str, stored: bool) -> Tensor:
    """B ``[k, n]`` as ``[k/16, n/16, 256]``: the fragments of each step along k. ``rows``: one of `_ROWS`. n is a
    multiple of 32, k of 16, with rows "stored" of 32."""
    k, n = matrix.shape
    size, shape, steps, inner = _ROWS[rows]
    if k % size or n % 32:
        raise ValueError(f"matrix: got {k} x {n}, expected multiples of {size} and 32")
    half, pair, element = (1 + at for at in inner)
    n_shape, n_at = _columns(n, stored)
    block, fragment, tile, column, parity = (1 + len(shape) + at for at in n_at)
    # lane 4*column + pair (the column of a tile is 2*column + parity), register 2*tile + half, element
    order = (0, *(1 + at for at in steps), block, fragment, column, parity, pair, tile, half, element)
    return matrix.reshape(k // size, *shape, *n_shape).permute(order).reshape(k // 16, n // 16, 256)


def _taps(w: Tensor, *, stored: bool = False) -> list[Tensor]:
    return [fragments(w[:, :, r, s].t(), rows="kept", stored=stored) for r in range(3) for s in range(3)]


def bottleneck(w1: Tensor, w2: Tensor, w3: Tensor, projection: Tensor | None = None) -> Tensor:
    """The stream of weights of ``bottleneck_eval``, flat.

    w1 ``[mid, C, 1, 1]``, w2 ``[mid, mid, 3, 3]``, w3 ``[K, mid, 1, 1]``, projection ``[K, C, 1, 1]``; one dtype.
    """
    mid, K = w1.shape[0], w3.shape[0]
    first = fragments(w1[:, :, 0, 0].t(), rows="loaded", stored=True)
    last = fragments(w3[:, :, 0, 0].t(), rows="kept", stored=True).reshape(mid // 16, K // 32, 2, 256)
    if projection is not None:
        short = -projection.shape[1] % mid if mid == 128 else 0  # its channels come in chunks of 128
        projection = torch.nn.functional.pad(projection, (0, 0, 0, 0, 0, short))
        beside = fragments(projection[:, :, 0, 0].t(), rows="loaded", stored=True).reshape(-1, K // 32, 2, 256)
        last = torch.cat((last, beside))
    # Of conv3 all steps along k for 32 columns, then the next 32.
    return torch.cat([t.reshape(-1) for t in (first, *_taps(w2), last.transpose(0, 1))]).contiguous()


def rotated(w2: Tensor, w3: Tensor, w1: Tensor | None = None) -> Tensor:
    """The stream of weights of ``rotated_stage``, flat.

    w2 ``[mid, mid, 3, 3]``, w3 ``[K, mid, 1, 1]``, w1 ``[mid, K, 1, 1]`` of the next block or None; one dtype.
    """
    mid, K = w2.shape[0], w3.shape[0]
    # Of conv3 all steps along k for 32 columns, then of the next conv1 all columns for these 32.
    last = fragments(w3[:, :, 0, 0].t(), rows="kept", stored=True).reshape(mid // 16, K // 32, 2, 256)
    last = last.transpose(0, 1).reshape(K // 32, -1)
    if w1 is not None:
        after = fragments(w1[:, :, 0, 0].t(), rows="stored", stored=True).reshape(K // 32, -1)
        last = torch.cat((last, after), 1)
    return torch.cat([t.reshape(-1) for t in (*_taps(w2), last)]).contiguous()


def basic_block(w1: Tensor, w2: Tensor) -> Tensor:
    """The stream of weights of ``basic_block_eval``, flat. w1 and w2 ``[C, C, 3, 3]``, one dtype."""
    taps = [tap for w in (w1, w2) for tap in _taps(w, stored=True)]
    return torch.cat([t.reshape(-1) for t in taps]).contiguous()


def stem(w: Tensor) -> Tensor:
    """The weights of ``stem_eval``, flat. w ``[64, 3, 7, 7]``.

    Along k lie the rows of the filter, 21 elements (column, channel) filled up to 24, and 8 zeros.
    """
    K = w.shape[0]
    rows = w.new_zeros(K, 176)
    rows[:, :168].unflatten(1, (7, 24))[:, :, :21] = w.permute(0, 2, 3, 1).reshape(K, 7, 21)
    return fragments(rows.t(), rows="kept", stored=True).reshape(-1).contiguous()
