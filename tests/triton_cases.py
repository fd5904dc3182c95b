"""The Triton kernels on Triton's CPU interpreter; test_triton_interpret.py runs this file with TRITON_INTERPRET=1.

Launch-level only, in float32 and float16: the interpreter truncates bfloat16 where a GPU rounds to nearest even.
The sizes sit around the tiles of triton_kernels/configs.py: channels below, at and beyond a block of 64, rows below
and beyond a block, more row tiles than rows.
"""

from __future__ import annotations

import kernel_cases
import pytest
import torch
from fastres.triton_kernels import configs, stem
from kernel_cases import NAMES

from fastres import dispatch, testing
from fastres.backends import native, reference
from fastres.backends import triton as launch

DTYPES = (torch.float32, torch.float16)
SIZES = ((1, 300), (3, 1), (7, 70), (8, 517), (20, 131), (64, 67), (136, 33))  # (C, M)
HALF_SIZES = ((3, 300), (8, 1), (64, 67))
STEM_CHANNELS = (3, 8)

per_function = pytest.mark.parametrize("function", native.FUNCTIONS)
per_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)


def sizes(function: str, dtype: torch.dtype):
    """The interpreter takes a millisecond a program: what float32 has shown need not be shown again in float16."""
    if function.startswith("stem"):
        return tuple((C, 0) for C in STEM_CHANNELS)
    return SIZES if dtype == torch.float32 else HALF_SIZES


@per_dtype
@per_function
def test_values_and_repeats(function, dtype):
    """Poisoned outputs, guard zones, every variant and legal alias; within the error budget; bit-equal twice."""
    for i, (C, M) in enumerate(sizes(function, dtype)):
        kind = "huge_mean" if i % 3 == 1 else "normal"
        place = testing.misaligned if i % 2 else torch.clone
        for case in kernel_cases.cases(function, dtype, C, M, kind, 3, seed=i):
            ours = kernel_cases.run(case, launch, place)
            kernel_cases.judge(case, launch, ours)
            again = kernel_cases.run(case, launch) if i % 3 == 0 else {}
            for name, got in again.items():
                verdict = testing.exactly(got, ours[name], f"{case}: {name} of a second run")
                assert verdict, verdict.message


@per_function
def test_integers_are_exact(function):
    for case in kernel_cases.cases(function, torch.float16, 24, 64, "integers", 4):
        for name, got in kernel_cases.run(case, launch).items():
            verdict = testing.exactly(got, kernel_cases.truth(case)[name].to(got.dtype), f"{case}: {name}")
            assert verdict, verdict.message


@per_dtype
def test_no_rows(dtype):
    """Nothing is written where there are no rows; sums over none are zero."""

    def empty(kind=dtype):
        return torch.empty(0, 20, dtype=kind)

    none, mask, vectors = empty(), torch.empty(0, 3, dtype=torch.uint8), torch.rand(5, 20)
    part = torch.full((3, 4, 20), float("nan"))
    launch.add_relu_fwd(none, empty(), 0, empty(), torch.empty(0, dtype=torch.uint8))
    launch.add_relu_bwd(none, torch.empty(0, dtype=torch.uint8), 0, empty())
    launch.bn_apply(none, 0, 20, vectors, empty(), vectors, True, empty(), mask)
    launch.bn_bwd_apply(none, none, 0, 20, vectors, vectors[:3], None, None, None, None, True, empty(), None)
    launch.bias_act(none, 0, 20, vectors[0], None, True, empty())
    launch.mask_add(none, empty(), mask, 0, 20, empty())
    launch.bn_stats(none, 0, 20, 4, part)
    assert torch.equal(part, torch.zeros_like(part))
    part = torch.full((2, 4, 20), float("nan"))
    launch.bn_bwd_reduce(none, none, 0, 20, vectors, None, None, None, True, 4, part, None)
    assert torch.equal(part, torch.zeros_like(part))
    image, pooled = torch.empty(0, 8, 8, 20, dtype=dtype), torch.empty(0, 4, 4, 20, dtype=dtype)
    taps, window = pooled.to(torch.uint8), (4, 4, 3, 2, 1)
    launch.stem_fwd(image, 0, 8, 8, 20, vectors, *window, pooled, taps)
    launch.stem_bwd_apply(pooled, taps, image, 0, 8, 8, 20, vectors, vectors[:3], *window, image.clone())
    part.fill_(float("nan"))
    launch.stem_bwd_reduce(pooled, taps, image, 0, 8, 8, 20, vectors, *window, 4, part)
    assert torch.equal(part, torch.zeros_like(part))


def _identity_stat(C: int) -> torch.Tensor:
    return torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0])[:, None].repeat(1, C)


@per_dtype
def test_nan_and_infinity_pass_as_in_pytorch(dtype):
    values = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 0.0, 2.0, -2.0, 1.0], dtype=dtype)
    x, out, mask = values.repeat(3, 1), torch.empty(3, 8, dtype=dtype), torch.empty(3, 1, dtype=torch.uint8)
    launch.bn_apply(x, 3, 8, _identity_stat(8), None, None, True, out, mask)
    assert torch.equal(out.nan_to_num(nan=-1), torch.relu(x).nan_to_num(nan=-1))
    assert mask.flatten().tolist() == [0b10100011] * 3
    g, dx, zeros = torch.ones_like(x), torch.empty_like(x), torch.zeros_like(x)
    stat, coef = _identity_stat(8), _identity_stat(8)[[1, 0, 0]]
    launch.bn_bwd_apply(g, zeros, 3, 8, stat, coef, None, None, None, mask, True, dx, None)
    assert torch.equal(dx[0], torch.tensor([1.0, 1, 0, 0, 0, 1, 0, 1], dtype=dtype))


