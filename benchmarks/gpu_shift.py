"""May a warpgroup product begin at any row of a tile in shared memory (``gpu_stages.py``)? Asked of an sm_90 GPU.

The expectation is the emulator's model of matrix descriptors: rows ``shift ..`` of the tile, to the last bit. A 3x3
convolution on a resident tile rests on it; where the swizzled layout differs, the planar one remains.
"""

from __future__ import annotations

import torch

from fastres import dispatch

LAYOUTS = ("swizzle128", "planar")


def run(emit, device: torch.device, backend: str) -> bool:
    kernels = dispatch.load(backend)
    if getattr(kernels, "module", None) is None or not hasattr(kernels.module, "shifted_rows"):
        emit(kind="shift", backend=backend, status="refused", why="no compiled CUDA sources")
        return True
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        emit(kind="shift", backend=backend, status="refused", why="warpgroup products exist on sm_90 alone")
        return True
    g = torch.Generator().manual_seed(0)
    x = torch.randn(80, 64, generator=g).to(device, torch.bfloat16)
    identity = torch.eye(64, dtype=torch.bfloat16, device=device)
    for planar, layout in enumerate(LAYOUTS):
        differing = []
        for shift in range(17):
            out = torch.full((64, 64), float("nan"), device=device)
            kernels.module.shifted_rows(
                x.data_ptr(), identity.data_ptr(), shift, planar, out.data_ptr(), kernels._ctx(device)
            )
            if not torch.equal(out, x[shift : shift + 64].float()):
                differing.append(shift)
        emit(kind="shift", layout=layout, status="differs" if differing else "as modelled", shifts=differing)
    return True
