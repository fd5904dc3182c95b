"""Launches without checks, for callers that allocated or checked every argument themselves.

A checked launch costs 15 to 25 us of Python, of which the call into C++ is one: more than many a kernel runs. The ops
allocate nearly everything they launch on, and check what comes from outside once, where it enters; from there
on ``backend.trusted`` turns tensors straight into addresses. ``SIGNATURES`` is the one table behind it: from each
row a function is generated whose body is the call itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

#: Activation dtypes and their code in ``csrc/launch.h``.
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

#: Arguments of each launch function, in the order of ``csrc/launch.h``: ``*`` a tensor, ``?`` a tensor or None, else a
#: number. The first tensor fixes dtype and device.
SIGNATURES = {
    "add_relu_fwd": "x* residual* n out* mask?",
    "add_relu_bwd": "grad* mask* n dx*",
    "bn_stats": "x* M C T part*",
    "bn_finalize": "part* T C weight? bias? eps stat*",
    "bn_fold": "running_mean* running_var* weight? bias? eps C stat*",
    "bn_apply": "x* M C stat* residual? rstat? relu out* mask?",
    "bn_bwd_reduce": "grad* x* M C stat* residual? rstat? mask? relu T part* y?",
    "bn_bwd_finalize": "part* plane T M C stat* batch_stats dweight? dbias? coef*",
    "bn_bwd_apply": "grad* x* M C stat* coef* residual? rstat? rcoef? mask? relu dx* dres?",
    "bias_act": "x* M C bias? residual? relu out*",
    "mask_add": "a* grad* mask* M C out*",
    "stem_fwd": "x* N H W C stat* P Q k stride pad out* idx?",
    "stem_bwd_reduce": "grad* idx* x* N H W C stat* P Q k stride pad T part*",
    "stem_bwd_apply": "grad* idx* x* N H W C stat* coef* P Q k stride pad dx*",
}

#: The same for what the CUDA sources offer beside them (``csrc/cuda/launch_cuda.h``).
CUDA_SIGNATURES = {
    "bn_one_pass_fwd": "x* M C weight? bias? eps residual? rstat? relu T part* stat* out* mask?",
    "bn_one_pass_bwd": "grad* x* M C stat* mask? relu batch_stats T part* dweight? dbias? coef* dx* dres? y?",
}

#: Stands for the address of an empty tensor, which torch reports as 0: it is not an absent argument.
EMPTY = 256


def parameters(signature: str) -> list[tuple[str, str]]:
    """(name, kind) of each argument of a row of ``SIGNATURES``; kind is ``*``, ``?`` or empty."""
    fields = [(word.rstrip("*?"), word) for word in signature.split()]
    return [(name, word[len(name) :]) for name, word in fields]


def first_tensor(signature: str) -> str:
    return next(name for name, kind in parameters(signature) if kind == "*")


def _address(name: str, kind: str) -> str:
    if kind == "*":
        return f"{name}.data_ptr() or {EMPTY}"
    return f"0 if {name} is None else {name}.data_ptr() or {EMPTY}" if kind else name


def define(name: str, source: str, scope: Mapping) -> Callable:
    """The function ``name`` of generated ``source``, whose globals are ``scope``."""
    namespace = dict(scope)
    exec(compile(source, f"<fastres {name}>", "exec"), namespace)
    return namespace[name]


# Asked of torch at every launch. torch.cuda.current_stream and torch.cuda.device build Python objects, 5 us a launch;
# these are the calls beneath, which torch's own compiler emits. A tensor on a GPU proves that CUDA is initialised.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_device = getattr(torch._C, "_cuda_getDevice", None)


def current_stream(index: int) -> int:
    """``cudaStream_t`` of the current stream of GPU ``index``, as an integer."""
    return _raw_stream(index) if _raw_stream is not None else torch.cuda.current_stream(index).cuda_stream


def current_device() -> int:
    """The GPU that this thread launches on."""
    return _device() if _device is not None else torch.cuda.current_device()


def elsewhere(index: int, function: Callable, *args) -> None:
    """``function(*args)`` with GPU ``index`` as the current one."""
    with torch.cuda.device(index):
        function(*args)


def native_functions(module, ctx: Callable | None) -> dict[str, Callable]:
    """The launch functions of a compiled ``module``. ``ctx() -> int``: its last argument; None: on a GPU, where that is
    the current stream of the tensors' device."""
    scope = {"code": DTYPE_CODE, "ctx": ctx}
    scope |= {"stream": _raw_stream or current_stream, "current": _device or current_device, "elsewhere": elsewhere}
    found = {}
    offered = {n: signature for n, signature in CUDA_SIGNATURES.items() if hasattr(module, n)}
    for name, signature in {**SIGNATURES, **offered}.items():
        fields, first = parameters(signature), first_tensor(signature)
        names = ", ".join(field for field, _ in fields)
        addresses = ", ".join(_address(*field) for field in fields)
        body = f"    launch(code[{first}.dtype], {addresses}, ctx())\n"
        if ctx is None:
            # The module's own CUDA runtime launches into the context that is current on this thread.
            body = (
                f"    device = {first}.get_device()\n"
                f"    if device != current():\n"
                f"        return elsewhere(device, {name}, {names})\n"
                f"    launch(code[{first}.dtype], {addresses}, stream(device))\n"
            )
        source = f"def {name}({names}):\n{body}"
        found[name] = define(name, source, {**scope, "launch": getattr(module, name)})
    return found


class Trusted:
    """A backend whose launch functions check nothing; everything else is that of the ``checked`` backend.

    Undefined behaviour for arguments that the checked functions would refuse. For callers within fastres only.
    """

    def __init__(self, checked, functions: Mapping[str, Callable]):
        self.checked, self.name, self.tiles = checked, checked.name, checked.tiles
        self.trusted = self
        self.__dict__.update(functions)

    def __getattr__(self, name: str):
        return getattr(self.checked, name)
