"""The launch-level tests that every op file runs on its own launch functions."""

from __future__ import annotations

import kernel_cases
import pytest
import torch
from kernel_cases import DTYPES, NAMES, Kernels

from fastres import testing
from fastres.backends import reference


def parametrize(*functions: str):
    """Each launch function in each dtype."""

    def decorate(test):
        test = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)(test)
        return pytest.mark.parametrize("function", functions)(test)

    return decorate


def check_values(k: Kernels, function: str, dtype: torch.dtype) -> None:
    """All variants over odd sizes, normal and huge-mean inputs, fewer and more tiles than rows; outputs start as NaN
    and everything is off by one element from any vector boundary in every other case."""
    for i, (C, M) in enumerate(kernel_cases.matrices(k, function)):
        place = testing.misaligned if i % 2 else torch.clone
        for kind, T in (("normal", reference.tiles(M, C)), ("huge_mean", 7)):
            # Without rows there is nothing to average; the ops never ask for it.
            if (M == 0 and function in ("bn_finalize", "bn_bwd_finalize")) or (kind == "huge_mean" and i % 3):
                continue
            for case in kernel_cases.cases(function, dtype, C, M, kind, T, seed=i):
                kernel_cases.judge(case, k.launch, kernel_cases.run(case, k.launch, place))


def check_exact(k: Kernels, function: str, dtype: torch.dtype) -> None:
    """Integer inputs leave nothing to round: equal to the last bit, masks and taps included; twice the same."""
    for C, M in ((7, 64), (64, 16)):
        for case in kernel_cases.cases(function, dtype, C, M, "integers", 4):
            expected = kernel_cases.truth(case)
            ours = kernel_cases.run(case, k.launch)
            for name, got in ours.items():
                verdict = testing.exactly(got, expected[name].to(got.dtype), f"{case}: {name}")
                assert verdict, verdict.message


def check_repeats(k: Kernels, function: str, dtype: torch.dtype) -> None:
    """Bit-equal on a second run and, on the CPU, with another number of threads."""
    C, M = (20, 67) if k.slow else (24, 1031)
    for case in kernel_cases.cases(function, dtype, C, M, "normal", 5):
        runs = [kernel_cases.run(case, k.launch) for _ in range(2)]
        if k.backend == "cpu":
            before = torch.get_num_threads()
            torch.set_num_threads(3 - min(before, 2))
            try:
                runs.append(kernel_cases.run(case, k.launch))
            finally:
                torch.set_num_threads(before)
        for again in runs[1:]:
            for name, got in again.items():
                verdict = testing.exactly(got, runs[0][name], f"{case}: {name} of another run")
                assert verdict, verdict.message
