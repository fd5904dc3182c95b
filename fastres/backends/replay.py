"""Triton launches repeated without Triton's Python: a launch seen before goes straight to the compiled kernel.

A warm launch through ``kernel[grid](...)`` picks a tile, binds and specialises every argument, builds a key, looks it
up and calls the launch hooks, for kernels that may run 20 us. For a fixed launcher, all of that is a function of the
launcher's numbers, the dtype, which tensors are absent, and whether addresses are multiples of 16. So the first launch
under such a key goes through Triton as usual, which returns the compiled kernel; what each of its arguments was
made of is recorded, and from then on the same key calls ``CompiledKernel.run`` with fresh addresses.

Workspaces that a launcher allocates are allocated anew each time. Triton's ordinary way is taken, every time, for: an
address that is no multiple of 16; a launcher that does more with tensors than allocate and pass them on, or passes
what cannot be traced back to its arguments; a Triton version not in ``KNOWN``; launch hooks (profilers).
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastres.backends.trusted import current_device, current_stream, define, elsewhere

#: (major, minor) versions of Triton whose ``CompiledKernel.run`` was read and takes what `_runner` passes.
KNOWN = frozenset({(3, 6), (3, 8)})
#: Launches remembered for each function; a training run has one for each shape of its layers.
CAPACITY = 4096


@dataclass
class _Call:
    """One kernel launch inside a launcher, as the launcher asked for it."""

    kernel: object
    grid: tuple
    args: tuple
    kwargs: dict


class _Recorder:
    """Takes the place of a kernel in a launcher's globals and notes the launch."""

    def __init__(self, kernel, calls: list[_Call]):
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.calls.append(_Call(self.kernel, grid, args, kwargs))


class _Rehearsal:
    """Twins of launchers in which every kernel of their package only notes its launch."""

    def __init__(self, launcher: types.FunctionType):
        self.calls: list[_Call] = []
        self._package = launcher.__module__.rpartition(".")[0] or launcher.__module__
        self._scopes: dict[int, dict] = {}
        self.launcher = self._twin(launcher)

    def _twin(self, value):
        from triton.runtime.jit import JITFunction

        if isinstance(value, JITFunction):
            return _Recorder(value, self.calls)
        if isinstance(value, types.FunctionType) and value.__module__.startswith(self._package):
            scope = self._scope(value.__globals__)
            twin = types.FunctionType(value.__code__, scope, value.__name__, value.__defaults__, value.__closure__)
            twin.__kwdefaults__ = value.__kwdefaults__
            return twin
        if isinstance(value, types.ModuleType) and value.__name__.startswith(self._package):
            twin = types.ModuleType(value.__name__)
            twin.__dict__.update(self._scope(vars(value)))
            return twin
        return value

    def _scope(self, namespace: dict) -> dict:
        scope = self._scopes.get(id(namespace))
        if scope is None:
            scope = self._scopes[id(namespace)] = dict(namespace)
            scope.update({name: self._twin(value) for name, value in namespace.items()})
        return scope


@functools.cache
def _possible() -> bool:
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) in KNOWN


def _hooked() -> bool:
    """Whether somebody listens to launches; they get Triton's own."""
    runtime = _runtime()
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool((enter is not None and enter.calls) or (leave is not None and leave.calls))


@functools.cache
def _runtime():
    from triton import knobs

    return knobs.runtime


def _ignore(*_args) -> None:
    """The plan of a launcher that launches nothing."""


class _Address:
    """What a descriptor asks of its base at launch."""

    __slots__ = ("_at",)

    def __init__(self, at: int):
        self._at = at

    def data_ptr(self) -> int:
        return self._at


class _Allocations(TorchDispatchMode):
    """Collects what a rehearsed launcher allocates, and refuses whatever else it would do with tensors."""

    ALLOWED = (torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default)

    def __init__(self):
        super().__init__()
        self.made: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # How a launcher without torch names a dtype: x.new_empty(0).float(), no element of which is ever computed.
        if func not in self.ALLOWED and not (isinstance(out, torch.Tensor) and out.numel() == 0):
            raise NotImplementedError(f"{func} in a launcher")
        self.made.append(out)
        return out


