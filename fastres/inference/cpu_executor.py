"""Nodes on the CPU backend's own convolutions, where those are faster than oneDNN's (``backends/cpu_conv.py``): weights
packed once, bias, residual and ReLU in the epilogue. Everything else stays with the torch executor."""

from __future__ import annotations

import torch

from fastres.backends import cpu_conv
from fastres.inference.plan import Block, ConvAct, Node, Segment
from fastres.inference.torch_executor import TorchSegment

name = "cpu"


def why_not(node: Node, device: torch.device, dtype: torch.dtype, precision: str) -> list[str]:
    if not isinstance(node, Block | ConvAct):
        return [f"{node.op}: the kernels are convolutions without pooling"]
    if device.type != "cpu":
        return [f"the session is on {device}, the kernels are for the CPU"]
    reasons: list[str] = []
    for conv in node.convs():
        w = conv.weight.to(dtype)
        x = w.new_empty((1, w.shape[1] * conv.geometry[3], 16, 16))
        found = cpu_conv.why_not(x, w, conv.geometry)
        if not found and not cpu_conv.wins("fprop", x, w, conv.geometry):
            found = [f"{tuple(w.shape)} {str(dtype)[6:]}: oneDNN's convolution is the faster one"]
        reasons += [reason for reason in found if reason not in reasons]
    return reasons


def precision(device: torch.device, dtype: torch.dtype, asked: str) -> str:
    """Direct sums in float32, always."""
    return "exact"


def peak(device: torch.device, dtype: torch.dtype, threads: int) -> None:
    """The report takes the rate of ``torch.mm``."""


def prepare(segment: Segment, device: torch.device, dtype: torch.dtype, precision: str) -> TorchSegment:
    return TorchSegment(segment, device, dtype, precision, own=True)
