"""Owns the report: report.json for programs, report.md and report.html for people."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import resources
from typing import Any

from halfbyte.config import Run
from halfbyte.data.rows import Row
from halfbyte.eval.compare import LOSS_METRIC, Variant
from halfbyte.eval.forgetting import benchmark_entries, forgetting_line
from halfbyte.eval.harness import Asked
from halfbyte.eval.intervals import (
    GAIN,
    LOSS,
    NO_GAIN,
    Estimate,
    judge,
    paired_difference,
    ratio_interval,
)
from halfbyte.eval.plots import estimate_of, loss_curve, memory_against_quality, metric_bars
from halfbyte.eval.variants import ADAPTER, BASE_FULL, BASE_NF4, FEWSHOT, MERGED, is_artefact
from halfbyte.run_dir import RunDir, read_json, read_jsonl, write_json, write_jsonl, write_text

MAX_LENGTH_FINISHES = 0.01
MAX_TABLE_ROWS = 150


def write_report(
    folder: RunDir,
    run: Run,
    rows: list[Row],
    variants: list[Variant],
    benchmarks: Sequence[Asked] = (),
) -> dict[str, Any]:
    """Write report.json, .md and .html, answers.jsonl and benchmarks.jsonl; returns report.json's content."""
    report = build_report(folder, run, variants, benchmarks)
    answered = [] if not variants[0].answers else _answers(rows, variants)
    write_jsonl(folder.eval / "answers.jsonl", answered)
    write_jsonl(folder.eval / "benchmarks.jsonl", _benchmark_answers(variants))
    write_json(folder.eval / "report.json", report)
    write_text(folder.eval / "report.md", as_markdown(report))
    write_text(folder.eval / "report.html", _as_html(folder, report, rows, variants))
    return report


