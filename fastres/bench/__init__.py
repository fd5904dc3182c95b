"""The harness behind ``fastres bench``: a request in, checked and timed result rows out."""

from fastres.bench.harness import Case, Result, run
from fastres.bench.inputs import BenchError

__all__ = ["BenchError", "Case", "Result", "run"]
