"""Owns the report: report.json for programs, report.md and report.html for people."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any

from halfbyte.config import Run
from halfbyte.data.rows import Row
from halfbyte.eval.forgetting import benchmark_entries, forgetting_line
from halfbyte.eval.harness import LoadedBenchmark
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
from halfbyte.eval.measure import LOSS_METRIC, Variant
from halfbyte.eval.pages import as_html, as_markdown, interval, signed
from halfbyte.eval.plots import estimate_of
from halfbyte.eval.variants import BASE_FULL, BASE_NF4, FEWSHOT, MERGED, is_artefact, trained_name
from halfbyte.run_dir import RunDir, read_json, read_jsonl, write_json, write_jsonl, write_text

MAX_LENGTH_FINISHES = 0.01


def write_report(
    folder: RunDir,
    run: Run,
    rows: list[Row],
    variants: list[Variant],
    benchmarks: Sequence[LoadedBenchmark] = (),
    *,
    command: str = "",
) -> dict[str, Any]:
    """Write report.json, .md and .html, answers.jsonl and benchmarks.jsonl; returns report.json's content.

    ``command`` repeats the comparison.
    """
    report = {**build_report(folder, run, variants, benchmarks), "command": command, "judged": {}}
    answered = [] if not variants[0].answers else _answers(rows, variants)
    write_jsonl(folder.eval / "answers.jsonl", answered)
    write_jsonl(folder.eval / "benchmarks.jsonl", _benchmark_answers(variants))
    _write_pages(folder, report, answered)
    if run.eval.judge is not None:  # last: all else is kept where the judge fails
        report["judged"] = _judged(folder, run, answered, variants)
        _write_pages(folder, report, answered)
    return report


def _write_pages(folder: RunDir, report: dict[str, Any], answered: list[dict[str, Any]]) -> None:
    write_json(folder.eval / "report.json", report)
    write_text(folder.eval / "report.md", as_markdown(report))
    training, manifest = list(read_jsonl(folder.metrics)), read_json(folder.manifest)
    write_text(folder.eval / "report.html", as_html(report, answered, training, manifest))


def _judged(
    folder: RunDir, run: Run, answered: list[dict[str, Any]], variants: list[Variant]
) -> dict[str, Any]:
    """What the judge preferred; nothing without one."""
    ours = _ours(variants)
    if ours is None or not answered:
        return {}
    others = [v.name for v in variants if v is not ours and v.name != MERGED]
    return judge_answers(run, answered, ours.name, others, folder.eval / "judge.jsonl")


def build_report(
    folder: RunDir, run: Run, variants: list[Variant], benchmarks: Sequence[LoadedBenchmark] = ()
) -> dict[str, Any]:
    """Figures, differences and the verdict, as plain values."""
    manifest, ledger = read_json(folder.manifest), read_json(folder.ledger)
    entries = [variant.as_json(run) for variant in variants]
    metric = run.eval.metrics[0]
    differences = _differences(run, variants, metric)
    elsewhere = benchmark_entries(run, benchmarks, variants, _ours(variants))
    for entry in entries:
        found = differences.get(entry["name"])
        entry["verdict"] = found["verdict"] if found else _overall(differences)
    return {
        "run": run.name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "base": manifest["base"],
        "metric": metric,
        "metrics": run.eval.metrics,
        "n": len(variants[0].losses),
        "confidence": run.eval.confidence,
        "verdict": _verdict_line(entries, differences, metric, run),
        "variants": entries,
        "differences": differences,
        "forgetting": [
            line
            for name in (BASE_FULL, BASE_NF4, *(baseline.name for baseline in run.eval.baselines))
            if (line := forgetting_line(elsewhere, name))
        ],
        "benchmarks": elsewhere,
        "eval": run.eval.model_dump(mode="json"),
        "decoding": {
            "greedy": True,
            "max_new_tokens": run.eval.max_new_tokens,
            "stop_ids": manifest["stop_ids"],
            "batch_size": run.eval.batch_size,
            "chat_template_sha256": manifest["chat_template_sha256"],
            "compute_dtype": manifest["compute_dtype"]["name"],
        },
        "rows": {
            "in": ledger["rows_in"],
            "trained": ledger["trained"],
            "dropped": ledger["dropped"],
        },
        "notes": _notes(ledger, entries, manifest, variants),
    }


def _benchmark_answers(variants: list[Variant]) -> list[dict[str, Any]]:
    """What each variant answered to each question of each benchmark, and what that scored."""
    return [
        {
            "benchmark": task,
            "variant": variant.name,
            **sample,
            "scores": {metric: scores[i] for metric, scores in told.scores.items()},
        }
        for variant in variants
        for task, told in variant.benchmarks.items()
        for i, sample in enumerate(told.samples)
    ]


def _differences(run: Run, variants: list[Variant], metric: str) -> dict[str, dict[str, Any]]:
    """The adapter's paired difference to every other variant on the deciding metric."""
    ours = _ours(variants)
    if ours is None:
        return {}
    level = (run.eval.confidence, run.eval.resamples, run.seed)
    found = {}
    for other in variants:
        if other is not ours:
            difference = _difference(run, ours, other, metric)
            loss = _difference(run, ours, other, LOSS_METRIC)
            own, theirs = ours.scores.get(metric, []), other.scores.get(metric, [])
            found[other.name] = {
                **difference.as_json(),
                **(evidence(own, theirs, *level) if own else {}),
                "verdict": judge(difference, own, theirs, run.eval.confidence),
                "held_out_loss_drop": loss.as_json(),
            }
    return found


