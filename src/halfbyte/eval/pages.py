"""Owns the report's pages: one of Markdown, and one HTML file that needs no other file."""

from __future__ import annotations

import difflib
import json
import re
from importlib import resources
from typing import Any

from halfbyte.config.section import OPPONENTS
from halfbyte.data.thoughts import split_thoughts, without_thoughts
from halfbyte.eval.plots import (
    answer_lengths,
    difference_bars,
    learning_curve,
    loss_curve,
    memory_against_quality,
    metric_bars,
    time_against_quality,
)
from halfbyte.eval.report_record import Curve, Report, by_score
from halfbyte.eval.variants import BASE_FULL, BASE_NF4, FEWSHOT, trained_name
from halfbyte.scoring.rows import LOSS_METRIC

MAX_SHOWN_ROWS = 600
# Heading, key in a variant's entry, decimals.
RATES = (
    ("prompt tokens/s", "prompt_tokens_per_s", 0),
    ("answer tokens/s", "tokens_per_s", 0),
    ("seconds per 1,000 rows", "seconds_per_1000_rows", 0),
    ("Wh per 1,000 rows", "watt_hours_per_1000_rows", 2),
)
CHEAPEST = "the cheapest that is as good"
FIRST_OPPONENTS = (BASE_FULL, FEWSHOT, BASE_NF4)


def as_markdown(report: Report) -> str:
    """Format the report as a page of Markdown."""
    metrics, ours = _answer_metrics(report), _ours(report)
    head = [
        "variant",
        *metrics,
        "held-out loss",
        "answers cut off",
        f"difference to {ours}",
    ]
    if has_thoughts(report):
        head.append("answers with thoughts")
    lines = [f"# {report.run}", "", f"**{report.verdict}**", ""]
    lines += [
        f"{report.n} held-out rows, {report.confidence:.0%} confidence intervals."
        f" A positive difference means that {ours} is better.",
        "",
    ]
    lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for entry in by_score(report):
        name = entry["name"] + (f" ({CHEAPEST})" if entry["name"] == report.cheapest else "")
        cells = [name, *(interval(entry[metric]) for metric in metrics)]
        cells += [interval(entry["held_out_loss_interval"])]
        cells += [str(entry["finish_reasons"]["length"])]
        difference = report.differences.get(entry["name"])
        cells.append(signed(difference) if difference else "")
        if has_thoughts(report):
            cells.append(thoughts_of(entry))
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        *_cost_table(report),
        *judged_lines(report),
        *_benchmark_table(report),
        *(f"- {note}" for note in report.notes),
        "",
    ]
    return "\n".join(lines)


def has_thoughts(report: Report) -> bool:
    """Return whether any answer of a comparison begins with thoughts, or should."""
    keys = ("thoughts", "thoughts_wanted")
    return any(entry.get(key) for entry in report.variants for key in keys)


def thoughts_of(entry: dict[str, Any]) -> str:
    """Say which share of a variant's answers has thoughts, and how long they are in the median."""
    count, total = entry["thoughts"], sum(entry["finish_reasons"].values())
    if not count:
        return "none"
    return f"{count / total:.0%}, {entry['lengths']['thoughts'][1]:.0f} tokens"


