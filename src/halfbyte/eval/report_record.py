"""Owns the content of report.json, the figures and the verdict of a comparison, and of curve.json."""

from __future__ import annotations

from typing import Any

from halfbyte.model.identity import BaseIdentity
from halfbyte.record import Field, Record, RecordPart
from halfbyte.scoring.rows import LOSS_METRIC


class Decoding(RecordPart):
    """How answers were generated, alike for every variant."""

    greedy: bool
    max_new_tokens: int
    stop_ids: list[int]
    batch_size: int
    chat_template_sha256: str
    compute_dtype: str


class TrainingRows(RecordPart):
    """How many rows were read, trained on and dropped, from the ledger."""

    rows_in: dict[str, int] = Field(alias="in")
    trained: int
    dropped: dict[str, int]


class Report(Record):
    """``report.json``.

    Attributes:
        run: name of the run.
        created: when, in ISO 8601.
        base: that the run was trained on.
        metric: the first of ``metrics``, which decides the verdict.
        metrics_version: of the rules that they score by; 1 in reports of versions before 0.2.
        n: held-out rows.
        verdict: in one line.
        variants: the figures of each variant; see ``measure.Variant.as_json``.
        differences: the trained variant's paired difference to every other one, by its name.
        cheapest: the variant with the fewest bytes that is not shown to be worse than the best one.
        without_near_duplicates: each variant's scores on the rows whose prompt is nearly that of no training row.
        forgetting: lines about what the training made worse on general benchmarks.
        benchmarks: the figures of each benchmark.
        eval: the settings.
        notes: a sentence each.
        command: that repeats the comparison.
        judged: what a judge preferred, by the name of the other variant.
    """

    NEWEST = 2
    SEALED = True
    run: str
    created: str
    base: BaseIdentity
    metric: str
    metrics: list[str]
    metrics_version: int = 1
    n: int
    confidence: float
    verdict: str
    variants: list[dict[str, Any]]
    differences: dict[str, dict[str, Any]]
    cheapest: str | None = None
    without_near_duplicates: dict[str, dict[str, Any]] = Field(default_factory=dict)
    forgetting: list[str] = Field(default_factory=list)
    benchmarks: list[dict[str, Any]] = Field(default_factory=list)
    eval: dict[str, Any]
    decoding: Decoding
    rows: TrainingRows
    notes: list[str]
    command: str = ""
    judged: dict[str, Any] = Field(default_factory=dict)


class Point(RecordPart):
    """The scores at one number of training rows, by variant."""

    rows: int
    scores: dict[str, dict[str, Any]]


class Curve(Record):
    """``curve.json``.

    Attributes:
        metric: that was scored.
        ours: the trained variant.
        best: the opponent with the highest score on all rows; None without one.
        points: by growing number of rows.
        crossing: the number of rows at which ours would have the score of the best opponent; None for none.
        crossing_low: where it would at the earliest, and ``crossing_high`` at the latest, at the confidence of the report.
        share: of the resamples of rows in which it would.
        line: what that says, in a sentence.
    """

    metric: str
    ours: str
    best: str | None
    points: list[Point]
    crossing: float | None
    crossing_low: float | None
    crossing_high: float | None
    share: float
    line: str


def estimate_of(entry: dict[str, Any], metric: str) -> dict[str, Any]:
    """Return a variant's estimate of a metric; that of the held-out loss is stored under another key."""
    key = "held_out_loss_interval" if metric == "held_out_loss" else metric
    estimate: dict[str, Any] = entry[key]
    return estimate


def by_score(report: Report) -> list[dict[str, Any]]:
    """Return the entries of the variants, the best one by the deciding metric first."""
    sign = 1 if report.metric == LOSS_METRIC else -1
    return sorted(
        report.variants, key=lambda entry: sign * estimate_of(entry, report.metric)["value"]
    )
