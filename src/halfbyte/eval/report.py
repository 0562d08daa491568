"""Owns the report of a comparison: report.json for programs, report.md and report.html for people."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from itertools import islice
from typing import Any

from halfbyte.config import Run
from halfbyte.config.section import OPPONENTS
from halfbyte.data.conversation import Row
from halfbyte.data.ledger import Ledger
from halfbyte.eval.benchmarks import LoadedBenchmark
from halfbyte.eval.contamination import (
    duplicate_note,
    memory_note,
    repeated_note,
    scores_without_duplicates,
)
from halfbyte.eval.curve import as_markdown as curve_as_markdown
from halfbyte.eval.forgetting import benchmark_entries, forgetting_line
from halfbyte.eval.judge import judge_answers
from halfbyte.eval.measure import Variant
from halfbyte.eval.pages import as_html, as_markdown
from halfbyte.eval.report_record import Curve, Decoding, Report, TrainingRows
from halfbyte.eval.variants import BASE_FULL, BASE_NF4, MERGED, trained_name
from halfbyte.eval.verdict import cheapest, differences, ours_of, overall, verdict_line
from halfbyte.model.identity import BaseIdentity
from halfbyte.run_dir import RunDir, read_jsonl, write_jsonl, write_text
from halfbyte.scoring import metrics
from halfbyte.trained.run import TrainedRun

CURVE = "curve.json"
MAX_DIFFERENCES = 8  # kinds of them, in a note
# The share is that of tests/test_seeds.py, for 300 rows.
ONE_TRAINING = (
    "The verdict rests on the rows of one training; one with another seed would score differently (Zhou et al. 2025,"
    " arXiv:2503.07329). Where trainings vary by 3 points (standard deviation), two equally good ones are told"
    " apart in one of six comparisons of 300 rows, not in one of twenty. halfbyte train --seeds 3 measures it."
)
MAX_CUT_OFF_FRAC = 0.01  # share of cut-off answers above which the report has a note


def write_report(
    trained: TrainedRun,
    rows: list[Row],
    variants: list[Variant],
    benchmarks: Sequence[LoadedBenchmark] = (),
    *,
    command: str = "",
    notes: Sequence[str] = (),
) -> Report:
    """Write report.json, .md and .html, answers.jsonl and benchmarks.jsonl; return report.json's content.

    Args:
        trained: the run, with the settings of the comparison.
        rows: the held-out rows.
        variants: the measured variants.
        benchmarks: the benchmarks that were run.
        command: the command line that repeats the comparison.
        notes: further notes, a sentence or two each.
    """
    folder, run = trained.folder, trained.run
    report = build_report(trained, rows, variants, benchmarks, command)
    report = report.model_copy(update={"notes": [*report.notes, *notes]})
    answered = [] if not variants[0].answers else _answers(trained, rows, variants)
    write_jsonl(folder.eval / "answers.jsonl", answered)
    write_jsonl(folder.eval / "benchmarks.jsonl", _benchmark_answers(variants))
    _write_pages(trained, report, answered)
    if run.eval.judge is not None:  # last, so that the rest is kept if the judge fails
        judged = _judged(folder, run, answered, variants)
        report = report.model_copy(update={"judged": judged})
        _write_pages(trained, report, answered)
    return report


def write_curve(trained: TrainedRun, curve: Curve) -> None:
    """Write curve.json and curve.md, and the report's pages anew with the picture of the curve."""
    folder = trained.folder
    curve.write(folder.eval / CURVE)
    write_text(folder.eval / "curve.md", curve_as_markdown(curve))
    report = Report.read(folder.eval / "report.json")
    _write_pages(trained, report, list(read_jsonl(folder.eval / "answers.jsonl")))


def _write_pages(trained: TrainedRun, report: Report, answered: list[dict[str, Any]]) -> None:
    """Write report.json, report.md and report.html; with the learning curve, if there is one."""
    folder = trained.folder
    path = folder.eval / CURVE
    curve = Curve.read(path) if path.is_file() else None
    report.write(folder.eval / "report.json")
    write_text(folder.eval / "report.md", as_markdown(report))
    losses, manifest = list(read_jsonl(folder.metrics)), trained.manifest.as_json()
    write_text(folder.eval / "report.html", as_html(report, answered, losses, manifest, curve))


def _judged(
    folder: RunDir, run: Run, answered: list[dict[str, Any]], variants: list[Variant]
) -> dict[str, Any]:
    """Return what the judge preferred; empty without a trained variant or without answers."""
    ours = ours_of(variants)
    if ours is None or not answered:
        return {}
    others = [v.name for v in variants if v is not ours and v.name not in (MERGED, *OPPONENTS)]
    return judge_answers(run, answered, ours.name, others, folder.eval / "judge.jsonl")