def _cost_table(report: Report) -> list[str]:
    """Format what each variant costs; energy is given where it was measured or can be computed."""
    head = ["variant", "description", "in memory", "on disk", *(label for label, _, _ in RATES)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for entry in report.variants:
        cells = [entry["name"], entry["what"].replace("|", "\\|")]
        cells += [f"{entry[key] / 1e6:.0f} MB" for key in ("weights_bytes", "disk_bytes")]
        cells += [rate(entry[key], decimals) for _, key, decimals in RATES]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def judged_lines(report: Report) -> list[str]:
    """Say what the judge preferred, in a sentence for each variant."""
    return [
        f"Judge {judged['model']} prefers the trained model's answer to that of {name} in a share of"
        f" {interval(judged)} of {judged['n']} rows ({judged['undecided']} undecided rows count half)."
        for name, judged in report.judged.items()
    ]


def _benchmark_table(report: Report) -> list[str]:
    """Format the benchmarks in rows and the variants in columns."""
    entries = report.benchmarks
    if not entries:
        return []
    names = [v["name"] for v in report.variants if any(v["name"] in e["variants"] for e in entries)]
    lines = [f"**{line}**" for line in report.forgetting]
    lines += [
        "",
        "| benchmark | questions | " + " | ".join(names) + " |",
        "|" + " --- |" * (len(names) + 2),
    ]
    for entry in entries:
        cells = [f"{entry['task']} ({entry['metric']})", str(entry["n"])]
        cells += [
            interval(entry["variants"][name]) if name in entry["variants"] else "" for name in names
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _answer_metrics(report: Report) -> list[str]:
    """Return the metrics that score each answer, in the order of the config."""
    return [metric for metric in report.metrics if metric != LOSS_METRIC]


def as_html(
    report: Report,
    answered: list[dict[str, Any]],
    training: list[dict[str, Any]],
    manifest: dict[str, Any],
    curve: Curve | None = None,
) -> str:
    """Format the report as an HTML page: figures, charts, every row with its answers, and the settings.

    Args:
        report: the result of ``build_report``.
        answered: the rows of answers.jsonl.
        training: the records of metrics.jsonl.
        manifest: the manifest of the run.
        curve: the learning curve, if there is one.
    """
    import jinja2

    folder = resources.files("halfbyte.eval").joinpath("templates")
    names = [entry["name"] for entry in report.variants]
    ours = _ours(report)
    others = sorted((name for name in names if name != ours), key=_opponent_rank)
    charts = [
        ("Score with confidence interval", metric_bars(report)),
        ("Memory and quality", memory_against_quality(report)),
        ("Time and quality", time_against_quality(report)),
        (f"How much better {ours} is", difference_bars(report)),
        ("Length of answers", answer_lengths(report)),
        ("Loss during training", loss_curve(training)),
        *([(f"Training rows: {curve.line}", learning_curve(curve))] if curve else []),
    ]
    has_energy = any(entry["watts"] is not None for entry in report.variants)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = folder.joinpath("report.html.jinja").read_text("utf-8")
    return environment.from_string(template).render(
        report=report,
        entries=by_score(report),
        cheapest=CHEAPEST,
        metrics=_answer_metrics(report),
        rates=RATES[: None if has_energy else -1],
        thoughts={entry["name"]: thoughts_of(entry) for entry in report.variants}
        if has_thoughts(report)
        else {},
        benchmarked={name for entry in report.benchmarks for name in entry["variants"]},
        plots=[(title, svg) for title, svg in charts if svg],
        ours=ours,
        others=others,
        rows=[_row(row, report.metric, ours, others) for row in answered[:MAX_SHOWN_ROWS]],
        num_rows=len(answered),
        judged=judged_lines(report),
        manifest=json.dumps(manifest, indent=1, ensure_ascii=False),
        script=folder.joinpath("report.js").read_text("utf-8"),
    )


def _ours(report: Report) -> str:
    """Return the name of the variant that the others are compared with."""
    names = [entry["name"] for entry in report.variants]
    models = [name for name in names if name not in OPPONENTS]
    return trained_name(names) or str((models or names)[-1])


def _opponent_rank(name: str) -> tuple[int, str]:
    """Return the key that sorts opponents: the first ones, then the others by name."""
    rank = FIRST_OPPONENTS.index(name) if name in FIRST_OPPONENTS else len(FIRST_OPPONENTS)
    return rank, name


def _row(row: dict[str, Any], metric: str, ours: str, others: list[str]) -> dict[str, Any]:
    """Return one row for the page: the answers with their differing words marked, and who did better."""
    wanted = without_thoughts(row["wanted"])
    scores = {name: by_metric.get(metric) for name, by_metric in row["scores"].items()}
    return {
        "place": row["place"],
        "prompt": row["prompt"],
        "wanted": wanted,
        "answers": [
            {
                "name": name,
                "score": scores[name],
                "is_cut": row["finish_reasons"][name] == "length",
                "thoughts": thoughts,
                "words": marked_words(answer, wanted),
            }
            for name in (ours, *others)
            for thoughts, answer in [split_thoughts(row["answers"][name])]
        ],
        "outcomes": json.dumps({name: _outcome(scores[ours], scores[name]) for name in others}),
        "is_wrong": scores[ours] is not None and scores[ours] < 1,
        "is_cut": row["finish_reasons"][ours] == "length",
    }


def _outcome(ours: float | None, theirs: float | None) -> str:
    """Return ``win``, ``loss`` or ``same``, by which the page filters rows."""
    if ours is None or theirs is None or ours == theirs:
        return "same"
    return "win" if ours > theirs else "loss"


def marked_words(answer: str, wanted: str) -> list[tuple[str, bool]]:
    """Split an answer into pieces, each with whether it differs from the wanted answer."""
    words, wanted_words = (re.findall(r"\s+|[^\W_]+|[\W_]", text) for text in (answer, wanted))
    matcher = difflib.SequenceMatcher(None, words, wanted_words, autojunk=False)
    return [
        ("".join(words[start:end]), kind != "equal")
        for kind, start, end, _, _ in matcher.get_opcodes()
        if end > start
    ]


def rate(value: float | None, decimals: int = 0) -> str:
    """Format a rate or a time; "" where it was not measured."""
    return "" if value is None else f"{value:.{decimals}f}"


def interval(estimate: dict[str, Any] | None) -> str:
    """Format a value with its confidence interval; "" where it was not measured."""
    if estimate is None:
        return ""
    return f"{estimate['value']:.3f} [{estimate['ci_low']:.3f}, {estimate['ci_high']:.3f}]"


def signed(difference: dict[str, Any]) -> str:
    """Format a difference, with signs, and its confidence interval."""
    low, high = difference["ci_low"], difference["ci_high"]
    return f"{difference['value']:+.3f} [{low:+.3f}, {high:+.3f}]"
