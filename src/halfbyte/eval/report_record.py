"""Owns the content of report.json: the figures and the verdict of a comparison."""

from __future__ import annotations

from typing import Any

from halfbyte.model.identity import BaseIdentity
from halfbyte.record import Field, Record, RecordPart


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