@per_dtype
def test_pooling_takes_the_first_nan_then_the_first_maximum(dtype):
    nan, inf = float("nan"), float("inf")
    windows = torch.tensor(
        [[1.0, nan, 3, nan], [2, 5, 5, 1], [-inf, -inf, -inf, -inf], [-1, -2, -3, 0], [inf, nan, 0, 0]], dtype=dtype
    )
    x = windows.reshape(5, 2, 2, 1)
    out, taps = torch.empty(5, 1, 1, 1, dtype=dtype), torch.empty(5, 1, 1, 1, dtype=torch.uint8)
    launch.stem_fwd(x, 5, 2, 2, 1, _identity_stat(1), 1, 1, 2, 2, 0, out, taps)
    assert taps.flatten().tolist() == [1, 1, 255, 255, 1]
    assert out.flatten().nan_to_num(nan=-1).tolist() == [-1, 5, 0, 0, -1]


@pytest.mark.parametrize("rows", (40, 700))
def test_statistics_with_a_misleading_pilot(rows):
    """The rows that set the shift are unlike all others; constant channels have no variance."""
    x = 1e4 + torch.randn(rows, 8, generator=testing.generator(1))
    x[:16] = -3.0
    x[:, 7] = 12345.678
    part = torch.empty(3, 1, 8)
    launch.bn_stats(x, rows, 8, 1, part)
    truth = torch.empty(3, 1, 8, dtype=torch.float64)
    reference.bn_stats(x.double(), rows, 8, 1, truth)
    torch.testing.assert_close(part[1].double(), truth[1], rtol=2e-7, atol=0)
    torch.testing.assert_close(part[2, :, :7].double(), truth[2, :, :7], rtol=1e-5, atol=0)
    assert 0 <= part[2, 0, 7] <= rows * (12345.678 * 2**-23) ** 2


def test_int64_pixel_numbers_give_the_same_bits(monkeypatch):
    """The variant for 2**31 pixels and more, on an image that fits this machine."""
    cases = [c for f in native.FUNCTIONS[-3:] for c in kernel_cases.cases(f, torch.float32, 8, 0, "normal", 5)]
    narrow = [kernel_cases.run(case, launch) for case in cases]
    geometry = stem._geometry
    used = []
    monkeypatch.setattr(stem, "_geometry", lambda *a: used.append(geometry(*a)) or {**used[-1], "WIDE": True})
    for case, before in zip(cases, narrow, strict=True):
        for name, got in kernel_cases.run(case, launch).items():
            verdict = testing.exactly(got, before[name], f"{case}: {name} with int64 pixel numbers")
            assert verdict, verdict.message
    assert len(used) == len(cases) and not any(g["WIDE"] for g in used)
    assert geometry(32, 8192, 8192, 1, 4096, 4096, 3, 2, 1, 16)["WIDE"]


def test_refusals_name_the_reason():
    def reasons(device, dtype):
        return "; ".join(launch.why_not(dispatch.Request("add_relu", torch.device(device), dtype, 8)))

    assert reasons("cpu", torch.float32) == ""
    assert "float64" in reasons("cpu", torch.float64)
    assert "truncates bfloat16" in reasons("cpu", torch.bfloat16)
    assert "TRITON_INTERPRET=1 is set" in reasons("cuda", torch.float32)
    assert "meta" in reasons("meta", torch.float32)
    x = torch.zeros(4, 8, dtype=torch.float64)
    with pytest.raises(
        TypeError, match="bn_stats: x must be float32, bfloat16 or float16 for Triton, got torch.float64"
    ):
        launch.bn_stats(x, 4, 8, 1, torch.zeros(3, 1, 8, dtype=torch.float64))
    out = torch.full((4, 8), 7.0)
    with pytest.raises(ValueError, match="bias_act: out must not overlap residual"):
        launch.bias_act(out.clone(), 4, 8, None, out, True, out)
    assert torch.equal(out, torch.full((4, 8), 7.0))


def test_tiles_and_configurations():
    for row in configs.TABLE:
        assert row.reason
        if not row.kernel.endswith(("finalize", "fold")):  # the merges have one tile for every C
            for C in (1, 3, 8, 24, 64, 100, 2048):
                tile = configs.pick(row.kernel, row.itemsize, C)
                assert 8 <= tile.BC < 2 * max(C, 8) and tile.elements >= 8, f"C = {C}: {tile}"
    assert launch.tiles(0, 64) == 1
    for M, C in ((1, 1), (65, 64), (50176, 256), (802816, 64), (12544, 2048)):
        T = launch.tiles(M, C)
        assert 1 <= T <= configs.REDUCTION_PROGRAMS and T <= -(-M // configs.REDUCTION_MIN_ROWS)


def test_the_interpreter_is_on():
    assert launch.interpreting() and not launch.why_not(kernel_cases.request())
