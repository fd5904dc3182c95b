"""The first nodes of a segment, some images at a time: the bits of all at once."""

import pytest
import torch
import torchvision
from torchvision.models.resnet import BasicBlock, Bottleneck

import fastres
from fastres.backends import cpu
from fastres.inference import adapters, cpu_executor
from fastres.inference.cpu_program import ALL_AT_ONCE, Turns
from fastres.inference.cpu_weights import DIRECT, Choice
from fastres.inference.plan import Segment

pytestmark = pytest.mark.skipif(cpu._module is None, reason=f"fastres._cpu is not built: {cpu._missing}")


def network(block, **options):
    torch.manual_seed(0)
    return torchvision.models.ResNet(block, [2, 1, 1, 1], num_classes=7, **options).eval()


def segment(model, first=0, dtype=torch.float32):
    nodes = adapters.gather(adapters.expand("", model), torch.float32)
    return cpu_executor.CpuSegment(Segment(tuple(nodes[first:])), dtype, "highest")


def run(of, x, turns):
    built = of._build(tuple(x.shape), lambda packed: Choice(DIRECT), turns)
    y = torch.full(built.out_shape, float("nan"), dtype=of.dtype)
    built.program.run(x.data_ptr(), y.data_ptr(), torch.get_num_threads())
    return y, built


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("block", "options"),
    [(BasicBlock, {}), (Bottleneck, {"groups": 4, "width_per_group": 16})],
    ids=["basic", "groups"],
)
def test_every_split_of_a_network(block, options, dtype):
    of = segment(network(block, **options), dtype=dtype)
    x = torch.randn(6, 3, 43, 37).to(dtype).contiguous(memory_format=torch.channels_last)
    expected, whole = run(of, x, ALL_AT_ONCE)
    assert expected.isfinite().all() and expected.std() > 0
    for nodes in range(1, len(of.segment.nodes) + 1):
        for images in (1, 2, 3):
            got, built = run(of, x, Turns(nodes, images))
            assert torch.equal(got, expected), (nodes, images)
            # Behind three nodes the second stage needs as much as the first would.
            assert nodes < 4 or built.program.arena_bytes < whole.program.arena_bytes
            times = built.program.timed(x.data_ptr(), got.data_ptr(), torch.get_num_threads())
            assert len(times) == len(built.nodes) and all(t > 0 for t in times)


def test_a_segment_of_one_block_that_reads_the_input_and_writes_the_output():
    of = segment(network(BasicBlock), first=1)
    of = cpu_executor.CpuSegment(Segment(of.segment.nodes[:1]), torch.float32, "highest")
    x = torch.randn(4, 64, 9, 8).contiguous(memory_format=torch.channels_last)
    assert torch.equal(run(of, x, Turns(1, 2))[0], run(of, x, ALL_AT_ONCE)[0])


@pytest.mark.parametrize("images", [1, 2])
def test_turns_are_taken_where_they_were_faster(monkeypatch, images):
    """Another batch of about the size takes them where it comes out even."""
    chosen = Turns(3, images)
    monkeypatch.setattr(cpu_executor.CpuSegment, "_best_turns", lambda self, shape, pick: chosen)
    x = torch.randn(7, 3, 40, 40)
    session = fastres.optimize(network(BasicBlock), (x[:4],), executor="cpu")
    (assignment,) = next(session.runner.leaves()).assignments
    note = f"{images} of the images at a time"
    for batch, taken in ((4, True), (6, True), (7, images == 1), (1, False)):
        with torch.no_grad():
            y = session(x[:batch])
        assert y.shape == (batch, 7)
        kernels = assignment.prepared.kernels((batch, 3, 40, 40))
        assert [note in k.note for k in kernels] == [taken and at < 3 for at in range(len(kernels))], batch


def test_turns_are_measured_where_every_convolution_has_one_kernel(monkeypatch):
    asked = []
    monkeypatch.setattr(
        cpu_executor.CpuSegment, "_best_turns", lambda self, shape, pick: asked.append(shape) or ALL_AT_ONCE
    )
    of = cpu_executor.CpuSegment(segment(network(BasicBlock)).segment, torch.float32, "exact")
    of.run(torch.randn(4, 3, 40, 40))
    assert asked == [(4, 3, 40, 40)]


def test_the_measured_choice_is_turns_or_none():
    of = segment(network(BasicBlock))
    assert of._best_turns((1, 3, 40, 40), lambda packed: Choice(DIRECT)) == ALL_AT_ONCE
    found = of._best_turns((4, 3, 40, 40), lambda packed: Choice(DIRECT))
    assert found == ALL_AT_ONCE or (0 < found.nodes <= len(of.segment.nodes) and found.images in (1, 2))