def _ours(variants: list[Variant]) -> Variant | None:
    """The trained variant that the verdict is about."""
    by_name = {variant.name: variant for variant in variants}
    name = trained_name(by_name)
    return by_name[name] if name else None


def _difference(run: Run, ours: Variant, other: Variant, metric: str) -> Estimate:
    """By how much ``ours`` is better, row by row: a higher score, or a lower loss."""
    level = (run.eval.confidence, run.eval.resamples, run.seed)
    if metric != LOSS_METRIC:
        return paired_difference(ours.scores[metric], other.scores[metric], *level)
    (own, counts), (theirs, _) = ours.loss_columns(), other.loss_columns()
    drops = [b - a for a, b in zip(own, theirs, strict=True)]
    return ratio_interval(drops, counts, *level)


def _overall(differences: dict[str, dict[str, Any]]) -> str:
    """Against everything but copies of itself, merged or exported: the worst of the verdicts."""
    others = [name for name in differences if name != MERGED and not is_artefact(name)]
    verdicts = {differences[name]["verdict"] for name in others}
    for verdict in (LOSS, NO_GAIN, GAIN):
        if verdict in verdicts:
            return verdict
    return NO_GAIN


def _verdict_line(
    entries: list[dict[str, Any]], differences: dict[str, dict[str, Any]], metric: str, run: Run
) -> str:
    by_name = {entry["name"]: entry for entry in entries}
    ours = trained_name(by_name)
    baselines = [BASE_FULL, FEWSHOT, *(baseline.name for baseline in run.eval.baselines)]
    parts = [
        f"{differences[name]['verdict']} against {name} ({signed(differences[name])}{_too_few(differences[name])})"
        for name in (*baselines, BASE_NF4)
        if name in differences
    ]
    if ours is None or not parts:
        return "No verdict: the comparison has no trained variant, or no baseline beside it."
    estimate = interval(estimate_of(by_name[ours], metric))
    return f"{ours}: {metric} {estimate} — " + "; ".join(parts) + "."


def _too_few(difference: dict[str, Any]) -> str:
    """With how many rows a difference that was not shown would be."""
    needed = difference.get("rows_needed")
    if difference["verdict"] != NO_GAIN or needed is None or needed <= difference["n"]:
        return ""
    return f"; so small a difference takes {needed:,} rows, these are {difference['n']:,}"


def _notes(
    ledger: dict[str, Any],
    entries: list[dict[str, Any]],
    manifest: dict[str, Any],
    variants: list[Variant],
) -> list[str]:
    notes = [f"Base: {manifest['base']['origin']}."]
    is_asked = any(variant.benchmarks for variant in variants)
    near = ledger["near_duplicates"]
    if near:
        notes.append(
            f"{len(near)} pairs of training and held-out prompts are near duplicates (Jaccard of"
            f" 5-character shingles from {near[-1]['jaccard']}); see ledger.json. Exact duplicates: none."
        )
    else:
        notes.append("No training prompt is an exact or near duplicate of a held-out one.")
    counts = {v.name: sum(v.loss_columns()[1]) for v in variants}
    odd = [name for name, count in counts.items() if count != counts[variants[0].name]]
    if odd:
        notes.append(
            f"{', '.join(odd)}: another tokenizer, so that its loss per token is of other tokens."
        )
    unasked = [variant.name for variant in variants if is_asked and not variant.benchmarks]
    if unasked:
        notes.append(
            f"{', '.join(unasked)}: not asked the benchmarks; a model in llama.cpp cannot be, and examples in"
            " the prompt are for the rows alone."
        )
    for entry in entries:
        cut = entry["finish_reasons"]["length"]
        if cut > MAX_LENGTH_FINISHES * sum(entry["finish_reasons"].values()):
            notes.append(f"{entry['name']}: {cut} answers were cut off at eval.max_new_tokens.")
    notes.append(
        "tokens/s are of this one sitting, batched; compare them with each other, not with other machines."
    )
    return notes


def _row_id(row: Row) -> str:
    """The same for the same conversation, in whichever run and place."""
    turns = [[message.role, message.content] for message in row.messages]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()[:16]


def _answers(rows: list[Row], variants: list[Variant]) -> list[dict[str, Any]]:
    return [
        {
            "place": row.place,
            "id": _row_id(row),
            "prompt": row.messages[-2].content,
            "wanted": row.answer,
            "answers": {v.name: v.answers[i] for v in variants},
            "finish_reasons": {v.name: v.finish_reasons[i] for v in variants},
            "scores": {v.name: {m: s[i] for m, s in v.scores.items()} for v in variants},
        }
        for i, row in enumerate(rows)
    ]
