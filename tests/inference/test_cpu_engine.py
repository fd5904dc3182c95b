"""The CPU executor's promises on whole networks: every instruction set, batch, odd size, number of threads, callers at
once, and no memory kept.

FASTRES_FULL=1: ten thousand calls in the test of memory.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from session_cases import alternating, distance, narrow, pixels, truth

import fastres
from fastres.backends import cpu, cpu_conv
from fastres.inference import InferenceSession
from fastres.inference.cpu_executor import CpuSegment

pytestmark = pytest.mark.skipif(cpu._module is None, reason=f"fastres._cpu is not built: {cpu._missing}")
ISAS = cpu.available_isas() if cpu._module is not None else []
NETWORKS = {
    "basic": dict(kind="basic", planes=(32, 48)),
    "bottleneck": dict(kind="bottleneck", planes=(16, 32)),
    "resnext": dict(kind="bottleneck", planes=(32, 64), groups=8, width=16),
    "wide": dict(kind="bottleneck", planes=(16, 24), width=128),
}
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def served(monkeypatch):
    """Everything the kernels can compute is theirs, whether or not it is faster with this instruction set, and every
    kernel that can serve a convolution serves some."""
    monkeypatch.setattr(cpu_conv, "wins", lambda kind, x, w, g: not cpu_conv.why_not(x, w, g))
    monkeypatch.setattr(CpuSegment, "_measured", alternating)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def session_of(name: str, x=None, dtype=torch.float32, precision="highest") -> tuple[torch.nn.Module, InferenceSession]:
    model = narrow(**NETWORKS[name])
    x = pixels() if x is None else x
    return model, fastres.optimize(model, x, dtype, precision, executor="cpu")


@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks_at_odd_sizes(isa, name):
    model, session = session_of(name)
    for x in (pixels(1, 193, 257), pixels(2, 65, 40, seed=2)):
        assert distance(session(x), truth(model, x)) <= LIMIT[torch.float32]
    kernels = [row for row in session.report(measure=False).rows if row.executor == "cpu"]
    assert len(kernels) == len(list(session.plan.nodes())) and {row.isa for row in kernels} == {isa}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(isa, dtype):
    for name, x in (("basic", pixels(1, 193, 257)), ("resnext", pixels(1, 65, 71))):
        model, session = session_of(name, dtype=dtype)
        assert distance(session(x), truth(model, x)) <= LIMIT[dtype]


def test_batches_of_1_to_9(isa):
    model, session = session_of("basic")
    x = pixels(9, 39, 53)
    expected = truth(model, x)
    for batch in range(1, 10):
        assert distance(session(x[:batch]), expected[:batch]) <= LIMIT[torch.float32], batch


def test_an_instruction_set_may_change_between_calls():
    model, session = session_of("basic")
    x, before = pixels(2, 47, 33), cpu.isa()
    expected, seen = truth(model, x), {}
    try:
        for isa in (*ISAS, *ISAS):
            cpu.set_isa(isa)
            y = session(x)
            assert distance(y, expected) <= LIMIT[torch.float32], isa
            assert torch.equal(seen.setdefault(isa, y), y), f"{isa}: other bits the second time"
    finally:
        cpu.set_isa(before)


@pytest.mark.parametrize("name", ["basic", "resnext"])
def test_threads_may_change_between_calls(threads, name):
    """With nothing to choose by the clock, the number of threads does not change a bit."""
    model, exact = session_of(name, precision="exact")
    _, fast = session_of(name)
    x = pixels(3, 45, 61)
    expected, one = truth(model, x), exact(x)
    for count in (1, 2, 3, 2, 1, 3):
        threads(count)
        assert torch.equal(exact(x), one), f"{count} threads"
        first = fast(x)
        assert distance(first, expected) <= LIMIT[torch.float32] and torch.equal(fast(x), first)


def at_once(*calls: Callable[[], None]) -> None:
    """Every call in a thread of its own, started together; what one of them raises is raised here."""
    gate, raised = threading.Barrier(len(calls)), []

    def guarded(call):
        gate.wait()
        try:
            call()
        except BaseException as error:
            raised.append(error)

    running = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for t in running:
        t.start()
    for t in running:
        t.join()
    if raised:
        raise raised[0]


def repeat(session: InferenceSession, inputs: list, expected: list, offset: int) -> Callable[[], None]:
    def call():
        for i in range(3 * len(inputs)):
            at = (i + offset) % len(inputs)
            assert torch.equal(session(inputs[at]), expected[at]), f"input {at} of thread {offset}"

    return call


@pytest.mark.parametrize("count", [1, 2])
def test_two_sessions_at_once(threads, count):
    threads(count)
    jobs = []
    for name, dtype in (("basic", torch.float32), ("resnext", torch.bfloat16)):
        _, session = session_of(name, dtype=dtype)
        inputs = [pixels(1 + i % 3, 33 + 5 * i, 60 - 3 * i, seed=i) for i in range(5)]
        jobs.append(repeat(session, inputs, [session(x) for x in inputs], len(jobs)))
    at_once(*jobs)


@pytest.mark.parametrize("count", [1, 2])
def test_one_session_from_several_threads_at_once(threads, count, tmp_path):
    """Shapes that none of them has called before, so that they meet while programs are built and weights are packed.

    The second session has the first one's kernels (a saved session keeps them), so that both give the same bits.
    """
    threads(count)
    _, session = session_of("basic")
    inputs = [pixels(1 + i % 3, 33 + 5 * i, 60 - 3 * i, seed=i) for i in range(8)]
    expected = [session(x) for x in inputs]
    fresh = fastres.load(session.save(tmp_path / "s"), executor="cpu")
    at_once(*(repeat(fresh, inputs, expected, offset) for offset in (0, 3, 5)))


def test_memory_does_not_grow():
    """More shapes than a segment remembers, so that programs come and go. A call that kept 4 KiB would show."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("this system does not tell a process its memory (/proc/self/statm)")
    model = narrow(planes=(32,))
    session = fastres.optimize(model, pixels(1, 24, 24), executor="cpu")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    inputs = [pixels(1 + i % 2, 16 + i % 7, 16 + i % 5, seed=i) for i in range(70)]
    for x in [*inputs, *inputs]:
        session(x)
    expected = [session(x) for x in inputs]
    calls = 10_000 if os.environ.get("FASTRES_FULL") == "1" else 1_000
    before, pool = resident(), cpu.memory_info()
    for i in range(calls):
        session(inputs[i % len(inputs)])
    grown = resident() - before
    print(f"{grown / 2**10:.0f} KiB more after {calls} calls")
    assert grown < calls * 2**12, f"{grown / 2**20:.1f} MiB more after {calls} calls"
    assert cpu.memory_info() == pool
    assert all(torch.equal(session(x), y) for x, y in zip(inputs, expected, strict=True))
