"""A batch normalisation that stays frozen."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that normalises with its running statistics and never updates them.

    ``train()`` leaves it frozen; the state_dict is that of ``nn.BatchNorm2d``. ``fastres.freeze_bn`` turns a model's
    norms into this class and ``fastres.unfreeze_bn`` turns them back. Built directly, it starts with
    ``requires_grad=False`` affine parameters. Input and output ``[N, C, H, W]``.
    """

    _fastres_mode = True  # what train() last asked for: the mode that unfreeze_bn returns to

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
                 device=None, dtype=None):  # fmt: skip
        super().__init__(num_features, eps, momentum, affine, True, device=device, dtype=dtype)
        self.training = False
        self.requires_grad_(False)

    def train(self, mode: bool = True):
        if not isinstance(mode, bool):
            raise ValueError(f"mode: got {mode!r}, expected a bool")
        self._fastres_mode = mode
        self.training = False
        return self

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
