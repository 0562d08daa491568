"""Owns the learning curve: score against the number of training rows, and where it would cross the best opponent."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from halfbyte.errors import RunError
from halfbyte.eval.intervals import Scores, mean_interval
from halfbyte.eval.pages import interval
from halfbyte.eval.report_record import Curve, Point, Report
from halfbyte.eval.runs import variant_scores
from halfbyte.eval.variants import trained_name
from halfbyte.run_dir import RunDir
from halfbyte.scoring.rows import LOSS_METRIC

RESAMPLES = 400
MAX_GROWTH = 100  # times the rows that there are, beyond which nothing is extrapolated
MIN_ERROR = 1e-3  # of a score of 1, whose logarithm does not exist

# The number of rows, its lower and upper end, and in which share of the resamples there is one.
Crossing = tuple[float | None, float | None, float | None, float]


def read_curve(folders: Sequence[RunDir]) -> Curve:
    """Read the compared runs of one config with growing shares of its rows.

    Raises:
        RunError: a run was not compared, or two have no rows in common.
    """
    reports = _read(folders)
    last, whole = reports[-1]
    ours = trained_name([entry["name"] for entry in last.variants])
    names = [name for name in whole if all(name in by_variant for _, by_variant in reports)]
    ids: list[str] = []
    if ours in names:
        ids = [row for row in whole[ours] if all(row in by[ours] for _, by in reports)]
    if ours is None or not ids:
        raise RunError(
            f"{', '.join(str(folder.path) for folder in folders)}: the runs were compared without their trained"
            " variant, or on rows that they have not in common"
        )
    sizes = [report.rows.trained for report, _ in reports]
    scores = {
        name: np.array([[by_variant[name][row] for row in ids] for _, by_variant in reports])
        for name in names
    }
    level = (last.confidence, int(last.eval["resamples"]), 0)
    points = [
        Point(
            rows=size,
            scores={
                name: mean_interval(scores[name][number].tolist(), *level).as_json()
                for name in names
            },
        )
        for number, size in enumerate(sizes)
    ]
    others = [name for name in names if name != ours]
    best = max(others, key=lambda name: scores[name][-1].mean(), default=None)
    crossed: Crossing = (None, None, None, 0.0)
    if best is not None:
        crossed = _crossing(sizes, scores[ours], scores[best], last.confidence)
    crossing, low, high, share = crossed
    return Curve(
        metric=last.metric,
        ours=ours,
        best=best,
        points=points,
        crossing=crossing,
        crossing_low=low,
        crossing_high=high,
        share=share,
        line=_line(points, ours, best, crossed),
    )


def _read(folders: Sequence[RunDir]) -> list[tuple[Report, dict[str, dict[str, float]]]]:
    """Return the report and the scores, by variant and row, of each run, by growing number of its rows."""
    reports = []
    for folder in folders:
        path = folder.need(folder.eval / "report.json", f"halfbyte compare {folder.path}")
        report = Report.read(path)
        reports.append((report, variant_scores(folder, report.metric)))
    reports.sort(key=lambda pair: pair[0].rows.trained)
    kinds = {(report.metric, report.metrics_version) for report, _ in reports}
    if len(kinds) > 1 or reports[0][0].metric == LOSS_METRIC:
        raise RunError(
            f"{', '.join(str(folder.path) for folder in folders)}: a curve needs one metric that scores each"
            f" answer, in one version; the reports have {', '.join(f'{m} {v}' for m, v in sorted(kinds))}."
            " Compare each run again with the same eval.metrics"
        )
    return reports


def power_law(sizes: Sequence[int], means: Scores) -> tuple[float, float]:
    """Fit 1 - score = exp(a)·rows^b by least squares of logarithms (Hestness et al. 2017); return a and b."""
    errors = np.log(np.maximum(1 - means, MIN_ERROR))
    slope, start = np.polyfit(np.log(np.array(sizes, dtype=np.float64)), errors, 1)
    return float(start), float(slope)


def _cross(sizes: Sequence[int], ours: Scores, theirs: Scores) -> float | None:
    """Return the number of rows at which the fitted errors are equal, if ours falls faster."""
    (start, slope), (other_start, other_slope) = power_law(sizes, ours), power_law(sizes, theirs)
    if slope >= other_slope:
        return None
    at = (other_start - start) / (slope - other_slope)
    largest = max(sizes)
    return math.exp(at) if math.log(largest) < at < math.log(MAX_GROWTH * largest) else None


def _crossing(sizes: Sequence[int], ours: Scores, theirs: Scores, confidence: float) -> Crossing:
    """Return where ours crosses theirs, its interval over resampled rows, and in which share it does."""
    if len(set(sizes)) < 2:
        return None, None, None, 0.0
    rng, num_rows = np.random.default_rng(0), ours.shape[1]
    drawn = []
    for _ in range(RESAMPLES):
        rows = rng.integers(0, num_rows, num_rows)
        at = _cross(sizes, ours[:, rows].mean(axis=1), theirs[:, rows].mean(axis=1))
        if at is not None:
            drawn.append(at)
    low, high = None, None
    if drawn:
        tails = ((1 - confidence) / 2, (1 + confidence) / 2)
        low, high = (float(value) for value in np.quantile(drawn, tails))
    at = _cross(sizes, ours.mean(axis=1), theirs.mean(axis=1))
    return at, low, high, len(drawn) / RESAMPLES


def _line(points: Sequence[Point], ours: str, best: str | None, crossed: Crossing) -> str:
    """Say from how many rows on the trained variant is ahead of the best opponent, or would be."""
    if best is None:
        return "There is no opponent to cross."
    ahead = [one.scores[ours]["value"] > one.scores[best]["value"] for one in points]
    if ahead[-1]:
        first = next(number for number in range(len(points)) if all(ahead[number:]))
        return f"{ours} is ahead of {best}, the best opponent, from {points[first].rows:,} rows on."
    at, low, high, share = crossed
    if at is None or low is None or high is None:
        return (
            f"{ours} is behind {best}, the best opponent, and does not approach it within"
            f" {MAX_GROWTH} times these rows."
        )
    return (
        f"{ours} is behind {best}, the best opponent, and would cross it at about {at:,.0f} rows"
        f" [{low:,.0f}, {high:,.0f}], in {share:.0%} of the resamples, if both errors go on falling as a power of"
        " the number of rows."
    )


def as_markdown(curve: Curve) -> str:
    """Format a curve as a page of Markdown."""
    names = list(curve.points[-1].scores)
    lines = [
        f"**{curve.line}**",
        "",
        f"| rows | {' | '.join(names)} |",
        "|" + " --- |" * (len(names) + 1),
    ]
    for point in curve.points:
        cells = [f"{point.rows:,}", *(interval(point.scores[name]) for name in names)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])