def build_report(
    folder: RunDir, run: Run, variants: list[Variant], benchmarks: Sequence[Asked] = ()
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


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a page of Markdown."""
    metrics = _scored(report)
    head = [
        "variant",
        *metrics,
        "held-out loss",
        "weights",
        "tokens/s",
        "cut off",
        "adapter against it",
    ]
    lines = [f"# {report['run']}", "", f"**{report['verdict']}**", ""]
    lines += [f"{report['n']} held-out rows, {report['confidence']:.0%} intervals.", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for entry in report["variants"]:
        cells = [entry["name"], *(_interval(entry[metric]) for metric in metrics)]
        cells += [_interval(entry["held_out_loss_interval"])]
        cells += [f"{entry['weights_bytes'] / 1e6:.0f} MB"]
        cells += [f"{entry['tokens_per_s']:.0f}", str(entry["finish_reasons"]["length"])]
        difference = report["differences"].get(entry["name"])
        cells.append(_signed(difference) if difference else "")
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *_benchmark_table(report), *(f"- {note}" for note in report["notes"]), ""]
    return "\n".join(lines)


def _benchmark_table(report: dict[str, Any]) -> list[str]:
    """Benchmarks in rows, variants in columns."""
    entries = report["benchmarks"]
    if not entries:
        return []
    names = [
        v["name"] for v in report["variants"] if any(v["name"] in e["variants"] for e in entries)
    ]
    lines = [f"**{line}**" for line in report["forgetting"]]
    lines += [
        "",
        "| benchmark | questions | " + " | ".join(names) + " |",
        "|" + " --- |" * (len(names) + 2),
    ]
    for entry in entries:
        cells = [f"{entry['task']} ({entry['metric']})", str(entry["n"])]
        cells += [
            _interval(entry["variants"][name]) if name in entry["variants"] else ""
            for name in names
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


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


def _scored(report: dict[str, Any]) -> list[str]:
    """Metrics with a score for each answer, in the order of the config."""
    return [metric for metric in report["metrics"] if metric != LOSS_METRIC]


def _differences(run: Run, variants: list[Variant], metric: str) -> dict[str, dict[str, Any]]:
    """The adapter's paired difference to every other variant on the deciding metric."""
    ours = _ours(variants)
    if ours is None:
        return {}
    found = {}
    for other in variants:
        if other is not ours:
            difference = _difference(run, ours, other, metric)
            loss = _difference(run, ours, other, LOSS_METRIC)
            scores = ours.scores.get(metric, []), other.scores.get(metric, [])
            found[other.name] = {
                **difference.as_json(),
                "verdict": judge(difference, *scores, run.eval.confidence),
                "held_out_loss_drop": loss.as_json(),
            }
    return found


def _ours(variants: list[Variant]) -> Variant | None:
    """The trained variant that the verdict is about."""
    by_name = {variant.name: variant for variant in variants}
    return by_name.get(ADAPTER) or by_name.get(MERGED)


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
    own = next((e for e in entries if e["name"] in (ADAPTER, MERGED)), None)
    baselines = [BASE_FULL, FEWSHOT, *(baseline.name for baseline in run.eval.baselines)]
    parts = [
        f"{differences[name]['verdict']} against {name} ({_signed(differences[name])})"
        for name in (*baselines, BASE_NF4)
        if name in differences
    ]
    if own is None or not parts:
        return "No verdict: the comparison has no trained variant, or no baseline beside it."
    estimate = _interval(estimate_of(own, metric))
    return f"{own['name']}: {metric} {estimate} — " + "; ".join(parts) + "."


def _notes(
    ledger: dict[str, Any],
    entries: list[dict[str, Any]],
    manifest: dict[str, Any],
    variants: list[Variant],
) -> list[str]:
    notes = [f"Base: {manifest['base']['origin']}."]
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
    for entry in entries:
        cut = entry["finish_reasons"]["length"]
        if cut > MAX_LENGTH_FINISHES * sum(entry["finish_reasons"].values()):
            notes.append(f"{entry['name']}: {cut} answers were cut off at eval.max_new_tokens.")
    notes.append(
        "tokens/s are of this one sitting, batched; compare them with each other, not with other machines."
    )
    return notes


def _answers(rows: list[Row], variants: list[Variant]) -> list[dict[str, Any]]:
    return [
        {
            "place": row.place,
            "prompt": row.messages[-2].content,
            "wanted": row.answer,
            "answers": {v.name: v.answers[i] for v in variants},
            "scores": {v.name: {m: s[i] for m, s in v.scores.items()} for v in variants},
        }
        for i, row in enumerate(rows)
    ]


def _as_html(
    folder: RunDir, report: dict[str, Any], rows: list[Row], variants: list[Variant]
) -> str:
    import jinja2

    metric = report["metric"]
    records = list(read_jsonl(folder.metrics))
    template = (
        resources.files("halfbyte.eval").joinpath("templates/report.html.jinja").read_text("utf-8")
    )
    table = _wins_and_losses(rows, variants, metric)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(
        report=report,
        metrics=_scored(report),
        benchmarked={name for entry in report["benchmarks"] for name in entry["variants"]},
        plots=[
            ("Score with interval", metric_bars(report)),
            ("Memory against quality", memory_against_quality(report)),
            ("Loss during training", loss_curve(records)),
        ],
        wins=table,
        shown=table[:MAX_TABLE_ROWS],
    )


def _wins_and_losses(rows: list[Row], variants: list[Variant], metric: str) -> list[dict[str, Any]]:
    """Rows on which the trained variant and the full-size base differ; losses come first."""
    by_name = {variant.name: variant for variant in variants}
    ours = by_name.get(ADAPTER) or by_name.get(MERGED) or variants[-1]
    theirs = by_name.get(BASE_FULL) or by_name.get(FEWSHOT) or variants[0]
    table: list[dict[str, Any]] = []
    if metric == LOSS_METRIC:
        return table
    for i, row in enumerate(rows):
        difference = ours.scores[metric][i] - theirs.scores[metric][i]
        if difference:
            table.append(
                {
                    "outcome": "win" if difference > 0 else "loss",
                    "prompt": row.messages[-2].content,
                    "wanted": row.answer,
                    "ours": ours.answers[i],
                    "theirs": theirs.answers[i],
                    "ours_name": ours.name,
                    "theirs_name": theirs.name,
                }
            )
    return sorted(table, key=lambda entry: entry["outcome"])


def _interval(estimate: dict[str, Any]) -> str:
    return f"{estimate['value']:.3f} [{estimate['ci_low']:.3f}, {estimate['ci_high']:.3f}]"


def _signed(difference: dict[str, Any]) -> str:
    low, high = difference["ci_low"], difference["ci_high"]
    return f"{difference['value']:+.3f} [{low:+.3f}, {high:+.3f}]"
