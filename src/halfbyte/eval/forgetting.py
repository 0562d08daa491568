"""Owns what training cost on general benchmarks: differences to the base, corrected for their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from halfbyte.config import Run
from halfbyte.eval.benchmarks import LoadedBenchmark
from halfbyte.eval.harness import BenchmarkResult
from halfbyte.eval.intervals import evidence, judge_together, mean_interval, paired_difference

FORGETS, LEARNS, NOT_SHOWN = "forgets", "better", "no difference shown"


class Entrant(Protocol):
    """A variant with its name and its result in each benchmark that it was asked."""

    name: str
    benchmarks: dict[str, BenchmarkResult]


def benchmark_entries(
    run: Run,
    benchmarks: Sequence[LoadedBenchmark],
    entrants: Sequence[Entrant],
    ours: Entrant | None,
) -> list[dict[str, Any]]:
    """Return each benchmark's figures of every variant, and the difference of ``ours`` to each other one.

    For each other variant, significance is judged over all benchmarks together (Holm).
    """
    entries = [_entry(run, benchmark, entrants) for benchmark in benchmarks]
    for other in entrants:
        if ours is None or other is ours or not (ours.benchmarks and other.benchmarks):
            continue
        differences = [_difference(run, benchmark, ours, other) for benchmark in benchmarks]
        judged = judge_together(differences, run.eval.confidence, LEARNS, FORGETS, NOT_SHOWN)
        for entry, difference in zip(entries, judged, strict=True):
            entry["differences"][other.name] = difference
    return entries


def forgetting_line(entries: list[dict[str, Any]], other: str) -> str:
    """Say in one sentence what training cost compared with one variant; "" without benchmarks."""
    differences = {
        entry["task"]: entry["differences"][other]
        for entry in entries
        if other in entry["differences"]
    }
    if not differences:
        return ""
    parts = []
    for verdict in (FORGETS, LEARNS):
        shown = [
            f"{task} ({difference['value']:+.3f})"
            for task, difference in differences.items()
            if difference["verdict"] == verdict
        ]
        if shown:
            parts.append(f"{verdict} {'on ' if verdict == LEARNS else ''}{', '.join(shown)}")
    not_shown = [
        _sensitivity(task, difference)
        for task, difference in differences.items()
        if difference["verdict"] == NOT_SHOWN
    ]
    if not_shown:
        parts.append(f"no difference shown on {', '.join(not_shown)}")
    return f"General benchmarks, compared with {other}: {'; '.join(parts)}."


def _sensitivity(task: str, difference: dict[str, Any]) -> str:
    """Say how large a difference the questions of a task could have shown."""
    smallest = difference["smallest_shown"]
    if smallest is None:
        return f"{task} ({difference['n']} questions, the same difference on each)"
    return f"{task} ({difference['n']} questions, enough to show a difference of {smallest:.2f} or more)"


def _entry(run: Run, benchmark: LoadedBenchmark, entrants: Sequence[Entrant]) -> dict[str, Any]:
    """Return a benchmark's entry in report.json, without differences."""
    level = (run.eval.confidence, run.eval.resamples, run.seed)
    task = benchmark.settings.task
    variants = {}
    for entrant in entrants:
        if task in entrant.benchmarks:
            result = entrant.benchmarks[task]
            variants[entrant.name] = {
                **mean_interval(result.scores[benchmark.metric], *level).as_json(),
                "harness": result.harness,
                "seconds": round(result.seconds, 1),
            }
    return {**benchmark.as_json(run), "variants": variants, "differences": {}}


def _difference(
    run: Run, benchmark: LoadedBenchmark, ours: Entrant, other: Entrant
) -> dict[str, Any]:
    """Return by how much ``ours`` is better, and the evidence for it."""
    sign = 1 if benchmark.higher_is_better else -1
    our_scores, their_scores = (
        [
            sign * score
            for score in entrant.benchmarks[benchmark.settings.task].scores[benchmark.metric]
        ]
        for entrant in (ours, other)
    )
    level = (run.eval.confidence, run.eval.resamples, run.seed)
    difference = paired_difference(our_scores, their_scores, *level)
    return {**difference.as_json(), **evidence(our_scores, their_scores, *level)}
