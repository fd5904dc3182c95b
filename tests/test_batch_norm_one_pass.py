"""Batch normalisation in one cooperative launch, on the emulator: the kernels, when they are chosen, and the ops.

The separate launches are held against the reference in ``test_batch_norm_act.py``; with the same tiles one launch must
give the same bits.
"""

from __future__ import annotations

import dataclasses
import itertools

import kernel_cases
import public_cases
import pytest
import torch
from test_batch_norm_act import make, rows

import fastres
from fastres import dispatch, testing, verify
from fastres.backends import one_pass
from fastres.ops.batch_norm_act import batch_norm_act_ref

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
H100 = one_pass.Chip("H100", 132, 227 * 1024, 228 * 1024)
L4 = one_pass.Chip("L4", 58, 99 * 1024, 100 * 1024)
#: (C, M): odd channels, one row, two channel blocks, several tiles with rows left over.
MATRICES = ((1, 131), (7, 67), (20, 5), (64, 601), (264, 37))


def cases(function, dtype, C, M, T, kind):
    """The cases of ``verify`` on values of ``kind``, with optional arguments left out in turn."""
    torch.manual_seed(C + M)
    for label, args, outputs in verify._cases(function, CPU, dtype, C, M, T):
        args = {**args, "x": testing.fill((M, C), dtype, kind, 7)}
        yield label, args, outputs
        if "weight" in args:
            yield f"{label}, bare", {**args, "weight": None, "bias": None, "relu": False}, {**outputs, "mask": None}
        else:
            yield f"{label}, given statistics", {**args, "batch_stats": False}, {**outputs, "dweight": None}
            yield f"{label}, no ReLU", {**args, "relu": False, "mask": None}, {**outputs, "dbias": None}


def separately(kernels, function, args, outputs):
    """The launches that one replaces."""
    a = {**args, **outputs}
    shape = (a["x"], a["M"], a["C"])
    if function == "bn_one_pass_fwd":
        kernels.bn_stats(*shape, a["T"], a["part"])
        kernels.bn_finalize(a["part"], a["T"], a["C"], a["weight"], a["bias"], a["eps"], a["stat"])
        kernels.bn_apply(*shape, a["stat"], a["residual"], a["rstat"], a["relu"], a["out"], a["mask"])
    else:
        mask, relu = a["mask"], a["relu"]
        kernels.bn_bwd_reduce(a["grad"], *shape, a["stat"], None, None, mask, relu, a["T"], a["part"], a.get("y"))
        kernels.bn_bwd_finalize(a["part"], 1, a["T"], a["M"], a["C"], a["stat"], a["batch_stats"], a["dweight"],
                                a["dbias"], a["coef"])  # fmt: skip
        kernels.bn_bwd_apply(a["grad"], *shape, a["stat"], a["coef"], None, None, None, mask, relu, a["dx"],
                             a.get("dres"))  # fmt: skip


def poisoned(outputs):
    return {k: None if v is None else verify._poisoned(v) for k, v in outputs.items()}


