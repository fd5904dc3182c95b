"""BasicBlock and Bottleneck: torchvision's constructor arguments, attribute names and state_dict, one op a block."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastres.nn.fused import MEMORY, FusedBlock


def conv3x3(inputs: int, outputs: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


def _check_memory(memory: str) -> str:
    if memory not in MEMORY:
        raise ValueError(f"memory: got {memory!r}, expected one of {', '.join(map(repr, MEMORY))}")
    return memory


class _BasicLayers(nn.Module):
    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None,
                 groups: int = 1, base_width: int = 64, dilation: int = 1,
                 norm_layer: Callable[..., nn.Module] | None = None, *, memory: str = "default"):  # fmt: skip
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError(f"groups, base_width: got {groups} and {base_width}, expected 1 and 64 in a BasicBlock")
        if dilation > 1:
            raise NotImplementedError(f"dilation: got {dilation}, expected 1 in a BasicBlock")
        norm = nn.BatchNorm2d if norm_layer is None else norm_layer
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm(planes)
        self.downsample = downsample
        self.stride = stride
        self._fastres_memory = _check_memory(memory)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class _BottleneckLayers(nn.Module):
    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None,
                 groups: int = 1, base_width: int = 64, dilation: int = 1,
                 norm_layer: Callable[..., nn.Module] | None = None, *, memory: str = "default"):  # fmt: skip
        super().__init__()
        norm = nn.BatchNorm2d if norm_layer is None else norm_layer
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride
        self._fastres_memory = _check_memory(memory)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class BasicBlock(FusedBlock, _BasicLayers):
    """Two 3x3 convolutions with a shortcut, ``[N, inplanes, H, W]`` to ``[N, planes, H/stride, W/stride]``.

    ``downsample``: a ``nn.Sequential`` of a convolution and a norm where the shape changes. ``memory="low"`` recomputes
    the last convolution in backward. Modules that the op cannot serve exactly (another norm, hooks) run one by one.
    After He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016).
    """

    _fastres_op = "basic_block"
    _fastres_names = (("conv1", "bn1"), ("conv2", "bn2"))


class Bottleneck(FusedBlock, _BottleneckLayers):
    """1x1, 3x3 (carrying stride, groups and dilation) and 1x1 convolutions with a shortcut, to ``4 * planes`` channels.

    ``width = planes * base_width / 64 * groups`` channels inside. ``downsample`` and ``memory`` as in ``BasicBlock``.
    The stride sits in the 3x3 convolution, as in torchvision ("ResNet v1.5").
    """

    _fastres_op = "bottleneck"
    _fastres_names = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