class _StandIns:
    """Distinct tensors for distinct arguments, which may share a buffer: an argument is traced by its identity."""

    def __init__(self, arguments: list, where: list[int]):
        from triton.tools.tensor_descriptor import TensorDescriptor

        self.descriptor = TensorDescriptor
        self.tensors = [arguments[i] for i in where]
        self.arguments = list(arguments)
        self._position: dict[int, int] = {}
        for position, (i, t) in enumerate(zip(where, self.tensors, strict=True)):
            if t is not None:
                self.arguments[i] = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
                self._position[id(self.arguments[i])] = position
        self.device = next(t.device for t in self.tensors if t is not None)
        self.workspaces: list[tuple[torch.Size, torch.dtype]] = []
        self._made: list[torch.Tensor] = []

    def allocate(self, made: list[torch.Tensor], calls: list[_Call]) -> None:
        """Real memory for those of ``made`` that ``calls`` work on, behind the launcher's own tensors."""
        used = {id(getattr(value, "base", value)) for call in calls for value in _bound(call)}
        self._made = [t for t in made if id(t) in used]
        self.workspaces = [(t.shape, t.dtype) for t in self._made]
        for t in self._made:
            self._position[id(t)] = len(self.tensors)
            self.tensors.append(torch.empty(t.shape, dtype=t.dtype, device=self.device))

    def position(self, value) -> int | None:
        """Which tensor ``value`` stands for, itself or as the base of a descriptor."""
        return self._position.get(id(value.base if isinstance(value, self.descriptor) else value))

    def real(self, value):
        position = self.position(value)
        if position is None:
            return value
        if isinstance(value, self.descriptor):
            return _rebased(value, self.tensors[position])
        return self.tensors[position]

    def knows(self, value) -> bool:
        """Whether a launch with ``value`` can be repeated: one of the tensors, or a plain constant."""
        return self.position(value) is not None or value is None or isinstance(value, (int, float, str, bool))


def _rebased(descriptor, base):
    """A copy of a tensor descriptor over other memory, without the checks of its constructor."""
    twin = object.__new__(type(descriptor))
    twin.__dict__.update(descriptor.__dict__)
    twin.base = base
    return twin


def _bound(call: _Call) -> list:
    """The kernel's arguments in the order of its parameters, compile-time constants included."""
    named = dict(zip(call.kernel.arg_names, call.args, strict=False))
    named |= {name: value for name, value in call.kwargs.items() if name in call.kernel.arg_names}
    return [named[name] for name in call.kernel.arg_names]


def _runner(kernel, call: _Call, stand_ins: _StandIns) -> Callable:
    """``run(addresses, stream)`` of a compiled kernel, for addresses in the order of the launcher's tensors."""
    values = _bound(call)
    constants = tuple(value for value in values if stand_ins.position(value) is None)
    rest = iter(range(len(stand_ins.tensors), len(stand_ins.tensors) + len(constants)))
    order = [next(rest) if stand_ins.position(value) is None else stand_ins.position(value) for value in values]
    pick = operator.itemgetter(*order)
    described = [(i, value) for i, value in enumerate(values) if isinstance(value, stand_ins.descriptor)]
    run, function, metadata = kernel.run, kernel.function, kernel.packed_metadata
    x, y, z = (*call.grid, 1, 1)[:3]

    def launch(addresses: tuple, stream: int) -> None:
        run(x, y, z, stream, function, metadata, None, None, None, *pick(addresses + constants))

    def launch_described(addresses: tuple, stream: int) -> None:
        chosen = list(pick(addresses + constants))
        for i, descriptor in described:
            chosen[i] = _rebased(descriptor, _Address(chosen[i]))
        run(x, y, z, stream, function, metadata, None, None, None, *chosen)

    runner = launch_described if described else launch
    runner.kernel = kernel  # kept alive: a kernel nobody holds unloads its code
    return runner


def record(launcher: Callable, names: list[str], arguments: list, where: list[int]) -> Callable | None:
    """Launch through Triton, then return ``run(addresses, stream)`` for the next time, or None where there can be none.

    arguments: those of the launcher, by ``names``; ``where``: the positions of its tensors (a value there may be None).
    """
    stand_ins = _StandIns(arguments, where)
    rehearsal, allocations = _Rehearsal(launcher), _Allocations()
    calls = rehearsal.calls
    try:
        with allocations:
            rehearsal.launcher(**dict(zip(names, stand_ins.arguments, strict=True)))
        stand_ins.allocate(allocations.made, calls)
        known = all(stand_ins.knows(value) for call in calls for value in _bound(call))
        known = known and not any(callable(call.grid) or len(_bound(call)) < 2 for call in calls)
    except Exception:  # whatever the launcher cannot do with stand-ins, it does for real below
        known = False
    if not known:
        launcher(**dict(zip(names, arguments, strict=True)))
        return None
    runners = []
    for call in calls:
        real = [stand_ins.real(value) for value in call.args]
        named = {name: stand_ins.real(value) for name, value in call.kwargs.items()}
        compiled = call.kernel[call.grid](*real, **named)
        runners.append(None if compiled is None else _runner(compiled, call, stand_ins))
    if None in runners:
        return None
    if not runners:
        return _ignore
    if stand_ins.workspaces:
        return functools.partial(_with_workspaces, tuple(runners), tuple(stand_ins.workspaces), stand_ins.device)
    return runners[0] if len(runners) == 1 else functools.partial(_all, tuple(runners))


