"""Checks of a convolution's arguments that every backend makes before an address is taken. All raise, naming function,
argument, what it got and what was expected."""

from __future__ import annotations

import torch


def activation(fn: str, name: str, t, like: torch.Tensor, shape, aligned_for: str = "") -> None:
    """``t``: activations or weights, channels_last, dtype and device of ``like``; with ``aligned_for`` (who asks)
    at a multiple of 16 bytes."""
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{fn}: {name} must be a tensor, got {type(t).__name__}")
    if t.dtype is not like.dtype or t.device != like.device:
        raise ValueError(f"{fn}: {name} must be {like.dtype} on {like.device}, got {t.dtype} on {t.device}")
    if t.shape != shape:
        raise ValueError(f"{fn}: {name} must have shape {list(shape)}, got {list(t.shape)}")
    if not t.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"{fn}: {name} must be dense channels_last, got strides {t.stride()}")
    if aligned_for and t.data_ptr() % 16:
        raise ValueError(f"{fn}: {name} must be aligned to 16 bytes for {aligned_for}, got {t.data_ptr():#x}")


def vector(fn: str, name: str, t: torch.Tensor, device: torch.device, shape) -> None:
    """``t``: contiguous float32 of ``shape``."""
    if t.dtype != torch.float32 or t.device != device or not t.is_contiguous() or t.shape != shape:
        got = f"{t.dtype} {list(t.shape)}, strides {t.stride()}, on {t.device}"
        raise ValueError(f"{fn}: {name} must be contiguous float32 {list(shape)} on {device}, got {got}")


def _span(t: torch.Tensor) -> tuple[int, int]:
    """First address of ``t`` and the one behind its last, whatever its strides."""
    reach = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + reach * t.element_size()


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors may share memory; an empty one shares none."""
    if not a.numel() or not b.numel():
        return False
    first, second = _span(a), _span(b)
    return first[0] < second[1] and second[0] < first[1]