@pytest.mark.parametrize("kind", ["normal", "huge_mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=kernel_cases.NAMES.get)
@pytest.mark.parametrize("function", dispatch.ONE_PASS)
def test_same_bits_as_the_separate_launches(emulator, function, dtype, kind):
    """Several blocks, shuffled; outputs start as NaN inside guard zones; every other case off any vector boundary."""
    for i, (C, M) in enumerate(MATRICES):
        T = emulator.one_pass_tiles(torch.empty(0, dtype=dtype), M, C, 2)
        assert T >= 1
        place = testing.misaligned if i % 2 else torch.clone
        for label, args, outputs in cases(function, dtype, C, M, T, kind):
            emulator.set_seed(i)
            case = kernel_cases.Case(function, label, args, outputs, M)
            ours, theirs = kernel_cases.run(case, emulator, place), poisoned(outputs)
            separately(emulator, function, args, theirs)
            for name, got in ours.items():
                same = torch.equal(got.view(torch.uint8), theirs[name].view(torch.uint8))
                assert same, f"{case} {M} x {C}, {T} tiles: {name}"


@pytest.mark.parametrize("function", dispatch.ONE_PASS)
def test_against_the_reference(emulator, function):
    for dtype, (C, M) in itertools.product(DTYPES, ((20, 1031), (300, 67))):
        wrong = verify.check(function, emulator, CPU, dtype, C, M)
        assert not wrong, f"{dtype} {M} x {C}: {wrong}"


@pytest.mark.parametrize("function", dispatch.ONE_PASS)
def test_order_of_blocks_and_threads_does_not_matter(emulator, function):
    for label, args, outputs in verify._cases(function, CPU, torch.bfloat16, 264, 67, 2):
        runs = []
        for seed in (0, 1, 2, 41):
            emulator.set_seed(seed)
            runs.append(poisoned(outputs))
            getattr(emulator, function)(**args, **runs[-1])
        for again, name in itertools.product(runs[1:], outputs):
            assert torch.equal(again[name].view(torch.uint8), runs[0][name].view(torch.uint8)), f"{label}: {name}"


def test_in_place(emulator):
    torch.manual_seed(0)
    M, C, T = 131, 20, 2
    _, args, outputs = verify._cases("bn_one_pass_fwd", CPU, torch.float32, C, M, T)[0]
    expected = poisoned(outputs)
    emulator.bn_one_pass_fwd(**args, **expected)
    x = args["x"].clone()
    emulator.bn_one_pass_fwd(**{**args, "x": x}, **{**poisoned(outputs), "out": x})
    assert torch.equal(x, expected["out"])
    _, args, outputs = verify._cases("bn_one_pass_bwd", CPU, torch.float32, C, M, T)[0]
    expected = poisoned(outputs)
    emulator.bn_one_pass_bwd(**args, **expected)
    grad = args["grad"].clone()
    emulator.bn_one_pass_bwd(**{**args, "grad": grad}, **{**poisoned(outputs), "dx": grad})
    assert torch.equal(grad, expected["dx"])


# ---- when


def test_a_grid_that_is_too_large_is_refused(emulator):
    """What `tiles` never asks for: nine blocks where eight fit, and five that keep more than half of the memory."""
    _, args, outputs = verify._cases("bn_one_pass_fwd", CPU, torch.float32, 8, 99, 9)[0]
    with pytest.raises(RuntimeError, match="too many blocks for a cooperative launch, at most 2 on each of 4"):
        emulator.bn_one_pass_fwd(**args, **outputs)
    rows_of_thread = emulator.chip(CPU).store // (256 * 8 * 4) + 1
    _, args, outputs = verify._cases("bn_one_pass_fwd", CPU, torch.float32, 8, 5 * 256 * rows_of_thread, 5)[0]
    with pytest.raises(RuntimeError, match="too many blocks for a cooperative launch, at most 1 on each of 4"):
        emulator.bn_one_pass_fwd(**args, **outputs)


@pytest.mark.parametrize("name", ["sm_80", "sm_89", "sm_90a", "sm_100"])
@pytest.mark.parametrize("tensors", [1, 2])
def test_the_largest_that_fits_runs(emulator, name, tensors):
    """`tiles` counts as the launch does, static memory included: a full chip is not refused, one row more has no T."""
    emulator.module.set_chip(name, 1)
    chip, C = emulator.chip(CPU), 8
    rows_of_thread = chip.store // (tensors * 256 * 8 * 4)
    M = 2 * 256 * rows_of_thread
    x = testing.fill((M, C), torch.float32, "normal", 1)
    assert emulator.why_not_one_pass(CPU, x.dtype, M, C, tensors) == [] and rows_of_thread >= 1
    T = emulator.one_pass_tiles(x, M, C, tensors)
    assert T == 2 and emulator.one_pass_tiles(x, M + 1, C, tensors) == 0
    (reason,) = emulator.why_not_one_pass(CPU, x.dtype, M + 1, C, tensors)
    assert f"{tensors} x {M + 1} x {C} elements do not fit on chip: {name} keeps at most" in reason
    function = dispatch.ONE_PASS[tensors - 1]
    _, args, outputs = verify._cases(function, CPU, torch.float32, C, M, T)[0]
    getattr(emulator, function)(**args, **outputs)


def test_static_shared_memory_is_what_nvcc_counts():
    from fastres.codegen import cuda

    lines = [line for line in cuda.PATH.read_text().splitlines() if line.startswith("| bn_one_pass")]
    assert len(lines) == 4 * 30
    # From sm_90 on the listing counts what the system keeps as well.
    assert {int(line.split("|")[4]) for line in lines} == {one_pass._STATIC, one_pass._STATIC + one_pass._RESERVED}


@pytest.mark.parametrize(
    ("chip", "C", "tensors", "images"),
    [(H100, 64, 1, 64), (H100, 256, 1, 16), (H100, 256, 2, 8), (L4, 64, 1, 9)],
)
def test_batch_sizes_of_stage_one(chip, C, tensors, images):
    """Images of 56 x 56 in 16 bit that fit."""
    fits = [n for n in range(1, 256) if one_pass.tiles(n * 3136, C, 2, tensors, chip)]
    assert fits == list(range(1, images + 1))


def test_tiles_cover_what_they_should():
    for M, C, tensors in itertools.product((1, 49, 1031, 25088, 100352), (1, 8, 64, 250, 2048), (1, 2)):
        for itemsize in (2, 4):
            T = one_pass.tiles(M, C, itemsize, tensors, H100)
            channel_blocks = -(-C // 256)
            assert 0 <= T * channel_blocks <= 2 * 132
    assert one_pass.tiles(0, 64, 2, 1, H100) == one_pass.tiles(64, 0, 2, 1, H100) == 0
    small = dataclasses.replace(H100, multiprocessors=1)
    assert one_pass.tiles(64, 2048, 2, 1, small) == 0, "eight channel blocks, two places"


def test_why_not_under_torch_distributed(emulator, monkeypatch):
    assert emulator.why_not_one_pass(CPU, torch.float32, 64, 64, 1) == []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    (reason,) = emulator.why_not_one_pass(CPU, torch.float32, 64, 64, 1)
    assert "torch.distributed is initialised" in reason


def test_only_proven_kernels_serve_the_automatic_choice(emulator, monkeypatch):
    x = torch.empty(64, 64)
    monkeypatch.delenv("FASTRES_ONE_PASS", raising=False)
    assert dispatch.one_pass_tiles(emulator, "batch_norm_act", x, 64, 64, 1, "") == 0, "not without being asked for"
    monkeypatch.setenv("FASTRES_ONE_PASS", "1")
    seen = []
    dispatch._one_pass_is_right.cache_clear()
    monkeypatch.setattr(verify, "failure", lambda request, name, k, functions: seen.append(functions) or "off by one")
    with pytest.warns(RuntimeWarning, match="one launch is switched off for batch_norm_act.* on emulator: off by one"):
        assert dispatch.one_pass_tiles(emulator, "batch_norm_act", x, 64, 64, 1, "") == 0
    assert dispatch.one_pass_tiles(emulator, "batch_norm_act", x, 64, 64, 1, "") == 0 and seen == [dispatch.ONE_PASS]
    assert dispatch.one_pass_tiles(emulator, "batch_norm_act", x, 64, 64, 1, "emulator") > 0, "forced: not verified"
    dispatch._one_pass_is_right.cache_clear()

    def capturing(*_):
        raise verify.NotVerifiedYet("a graph is being captured")

    monkeypatch.setattr(verify, "failure", capturing)
    with pytest.warns(RuntimeWarning, match="in several launches: a graph is being captured"):
        assert dispatch.one_pass_tiles(emulator, "batch_norm_act", x, 64, 64, 1, "") == 0
    monkeypatch.setattr(verify, "failure", lambda *_: "")
    assert dispatch.one_pass_tiles(emulator, "batch_norm_act", x, 64, 64, 1, "") > 0, "captures are not remembered"
    dispatch._one_pass_is_right.cache_clear()
    cpu = dispatch.load("cpu")
    assert dispatch.one_pass_tiles(cpu, "batch_norm_act", x, 64, 64, 1, "cpu") == 0


# ---- through the ops


@pytest.fixture
def launched(emulator, monkeypatch):
    """Names of the launch functions that the ops call on the emulator, in order."""
    names = []
    trusted = emulator.trusted
    for name, function in list(vars(trusted).items()):
        if name.startswith("bn_"):
            monkeypatch.setitem(
                trusted.__dict__, name, lambda *a, n=name, f=function, **k: (names.append(n), f(*a, **k))[1]
            )
    with fastres.backend("emulator"):
        yield names


@pytest.mark.parametrize("form", ["plain", "residual", "two BNs"])
@pytest.mark.parametrize("dtype", DTYPES, ids=kernel_cases.NAMES.get)
def test_op(launched, form, dtype):
    public_cases.compare(fastres.batch_norm_act, batch_norm_act_ref, make(form, dtype), terms=rows())
    assert "bn_one_pass_fwd" in launched and "bn_apply" not in launched
    assert ("bn_one_pass_bwd" in launched) == (form != "two BNs")


def test_op_with_given_statistics(launched):
    public_cases.compare(fastres.batch_norm_act, batch_norm_act_ref, make(training=False), terms=rows())
    assert not {"bn_one_pass_fwd", "bn_one_pass_bwd"} & set(launched)


def test_op_that_does_not_fit(launched, emulator):
    emulator.module.set_chip("sm_89", 1)
    args = make("residual", shape=(2, 64, 24, 24))
    public_cases.compare(fastres.batch_norm_act, batch_norm_act_ref, args, terms=rows((2, 64, 24, 24)))
    assert launched and not any("one_pass" in name for name in launched)


def test_block(launched):
    """Every BN of an identity block takes one launch each way."""
    convs = [testing.make_conv(16, 16, k, seed=i) for i, k in enumerate((1, 3, 1))]
    x = testing.fill((2, 16, 6, 6), torch.float32).requires_grad_()
    fastres.bottleneck(x, convs).sum().backward()
    assert launched == ["bn_one_pass_fwd"] * 3 + ["bn_one_pass_bwd"] * 3