def _all(runners: tuple, addresses: tuple, stream: int) -> None:
    for run in runners:
        run(addresses, stream)


def _with_workspaces(runners: tuple, specs: tuple, device: torch.device, addresses: tuple, stream: int) -> None:
    # Freed on return: the allocator hands memory on in the order of the stream they were launched on.
    buffers = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in specs]
    _all(runners, addresses + tuple([t.data_ptr() for t in buffers]), stream)


class _Plans:
    """What is known of one launcher's launches, by key; `miss` is the way of the first time and of the unusual."""

    def __init__(self, launcher: Callable, names: list[str], where: list[int]):
        self.launcher, self.names, self.where = launcher, names, where
        self.plans: dict[tuple, Callable] = {}
        self.refused: set[tuple] = set()

    def straight(self, *arguments) -> None:
        self.launcher(**dict(zip(self.names, arguments, strict=True)))

    def miss(self, key: tuple, alignment: int, *arguments) -> None:
        if alignment or key in self.refused or not _possible() or _hooked():
            self.straight(*arguments)
            return
        plan = record(self.launcher, self.names, list(arguments), self.where)
        if len(self.plans) + len(self.refused) >= CAPACITY:
            self.plans.clear()
            self.refused.clear()
        if plan is None:
            self.refused.add(key)
        else:
            self.plans[key] = plan


def replayed(launcher: Callable, signature: str) -> Callable:
    """``launcher``, for CUDA tensors, repeated by replay.

    signature: its arguments in order, as in ``trusted.SIGNATURES``: ``name*`` a tensor, ``name?`` a tensor or None,
    ``name`` a hashable value. Besides: ``name@`` a tensor whose shape and dtype matter, ``name!`` anything, replayed
    only while it is None, and a ``|`` before arguments passed by keyword. What is launched must be a function of the
    values, of the dtype of the first tensor, of which tensors are None, and of shape and dtype of those marked.
    """
    fields = [(word.rstrip("*?@!"), word[-1] if word[-1] in "*?@!" else "") for word in signature.split()]
    given = [(name, kind) for name, kind in fields if name != "|"]
    names = [name for name, _ in given]
    tensors = [(name, kind) for name, kind in given if kind in ("*", "?", "@")]
    where = [i for i, (_, kind) in enumerate(given) if kind in ("*", "?", "@")]
    first = next(name for name, kind in given if kind in ("*", "@"))
    passed = ", ".join(names)
    key = ["device", f"{first}.dtype", *(name for name, kind in given if not kind)]
    key += [f"{name} is None" for name, kind in given if kind == "?"]
    key += [f"{name}.{what}" for name, kind in given if kind == "@" for what in ("shape", "dtype")]
    addresses = [
        f"{name}_at = {name}.data_ptr()" + (f" if {name} is not None else None" if kind == "?" else "")
        for name, kind in tensors
    ]
    bits = " | ".join(f"({name}_at or 0)" if kind == "?" else f"{name}_at" for name, kind in tensors)
    absent = [f"{name} is not None" for name, kind in given if kind == "!"]
    parameters = ", ".join("*" if name == "|" else name + "=None" * (kind in ("?", "!") and "|" in signature)
                           for name, kind in fields)  # fmt: skip
    lines = [
        f"def replay({parameters}):",
        f"    if {' or '.join(absent)}:\n        return straight({passed})" if absent else "    pass",
        f"    device = {first}.get_device()",
        "    if device != current():",
        f"        return elsewhere(device, again, {passed})",
        *(f"    {line}" for line in addresses),
        f"    key = ({', '.join(key)},)",
        f"    alignment = ({bits}) & 15",
        "    plan = plans.get(key)",
        "    if plan is None or alignment or hooked():",
        f"        return miss(key, alignment, {passed})",
        f"    plan(({', '.join(f'{name}_at' for name, _ in tensors)},), stream(device))",
    ]
    known = _Plans(launcher, names, where)

    def again(*arguments):
        function(**dict(zip(names, arguments, strict=True)))

    scope = {"plans": known.plans, "miss": known.miss, "straight": known.straight, "again": again, "hooked": _hooked}
    scope |= {"current": current_device, "stream": current_stream, "elsewhere": elsewhere}
    function = define("replay", "\n".join(line for line in lines if line != "    pass") + "\n", scope)
    function.__name__ = function.__qualname__ = launcher.__name__
    return function