def build_report(
    trained: TrainedRun,
    rows: list[Row],
    variants: list[Variant],
    benchmarks: Sequence[LoadedBenchmark] = (),
    command: str = "",
) -> Report:
    """Return the figures, the differences and the verdict."""
    run, manifest, ledger = trained.run, trained.manifest, Ledger.read(trained.folder.ledger)
    entries = [variant.as_json(run) for variant in variants]
    metric = run.eval.metrics[0]
    against = differences(run, variants, metric)
    general = benchmark_entries(run, benchmarks, variants, ours_of(variants))
    for entry in entries:
        difference = against.get(entry["name"])
        entry["verdict"] = difference["verdict"] if difference else overall(against)
    clean = scores_without_duplicates(ledger, rows, variants, run)
    hints = [duplicate_note(ledger, clean, metric), *repeated_note(rows), *memory_note(variants)]
    return Report(
        run=str(run.name),
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        base=manifest.base,
        metric=metric,
        metrics=list(run.eval.metrics),
        n=max(len(variant.losses) for variant in variants),
        confidence=run.eval.confidence,
        verdict=verdict_line(entries, against, metric, run),
        variants=entries,
        differences=against,
        cheapest=cheapest(run, variants, metric),
        without_near_duplicates=clean,
        forgetting=[
            line
            for name in (BASE_FULL, BASE_NF4, *(baseline.name for baseline in run.eval.baselines))
            if (line := forgetting_line(general, name))
        ],
        benchmarks=general,
        eval=run.eval.model_dump(mode="json"),
        metrics_version=metrics.VERSION,
        decoding=Decoding(
            greedy=True,
            max_new_tokens=run.eval.max_new_tokens,
            stop_ids=manifest.stop_ids,
            batch_size=run.eval.batch_size,
            chat_template_sha256=manifest.chat_template_sha256,
            compute_dtype=manifest.compute_dtype.name,
        ),
        rows=TrainingRows.model_validate(ledger.as_json() | {"in": ledger.rows_in}),
        notes=_notes(hints, entries, manifest.base, variants, run.data.new_tokens),
        command=command,
    )


def _benchmark_answers(variants: list[Variant]) -> list[dict[str, Any]]:
    """Return each variant's answer to each question of each benchmark, with its scores."""
    return [
        {
            "benchmark": task,
            "variant": variant.name,
            **sample,
            "scores": {metric: scores[i] for metric, scores in result.scores.items()},
        }
        for variant in variants
        for task, result in variant.benchmarks.items()
        for i, sample in enumerate(result.samples)
    ]


def _notes(
    hints: list[str],
    entries: list[dict[str, Any]],
    base: BaseIdentity,
    variants: list[Variant],
    new_tokens: list[str],
) -> list[str]:
    """Return the notes of the report, a sentence each; ``hints`` are those of contamination."""
    notes = [f"Base: {base.origin}."]
    if new_tokens:
        notes.append(
            f"The base reads the new tokens ({', '.join(new_tokens)}) as text. Where they are marks of the chat"
            " template, it never learnt to end an answer with them; compare it in a format of its own too, with"
            " eval.baselines."
        )
    has_benchmarks = any(variant.benchmarks for variant in variants)
    notes += hints
    counts = {v.name: sum(v.loss_columns()[1]) for v in variants if v.losses}
    odd = [name for name, count in counts.items() if count != next(iter(counts.values()))]
    if odd:
        notes.append(
            f"{', '.join(odd)}: a different tokenizer, so the loss per token refers to different tokens."
        )
    without = [v.name for v in variants if has_benchmarks and v.losses and not v.benchmarks]
    if without:
        notes.append(
            f"{', '.join(without)}: not run on the benchmarks; models in llama.cpp cannot be, and examples in"
            " a variant's prompt are for the held-out rows only."
        )
    for entry in entries:
        cut = entry["finish_reasons"]["length"]
        if cut > MAX_CUT_OFF_FRAC * sum(entry["finish_reasons"].values()):
            notes.append(f"{entry['name']}: {cut} answers were cut off at eval.max_new_tokens.")
        if entry["call_differences"]:
            shown = islice(entry["call_differences"].items(), MAX_DIFFERENCES)
            counts_of = ", ".join(f"{what} ({count})" for what, count in shown)
            notes.append(f"{entry['name']}: calls differ from the wanted ones: {counts_of}.")
        if entry["unread"]:
            reasons = ", ".join(f"{count} {fault}" for fault, count in entry["unread"].items())
            notes.append(
                f"{entry['name']}: no one number in some answers, which are wrong: {reasons}."
            )
    if trained_name([entry["name"] for entry in entries]):
        notes.append(ONE_TRAINING)
    notes.append(
        "tokens/s were measured in this session, in batches; compare them with each other, not with those of"
        " other machines."
    )
    return notes


def _row_id(row: Row) -> str:
    """Return an id that is the same for the same conversation in any run and place."""
    turns = [
        [message.role, message.content if message.is_plain else message.text]
        for message in row.messages
    ]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()[:16]


def _answers(trained: TrainedRun, rows: list[Row], variants: list[Variant]) -> list[dict[str, Any]]:
    """Return the rows of answers.jsonl."""
    return [
        {
            "place": row.place,
            "id": _row_id(row),
            "prompt": row.messages[-2].content,
            "wanted": trained.renderer.wanted_text(row),
            "answers": {v.name: v.answers[i] for v in variants},
            "finish_reasons": {v.name: v.finish_reasons[i] for v in variants},
            "scores": {v.name: {m: s[i] for m, s in v.scores.items()} for v in variants},
        }
        for i, row in enumerate(rows)
    ]
