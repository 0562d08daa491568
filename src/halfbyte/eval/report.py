"""Owns the report of a comparison: report.json for programs, report.md and report.html for people."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from itertools import islice
from typing import Any

from halfbyte.config import Run
from halfbyte.data.conversation import Row
from halfbyte.data.ledger import NEAR_DUPLICATE, Ledger
from halfbyte.eval.benchmarks import LoadedBenchmark
from halfbyte.eval.forgetting import benchmark_entries, forgetting_line
from halfbyte.eval.intervals import (
    GAIN,
    LOSS,
    NO_GAIN,
    Estimate,
    evidence,
    judge,
    paired_difference,
    ratio_interval,
)
from halfbyte.eval.judge import judge_answers
from halfbyte.eval.measure import Variant
from halfbyte.eval.opponents import WITHOUT_MODEL
from halfbyte.eval.pages import as_html, as_markdown, interval, signed
from halfbyte.eval.plots import estimate_of
from halfbyte.eval.report_record import Decoding, Report, TrainingRows
from halfbyte.eval.variants import BASE_FULL, BASE_NF4, FEWSHOT, MERGED, is_artefact, trained_name
from halfbyte.model.identity import BaseIdentity
from halfbyte.run_dir import RunDir, read_jsonl, write_jsonl, write_text
from halfbyte.scoring import metrics
from halfbyte.scoring.rows import LOSS_METRIC
from halfbyte.trained.run import TrainedRun

MAX_DIFFERENCES = 8  # kinds of them, in a note
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
    report = build_report(trained, variants, benchmarks, command)
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


def _write_pages(trained: TrainedRun, report: Report, answered: list[dict[str, Any]]) -> None:
    """Write report.json, report.md and report.html."""
    folder = trained.folder
    report.write(folder.eval / "report.json")
    write_text(folder.eval / "report.md", as_markdown(report))
    losses, manifest = list(read_jsonl(folder.metrics)), trained.manifest.as_json()
    write_text(folder.eval / "report.html", as_html(report, answered, losses, manifest))


def _judged(
    folder: RunDir, run: Run, answered: list[dict[str, Any]], variants: list[Variant]
) -> dict[str, Any]:
    """Return what the judge preferred; empty without a trained variant or without answers."""
    ours = _ours(variants)
    if ours is None or not answered:
        return {}
    others = [v.name for v in variants if v is not ours and v.name != MERGED]
    return judge_answers(run, answered, ours.name, others, folder.eval / "judge.jsonl")


def build_report(
    trained: TrainedRun,
    variants: list[Variant],
    benchmarks: Sequence[LoadedBenchmark] = (),
    command: str = "",
) -> Report:
    """Return the figures, the differences and the verdict."""
    run, manifest, ledger = trained.run, trained.manifest, Ledger.read(trained.folder.ledger)
    entries = [variant.as_json(run) for variant in variants]
    metric = run.eval.metrics[0]
    differences = _differences(run, variants, metric)
    general = benchmark_entries(run, benchmarks, variants, _ours(variants))
    for entry in entries:
        difference = differences.get(entry["name"])
        entry["verdict"] = difference["verdict"] if difference else _overall(differences)
    return Report(
        run=str(run.name),
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        base=manifest.base,
        metric=metric,
        metrics=list(run.eval.metrics),
        n=max(len(variant.losses) for variant in variants),
        confidence=run.eval.confidence,
        verdict=_verdict_line(entries, differences, metric, run),
        variants=entries,
        differences=differences,
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
        notes=_notes(ledger, entries, manifest.base, variants, run.data.new_tokens),
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


def _differences(run: Run, variants: list[Variant], metric: str) -> dict[str, dict[str, Any]]:
    """Return the trained variant's paired difference to every other variant on the deciding metric."""
    ours = _ours(variants)
    if ours is None:
        return {}
    level = (run.eval.confidence, run.eval.resamples, run.seed)
    differences = {}
    for other in variants:
        if other is not ours:
            difference = _difference(run, ours, other, metric)
            loss = _difference(run, ours, other, LOSS_METRIC) if other.losses else None
            scores, other_scores = ours.scores.get(metric, []), other.scores.get(metric, [])
            differences[other.name] = {
                **difference.as_json(),
                **(evidence(scores, other_scores, *level) if scores else {}),
                "verdict": judge(difference, scores, other_scores, run.eval.confidence),
                "held_out_loss_drop": loss and loss.as_json(),
            }
    return differences


