"""What executors have found out by measuring, which of their kernels serves where, as data of a saved session.

A kernel chosen by the clock may be another one the next time, and with it the last bits of a result. A session that is
loaded computes with the kernels of the one that was saved, where instruction set and number of threads are the same.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastres import machine
from fastres.inference.executors import Assignment
from fastres.inference.serving import Runner, Target


def gather(runner: Runner) -> list[dict]:
    """One entry for each executor's run of nodes: the first of the plan's nodes, how many, and what was measured."""
    return [
        {"executor": a.executor, "first": first, "nodes": len(a.segment.nodes), "measured": a.prepared.choices()}
        for first, a in _assignments(runner)
        if hasattr(a.prepared, "choices")
    ]


def take_over(runner: Runner, target: Target, stored: dict) -> list[str]:
    """Give the executors what ``gather`` found in another session. Returns what is to be said about it.

    What they cannot use they measure anew. Raises AttributeError, KeyError, TypeError or ValueError for other data.
    """
    here, notes, taken = {_place(first, a): a for first, a in _assignments(runner)}, [], 0
    for entry in stored.get("segments", []):
        first, nodes, measured = entry["first"], entry["nodes"], entry["measured"]
        assignment = here.get((entry["executor"], first, nodes))
        if assignment is not None and hasattr(assignment.prepared, "choose"):
            refused = assignment.prepared.choose(measured)
            taken += len(measured) - len(refused)
            notes += refused
        elif measured:
            run = f"does not serve exactly nodes {first + 1} to {first + nodes} here"
            notes.append(f"the {entry['executor']} executor {run}: its choice of kernels is not taken over")
    chip = machine.chip(target.device)
    if taken and stored["chip"] != chip:
        notes.append(f"kernels are those chosen on {stored['chip']}; optimize again to choose on {chip}")
    return notes


def _place(first: int, assignment: Assignment) -> tuple[str, int, int]:
    return assignment.executor, first, len(assignment.segment.nodes)


def _assignments(runner: Runner) -> Iterator[tuple[int, Assignment]]:
    first = 0
    for part in runner.parts:
        for assignment in part.assignments:
            yield first, assignment
            first += len(assignment.segment.nodes)
