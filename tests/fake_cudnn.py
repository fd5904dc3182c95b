"""A stand-in for the package nvidia-cudnn-frontend that runs graphs on CPU memory, one operation after the other.

It knows what ``fastres/backends/cudnn_graphs.py`` draws, keeps to the types it is given (a virtual tensor is rounded to
its type), and takes its buffers by address like the original.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import types
from enum import Enum

import torch

DataType = Enum("DataType", "FLOAT BFLOAT16 HALF")
TORCH = {DataType.FLOAT: torch.float32, DataType.BFLOAT16: torch.bfloat16, DataType.HALF: torch.float16}


class GraphNotSupported(RuntimeError):
    pass


class Tensor:
    def __init__(self, dim=None, stride=None, kind=None, uid=0, compute=None, name=""):
        self.dim, self.stride, self.kind, self.uid, self.name = dim, stride, kind, uid, name
        self.compute, self.is_output = compute, False

    def set_data_type(self, kind):
        self.kind = kind
        return self

    def set_output(self, flag):
        self.is_output = flag
        return self

    def set_uid(self, uid):
        self.uid = uid
        return self

    def set_dim(self, dim):
        self.dim = list(dim)
        return self

    def set_stride(self, stride):
        self.stride = list(stride)
        return self


def at(address: int, t: Tensor) -> torch.Tensor:
    """The memory behind an address, as the graph's tensor describes it."""
    dtype = TORCH[t.kind]
    count = 1 + sum((n - 1) * s for n, s in zip(t.dim, t.stride, strict=True))
    memory = (ctypes.c_byte * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(t.dim, t.stride)


class Graph:
    """``cudnn.pygraph``. ``noise``: what the reductions add, changing on every run, as atomics may."""

    def __init__(self, package, **settings):
        self.package, self.settings = package, settings
        self.tensors, self.compiled, self.runs, self.barred = [], [], 0, []
        package.graphs.append(self)

    def tensor(self, *, name, dim, stride, data_type, uid):
        assert uid not in [t.uid for t in self.tensors], f"uid {uid} twice"
        return self._keep(Tensor(dim, stride, data_type, uid, name=name))

    def _keep(self, t):
        self.tensors.append(t)
        return t

    def _op(self, function, *operands):
        """A value computed in fp32 from operands, each rounded to its type."""
        return self._keep(Tensor(compute=lambda values: function(*(values(o) for o in operands))))

    def sub(self, *, a, b):
        return self._op(torch.sub, a, b)

    def add(self, *, a, b):
        return self._op(torch.add, a, b)

    def mul(self, *, a, b):
        return self._op(torch.mul, a, b)

    def scale(self, *, input, scale):
        return self._op(torch.mul, input, scale)

    def bias(self, *, input, bias):
        return self._op(torch.add, input, bias)

    def relu(self, *, input):
        return self._op(torch.relu, input)

    def relu_backward(self, *, loss, input):
        return self._op(lambda g, v: torch.where(v > 0, g, 0.0), loss, input)

    def reduction(self, *, input, mode):
        assert mode == "ADD"

        def total(t):
            self.runs += 1
            return t.sum((0, 2, 3), keepdim=True) + self.package.noise * self.runs

        return self._op(total, input)

    def genstats(self, *, input):
        return (
            self._op(lambda t: t.sum((0, 2, 3), keepdim=True), input),
            self._op(lambda t: t.square().sum((0, 2, 3), keepdim=True), input),
        )

    def conv_fprop(self, *, image, weight, padding, stride, dilation):
        conv = torch.nn.functional.conv2d
        return self._op(lambda x, w: conv(x, w, None, stride, padding, dilation), image, weight)

    def conv_dgrad(self, *, loss, filter, padding, stride, dilation):
        def gradient(dy, w):
            return torch.nn.grad.conv2d_input(out.dim, w, dy, stride, padding, dilation)

        out = self._op(gradient, loss, filter)
        return out

    def conv_wgrad(self, *, image, loss, padding, stride, dilation):
        def gradient(x, dy):
            return torch.nn.grad.conv2d_weight(x, out.dim, dy, stride, padding, dilation)

        out = self._op(gradient, image, loss)
        return out

    def validate(self):
        # Only the direct output of a convolution may be left without a type: then it is that of the graph.
        for t in self.tensors:
            t.kind = t.kind or self.settings["intermediate_data_type"]

    def build_operation_graph(self):
        pass

    def create_execution_plans(self, modes):
        if self.package.declines:
            raise GraphNotSupported(self.package.declines)

    def deselect_numeric_notes(self, notes):
        self.barred += notes

    def get_execution_plan_count(self):
        return self.package.plans

    def build_plan_at_index(self, index):
        if index in self.package.broken:
            raise GraphNotSupported("kernel compilation failure")
        self.compiled.append(index)

    def get_workspace_size_plan_at_index(self, index):
        assert index in self.compiled
        return 0

    def execute_plan_at_index(self, buffers, workspace, index, handle):
        assert index in self.compiled and handle.stream == self.package.stream
        known: dict[int, torch.Tensor] = {}

        def values(t):
            if id(t) not in known:
                if t.compute is None:
                    known[id(t)] = at(buffers[t.uid], t).float()
                else:
                    known[id(t)] = t.compute(values).to(TORCH[t.kind]).float()
            return known[id(t)]

        results = [(t, values(t)) for t in self.tensors if t.is_output]
        for t, value in results:
            at(buffers[t.uid], t).copy_(value)


def package(version: str = "1.32.0", backend: int = 92400) -> types.ModuleType:
    """The module ``cudnn``. Its state: ``graphs`` (all drawn), ``plans`` (how many each graph gets), ``broken`` (ranks
    that do not compile), ``declines`` (the planner's message), ``noise`` (of reductions), ``stream``."""
    module = types.ModuleType("cudnn")
    module.__spec__ = importlib.machinery.ModuleSpec("cudnn", None)
    module.__version__ = version
    module.graphs, module.plans, module.broken, module.declines = [], 3, (), ""
    module.noise, module.stream = 0.0, 7
    module.backend_version = lambda: backend
    module.data_type = DataType
    module.heur_mode = types.SimpleNamespace(A="A", FALLBACK="FALLBACK")
    module.reduction_mode = types.SimpleNamespace(ADD="ADD")
    module.numerical_note = Enum("Note", "NONDETERMINISTIC REDUCED_PRECISION_REDUCTION DOWN_CONVERT_INPUTS WINOGRAD")
    module.pygraph = lambda **settings: Graph(module, **settings)
    module.create_handle = lambda: types.SimpleNamespace(stream=None)

    def set_stream(*, handle, stream):
        handle.stream = stream

    module.set_stream = set_stream
    return module