def _ours(variants: list[Variant]) -> Variant | None:
    """Return the trained variant that the verdict is about."""
    by_name = {variant.name: variant for variant in variants}
    name = trained_name(by_name)
    return by_name[name] if name else None


def _difference(run: Run, ours: Variant, other: Variant, metric: str) -> Estimate:
    """Return by how much ``ours`` is better, row by row: a higher score, or a lower loss."""
    level = (run.eval.confidence, run.eval.resamples, run.seed)
    if metric != LOSS_METRIC:
        return paired_difference(ours.scores[metric], other.scores[metric], *level)
    (losses, counts), (other_losses, _) = ours.loss_columns(), other.loss_columns()
    drops = [b - a for a, b in zip(losses, other_losses, strict=True)]
    return ratio_interval(drops, counts, *level)


def _overall(differences: dict[str, dict[str, Any]]) -> str:
    """Return the worst verdict against the other variants, leaving out its merged and exported copies."""
    others = [name for name in differences if name != MERGED and not is_artefact(name)]
    verdicts = {differences[name]["verdict"] for name in others}
    for verdict in (LOSS, NO_GAIN, GAIN):
        if verdict in verdicts:
            return verdict
    return NO_GAIN


def _verdict_line(
    entries: list[dict[str, Any]], differences: dict[str, dict[str, Any]], metric: str, run: Run
) -> str:
    """Say in one line how the trained variant does against each baseline."""
    by_name = {entry["name"]: entry for entry in entries}
    ours = trained_name(by_name)
    baselines = [BASE_FULL, FEWSHOT, *(baseline.name for baseline in run.eval.baselines), BASE_NF4]
    parts = [
        f"{differences[name]['verdict']} against {name}"
        f" ({signed(differences[name])}{_rows_needed(differences[name])})"
        for name in (*baselines, *WITHOUT_MODEL)
        if name in differences
    ]
    verdicts = {name: difference["verdict"] for name, difference in differences.items()}
    unbeaten = [name for name in WITHOUT_MODEL if verdicts.get(name, GAIN) != GAIN]
    if unbeaten and GAIN in map(verdicts.get, baselines):
        parts.insert(0, f"gain over the base, not over {' and '.join(unbeaten)}")
    if ours is None or not parts:
        return "No verdict: the comparison lacks a trained variant or a baseline."
    estimate = interval(estimate_of(by_name[ours], metric))
    return f"{ours}: {metric} {estimate} — " + "; ".join(parts) + "."


def _rows_needed(difference: dict[str, Any]) -> str:
    """Say how many rows would show a difference that these rows did not show."""
    needed = difference.get("rows_needed")
    if difference["verdict"] != NO_GAIN or needed is None or needed <= difference["n"]:
        return ""
    return f"; a difference this small needs {needed:,} rows to be shown, not {difference['n']:,}"


def _notes(
    ledger: Ledger,
    entries: list[dict[str, Any]],
    base: BaseIdentity,
    variants: list[Variant],
    new_tokens: list[str],
) -> list[str]:
    """Return the notes of the report, a sentence each."""
    notes = [f"Base: {base.origin}."]
    if new_tokens:
        notes.append(
            f"The base reads the new tokens ({', '.join(new_tokens)}) as text. Where they are marks of the chat"
            " template, it never learnt to end an answer with them; compare it in a format of its own too, with"
            " eval.baselines."
        )
    has_benchmarks = any(variant.benchmarks for variant in variants)
    near = ledger.near_duplicates
    if near:
        notes.append(
            f"{ledger.total('near_duplicates')} pairs of training and held-out prompts are near duplicates (Jaccard similarity of"
            f" 5-character shingles at least {NEAR_DUPLICATE}); see ledger.json. There are no exact"
            " duplicates."
        )
    else:
        notes.append("No training prompt is an exact or near duplicate of a held-out one.")
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
