"""Whether modules and tensors are served exactly by the fused ops, and if not, why.

Every check appends a sentence to a list and costs well under a microsecond when there is nothing to say, so that
the same checks run when a model is fused and again at every call: hooks, modules and geometry may change between.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastres.nn.reading import can_read, is_buffer_norm
from fastres.ops.params import DTYPES

PLAIN = (Tensor, nn.Parameter)
Pair = tuple[str, nn.Conv2d, nn.Module]


def qualified(kind: type) -> str:
    """``torch.nn.GroupNorm`` instead of where torch happens to define it."""
    if getattr(nn, kind.__name__, None) is kind:
        return f"torch.nn.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def check_untouched(name: str, module: nn.Module, reasons: list[str]) -> None:
    """Nothing hangs on a module whose ``__call__`` a fused op would skip. State-dict hooks are harmless."""
    if module._forward_hooks:
        reasons.append(f"{name}: has forward hooks, which a fused op would not run")
    if module._forward_pre_hooks:
        reasons.append(f"{name}: has forward pre-hooks (weight norm and pruning use them), which would not run")
    if module._backward_hooks or module._backward_pre_hooks:
        reasons.append(f"{name}: has backward hooks, which a fused op would not run")
    if "forward" in module.__dict__:
        reasons.append(f"{name}: forward is overridden on the instance")


def check_conv(name: str, conv: nn.Module | None, reasons: list[str]) -> None:
    if type(conv) is not nn.Conv2d:
        if isinstance(conv, nn.Module) and hasattr(conv, "parametrizations"):
            reasons.append(f"{name}: is parametrized (torch.nn.utils.parametrize)")
        else:
            reasons.append(f"{name}: is {qualified(type(conv))}, expected exactly torch.nn.Conv2d")
        return
    check_untouched(name, conv, reasons)
    if conv.padding_mode != "zeros":
        reasons.append(f"{name}: padding_mode is {conv.padding_mode!r}, expected 'zeros'")
    if isinstance(conv.padding, str):
        reasons.append(f"{name}: padding is the string {conv.padding!r}, expected integers")
    weight = conv._parameters.get("weight")
    if weight is None or len(conv._parameters) != 2 or conv._modules:
        reasons.append(f"{name}: has other parameters or children than those of torch.nn.Conv2d")
    elif weight.is_meta:
        reasons.append(f"{name}: its weight is on the meta device")


def check_norm(name: str, norm: nn.Module | None, reasons: list[str]) -> None:
    kind = type(norm)
    if not can_read(kind):
        if kind is nn.SyncBatchNorm:
            reasons.append(f"{name}: torch.nn.SyncBatchNorm merges statistics over processes, which is not fused yet")
        elif isinstance(norm, nn.Module) and hasattr(norm, "parametrizations"):
            reasons.append(f"{name}: is parametrized (torch.nn.utils.parametrize)")
        else:
            reasons.append(
                f"{name}: is {qualified(kind)}, expected exactly torch.nn.BatchNorm2d or a FrozenBatchNorm2d"
            )
        return
    check_untouched(name, norm, reasons)
    buffers = norm._buffers
    if (buffers.get("running_mean") is None) != (buffers.get("running_var") is None):
        reasons.append(f"{name}: has one of running_mean and running_var, expected both or neither")


def check_act(name: str, act: nn.Module | None, reasons: list[str]) -> None:
    if type(act) is not nn.ReLU:
        reasons.append(f"{name}: is {qualified(type(act))}, expected exactly torch.nn.ReLU")
        return
    check_untouched(name, act, reasons)


def check_pool(name: str, pool: nn.Module | None, reasons: list[str]) -> None:
    """Max pooling with a square window, as the stem op computes it."""
    if type(pool) is not nn.MaxPool2d:
        reasons.append(f"{name}: is {qualified(type(pool))}, expected exactly torch.nn.MaxPool2d")
        return
    check_untouched(name, pool, reasons)
    if not all(isinstance(v, int) for v in (pool.kernel_size, pool.stride, pool.padding)):
        reasons.append(f"{name}: kernel_size, stride or padding is not one integer")
    elif pool.padding > pool.kernel_size // 2 or pool.kernel_size > 15:
        reasons.append(f"{name}: kernel_size {pool.kernel_size} with padding {pool.padding} is not served")
    if pool.dilation != 1 or pool.ceil_mode or pool.return_indices:
        reasons.append(f"{name}: dilation, ceil_mode or return_indices is set")


def check_shortcut(name: str, shortcut: nn.Module | None, reasons: list[str]) -> None:
    """A projection shortcut: absent, or a plain Sequential of a convolution and a normalisation."""
    if shortcut is None:
        return
    if type(shortcut) is not nn.Sequential or len(shortcut._modules) != 2:
        reasons.append(f"{name}: is {qualified(type(shortcut))}, expected a Sequential of a convolution and a norm")
        return
    check_untouched(name, shortcut, reasons)
    conv, norm = shortcut._modules.values()
    check_conv(name, conv, reasons)
    check_norm(name, norm, reasons)


def check_children(module: nn.Module, expected: int, reasons: list[str]) -> None:
    if len(module._modules) != expected:
        reasons.append(f"has {len(module._modules)} child modules ({', '.join(module._modules)}), expected {expected}")


def why_not_call(x, dims: int | None = 4) -> str | None:
    """Why this very call is left to PyTorch: what ``x`` is (of ``dims`` dimensions, None: any), and who is watching."""
    if type(x) not in PLAIN:
        return f"the input is {qualified(type(x))}, expected a plain torch.Tensor"
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return "torch.export is tracing: the graph gets PyTorch's own operators"
    elif torch.jit.is_tracing():
        return "torch.jit.trace or the ONNX exporter is tracing: the graph gets PyTorch's own operators"
    elif torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    elif forward_ad._current_level >= 0:
        return "forward-mode automatic differentiation is active"
    elif nn.modules.module._has_any_global_hook():
        return "global module hooks are registered, which a fused op would not run on the modules inside"
    if dims is not None and x.dim() != dims:
        return f"the input has {x.dim()} dimensions, expected {dims}"
    if x.dtype not in DTYPES or x.layout is not torch.strided:
        return f"the input has dtype {x.dtype} and layout {x.layout}, expected a strided floating point tensor"
    if x.device.type not in ("cpu", "cuda"):
        return f"the input is on {x.device.type}, expected cpu or cuda"
    return None


def why_not_tensors(x: Tensor, pairs: list[Pair], compute: torch.dtype) -> str | None:
    """Why the parameters do not go with ``x``, computed in ``compute``. Devices and shapes are the op's to check."""
    given, cast = x.dtype, False
    for name, conv, norm in pairs:
        dtype = conv._parameters["weight"].dtype
        if dtype is not given:
            cast = cast or (given is not torch.float64 and torch.is_autocast_enabled(x.device.type))
            if not cast or dtype is torch.float64:
                return f"{name}: its weight is {dtype}, the input {given}"
        for module in (conv, norm):
            for parameter in module._parameters.values():
                if parameter is not None and type(parameter) not in PLAIN:
                    return f"{name}: has a {qualified(type(parameter))}, expected a plain torch.nn.Parameter"
        kind = type(norm)
        if kind is not nn.BatchNorm2d and is_buffer_norm(kind) and norm.running_var.dtype != compute:
            return f"the norm after {name} promotes {compute} to {norm.running_var.dtype}, which a fused op would not"
    return None
