"""The launch functions of ``csrc/launch.h`` as Triton kernels, one file per op.

In each file the kernels come first, then the launchers: same names and argument order as
``fastres/backends/reference.py``, tensors in, buffers filled. A launcher trusts its arguments (the backend
checks them) and only picks a tile from `configs`. Nothing here imports torch or the rest of fastres.

Served: float32, bfloat16, float16 with float32 statistics and parameters; NVIDIA compute capability 8.0 and
later under Triton 3.6 and later; CPU tensors in float32 and float16 under ``TRITON_INTERPRET=1``.
"""

from .add_relu import add_relu_bwd, add_relu_fwd
from .batch_norm_act import bn_apply, bn_finalize, bn_fold, bn_stats
from .batch_norm_act_bwd import bn_bwd_apply, bn_bwd_finalize, bn_bwd_reduce
from .bottleneck import mask_add
from .configs import tiles
from .conv_bn_act import bias_act
from .stem import stem_bwd_apply, stem_bwd_reduce, stem_fwd

__all__ = [
    "add_relu_bwd",
    "add_relu_fwd",
    "bias_act",
    "bn_apply",
    "bn_bwd_apply",
    "bn_bwd_finalize",
    "bn_bwd_reduce",
    "bn_finalize",
    "bn_fold",
    "bn_stats",
    "mask_add",
    "stem_bwd_apply",
    "stem_bwd_reduce",
    "stem_fwd",
    "tiles",
]
