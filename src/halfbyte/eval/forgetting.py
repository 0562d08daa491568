"""Owns what the training cost elsewhere: each benchmark's difference to the base, corrected for their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from halfbyte.config import Run
from halfbyte.eval.harness import Answered, LoadedBenchmark
from halfbyte.eval.intervals import evidence, judge_together, mean_interval, paired_difference

FORGETS, LEARNS, NOT_SHOWN = "forgets", "better", "no difference shown"


class Entrant(Protocol):
    """A variant: its name, and what it got in each benchmark that it was asked."""

    name: str
    benchmarks: dict[str, Answered]


def benchmark_entries(
    run: Run, asked: Sequence[LoadedBenchmark], entrants: Sequence[Entrant], ours: Entrant | None
) -> list[dict[str, Any]]:
    """For each benchmark every variant's figures, and what ``ours`` lost or won against each other one.

    Significance is judged per other variant over all benchmarks together (Holm).
    """
    entries = [_entry(run, benchmark, entrants) for benchmark in asked]
    for other in entrants:
        if ours is None or other is ours or not (ours.benchmarks and other.benchmarks):
            continue
        found = [_difference(run, benchmark, ours, other) for benchmark in asked]
        judged = judge_together(found, run.eval.confidence, LEARNS, FORGETS, NOT_SHOWN)
        for entry, difference in zip(entries, judged, strict=True):
            entry["differences"][other.name] = difference
    return entries


def forgetting_line(entries: list[dict[str, Any]], other: str) -> str:
    """One sentence on what the training cost against one variant; "" without benchmarks."""
    found = {
        entry["task"]: entry["differences"][other]
        for entry in entries
        if other in entry["differences"]
    }
    if not found:
        return ""
    parts = []
    for verdict in (FORGETS, LEARNS):
        named = [
            f"{task} ({told['value']:+.3f})"
            for task, told in found.items()
            if told["verdict"] == verdict
        ]
        if named:
            parts.append(f"{verdict} {'on ' if verdict == LEARNS else ''}{', '.join(named)}")
    silent = [_limits(task, told) for task, told in found.items() if told["verdict"] == NOT_SHOWN]
    if silent:
        parts.append(f"no difference shown on {', '.join(silent)}")
    return f"Elsewhere, against {other}: {'; '.join(parts)}."


def _limits(task: str, told: dict[str, Any]) -> str:
    smallest = told["smallest_shown"]
    if smallest is None:
        return f"{task} ({told['n']} questions, all alike)"
    return f"{task} ({told['n']} questions, which show {smallest:.2f} or more)"


def _entry(run: Run, benchmark: LoadedBenchmark, entrants: Sequence[Entrant]) -> dict[str, Any]:
    level = (run.eval.confidence, run.eval.resamples, run.seed)
    task = benchmark.settings.task
    variants = {}
    for entrant in entrants:
        if task in entrant.benchmarks:
            told = entrant.benchmarks[task]
            variants[entrant.name] = {
                **mean_interval(told.scores[benchmark.metric], *level).as_json(),
                "harness": told.harness,
                "seconds": round(told.seconds, 1),
            }
    return {**benchmark.described(run), "variants": variants, "differences": {}}


def _difference(
    run: Run, benchmark: LoadedBenchmark, ours: Entrant, other: Entrant
) -> dict[str, Any]:
    """By how much ``ours`` is better."""
    sign = 1 if benchmark.higher_is_better else -1
    own, theirs = (
        [
            sign * score
            for score in entrant.benchmarks[benchmark.settings.task].scores[benchmark.metric]
        ]
        for entrant in (ours, other)
    )
    level = (run.eval.confidence, run.eval.resamples, run.seed)
    difference = paired_difference(own, theirs, *level)
    return {**difference.as_json(), **evidence(own, theirs, *level)}
