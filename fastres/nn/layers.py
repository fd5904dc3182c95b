"""Single-op modules: AddReLU, BatchNormAct2d, ConvBNAct2d, Stem."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastres.nn import fitness
from fastres.nn.fused import Fused, FusedConvBNAct, FusedStem
from fastres.nn.reading import read_batch_norm
from fastres.ops.add_relu import add_relu
from fastres.ops.batch_norm_act import batch_norm_act


def _fits(x, residual, dims: int | None = 4) -> bool:
    plain = residual is None or type(residual) in fitness.PLAIN
    return plain and fitness.why_not_call(x, dims) is None


class AddReLU(nn.Module):
    """``relu(x + residual)`` in one pass: the tail of a residual block. Tensors of any one shape and dtype."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return add_relu(x, residual) if _fits(x, residual, None) else torch.relu(x + residual)


class BatchNormAct2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with a ReLU and, if given to ``forward``, a residual added before it, in one pass.

    Arguments, parameters and state_dict are those of ``nn.BatchNorm2d``; ``act=False`` leaves the ReLU out.
    Input, residual and output ``[N, C, H, W]``. Beware that ``nn.SyncBatchNorm.convert_sync_batchnorm`` replaces every
    subclass of ``nn.BatchNorm2d`` and thereby drops residual and ReLU.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
                 track_running_stats: bool = True, device=None, dtype=None, *, act: bool = True):  # fmt: skip
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.act = act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if _fits(x, residual):
            return batch_norm_act(x, read_batch_norm(self), residual=residual, relu=self.act)
        out = super().forward(x)
        if residual is not None:
            out = out + residual
        return torch.relu(out) if self.act else out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"


class _ConvBN(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class ConvBNAct2d(FusedConvBNAct, _ConvBN):
    """Convolution, batch normalisation, optional residual, optional ReLU.

    Children ``conv`` (``nn.Conv2d``) and ``bn`` (``norm_layer``, default ``nn.BatchNorm2d``), hence a state_dict of
    ``conv.*`` and ``bn.*``. ``padding=None`` keeps the size at stride 1 (odd kernels). ``forward(x, residual=None)``:
    ``x`` ``[N, C, H, W]``, ``residual`` of the output's shape, added before the ReLU.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], stride=1, padding=None,
                 dilation=1, groups: int = 1, bias: bool = False, *, act: bool = True, eps: float = 1e-5,
                 momentum: float | None = 0.1, norm_layer=None):  # fmt: skip
        super().__init__()
        if padding is None:
            kernel = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
            spread = (dilation,) * 2 if isinstance(dilation, int) else dilation
            if any(k % 2 == 0 for k in kernel):
                raise ValueError(f"padding: got None with kernel_size {kernel_size}, expected odd kernels or a padding")
            padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, spread, strict=True))
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum) if norm_layer is None else norm_layer(out_channels)
        self.act = act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        plain = residual is None or type(residual) in fitness.PLAIN
        pairs = self._fastres_serves(x) if plain else None
        if pairs is not None:
            return self._fastres_run(x, pairs, residual, self.act)
        out = _ConvBN.forward(self, x)
        if residual is not None:
            out = out + residual
        return torch.relu(out) if self.act else out


class Stem(FusedStem, nn.Module):
    """Convolution, batch normalisation, ReLU and max pooling: how a ResNet begins.

    ``[N, C, H, W]`` to a quarter of the size with the default geometry. Children ``conv1``, ``bn1``, ``relu`` and
    ``maxpool``, as a ResNet names them.
    """

    def __init__(self, in_channels: int = 3, out_channels: int = 64, kernel_size: int = 7, stride: int = 2,
                 padding: int = 3, *, pool_kernel: int = 3, pool_stride: int = 2, pool_padding: int = 1,
                 norm_layer=nn.BatchNorm2d):  # fmt: skip
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn1 = norm_layer(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(pool_kernel, pool_stride, pool_padding)

    def forward(self, x: Tensor) -> Tensor:
        out = self._fastres_stem(x)
        return self.maxpool(self.relu(self.bn1(self.conv1(x)))) if out is None else out


__all__ = ["AddReLU", "BatchNormAct2d", "ConvBNAct2d", "Fused", "Stem"]
