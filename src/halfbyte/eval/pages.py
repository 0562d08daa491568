"""Owns how a report reads: a page of Markdown, and one HTML file that needs nothing else."""

from __future__ import annotations

import difflib
import json
import re
from importlib import resources
from typing import Any

from halfbyte.eval.measure import LOSS_METRIC
from halfbyte.eval.plots import (
    answer_lengths,
    difference_bars,
    loss_curve,
    memory_against_quality,
    metric_bars,
)
from halfbyte.eval.variants import BASE_FULL, BASE_NF4, FEWSHOT, trained_name

MAX_SHOWN_ROWS = 600
# Heading, key of a variant's entry, decimals.
RATES = (
    ("tokens/s prompt", "prompt_tokens_per_s", 0),
    ("tokens/s answer", "tokens_per_s", 0),
    ("s per 1,000 rows", "seconds_per_1000_rows", 0),
    ("Wh per 1,000 rows", "watt_hours_per_1000_rows", 2),
)
FIRST_OPPONENTS = (BASE_FULL, FEWSHOT, BASE_NF4)


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a page of Markdown."""
    metrics = _scored(report)
    head = [
        "variant",
        *metrics,
        "held-out loss",
        "cut off",
        f"{_ours(report)} against it",
    ]
    lines = [f"# {report['run']}", "", f"**{report['verdict']}**", ""]
    lines += [f"{report['n']} held-out rows, {report['confidence']:.0%} intervals.", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for entry in report["variants"]:
        cells = [entry["name"], *(interval(entry[metric]) for metric in metrics)]
        cells += [interval(entry["held_out_loss_interval"])]
        cells += [str(entry["finish_reasons"]["length"])]
        difference = report["differences"].get(entry["name"])
        cells.append(signed(difference) if difference else "")
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        *_cost_table(report),
        *judged_lines(report),
        *_benchmark_table(report),
        *(f"- {note}" for note in report["notes"]),
        "",
    ]
    return "\n".join(lines)


def _cost_table(report: dict[str, Any]) -> list[str]:
    """What each variant takes; energy where it was counted or reckoned."""
    head = ["variant", "what it is", "in memory", "on disk", *(label for label, _, _ in RATES)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for entry in report["variants"]:
        cells = [entry["name"], entry["what"].replace("|", "\\|")]
        cells += [f"{entry[key] / 1e6:.0f} MB" for key in ("weights_bytes", "disk_bytes")]
        cells += [rate(entry[key], decimals) for _, key, decimals in RATES]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def judged_lines(report: dict[str, Any]) -> list[str]:
    """What the judge preferred, a sentence for each variant."""
    return [
        f"{told['model']} prefers the trained model's answer to {name}'s in {interval(told)} of {told['n']}"
        f" rows ({told['undecided']} undecided count half)."
        for name, told in report.get("judged", {}).items()
    ]


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
            interval(entry["variants"][name]) if name in entry["variants"] else "" for name in names
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _scored(report: dict[str, Any]) -> list[str]:
    """Metrics with a score for each answer, in the order of the config."""
    return [metric for metric in report["metrics"] if metric != LOSS_METRIC]


def as_html(
    report: dict[str, Any],
    answered: list[dict[str, Any]],
    training: list[dict[str, Any]],
    manifest: dict[str, Any],
) -> str:
    """The report as a page: figures, pictures, every row with its answers, and what was run.

    Args:
        report: of ``build_report``.
        answered: the rows of answers.jsonl.
        training: the records of metrics.jsonl.
        manifest: of the run.
    """
    import jinja2

    folder = resources.files("halfbyte.eval").joinpath("templates")
    names = [entry["name"] for entry in report["variants"]]
    ours = _ours(report)
    others = sorted((name for name in names if name != ours), key=_opponent_rank)
    pictures = [
        ("Score with interval", metric_bars(report)),
        ("Memory against quality", memory_against_quality(report)),
        (f"{ours}: by how much it is better", difference_bars(report)),
        ("Length of answers", answer_lengths(report)),
        ("Loss during training", loss_curve(training)),
    ]
    has_energy = any(entry["watts"] is not None for entry in report["variants"])
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = folder.joinpath("report.html.jinja").read_text("utf-8")
    return environment.from_string(template).render(
        report=report,
        metrics=_scored(report),
        rates=RATES[: None if has_energy else -1],
        benchmarked={name for entry in report["benchmarks"] for name in entry["variants"]},
        plots=[(title, svg) for title, svg in pictures if svg],
        ours=ours,
        others=others,
        rows=[_row(row, report["metric"], ours, others) for row in answered[:MAX_SHOWN_ROWS]],
        num_rows=len(answered),
        judged=judged_lines(report),
        manifest=json.dumps(manifest, indent=1, ensure_ascii=False),
        script=folder.joinpath("report.js").read_text("utf-8"),
    )


def _ours(report: dict[str, Any]) -> str:
    """The variant that the others are compared with."""
    names = [entry["name"] for entry in report["variants"]]
    return trained_name(names) or str(names[-1])


def _opponent_rank(name: str) -> tuple[int, str]:
    known = FIRST_OPPONENTS.index(name) if name in FIRST_OPPONENTS else len(FIRST_OPPONENTS)
    return known, name


def _row(row: dict[str, Any], metric: str, ours: str, others: list[str]) -> dict[str, Any]:
    """One row for the page: who answered what, what of it was wanted, and who did better."""
    scores = {name: told.get(metric) for name, told in row["scores"].items()}
    return {
        "place": row["place"],
        "prompt": row["prompt"],
        "wanted": row["wanted"],
        "answers": [
            {
                "name": name,
                "score": scores[name],
                "is_cut": row["finish_reasons"][name] == "length",
                "words": marked_words(row["answers"][name], row["wanted"]),
            }
            for name in (ours, *others)
        ],
        "outcomes": json.dumps({name: _outcome(scores[ours], scores[name]) for name in others}),
        "is_wrong": scores[ours] is not None and scores[ours] < 1,
        "is_cut": row["finish_reasons"][ours] == "length",
    }


def _outcome(ours: float | None, theirs: float | None) -> str:
    if ours is None or theirs is None or ours == theirs:
        return "same"
    return "win" if ours > theirs else "loss"


def marked_words(answer: str, wanted: str) -> list[tuple[str, bool]]:
    """Pieces of an answer, each with whether it differs from what was wanted; together they are the answer."""
    words, needed = (re.findall(r"\s+|[^\W_]+|[\W_]", text) for text in (answer, wanted))
    matcher = difflib.SequenceMatcher(None, words, needed, autojunk=False)
    return [
        ("".join(words[start:end]), kind != "equal")
        for kind, start, end, _, _ in matcher.get_opcodes()
        if end > start
    ]


def rate(value: float | None, decimals: int = 0) -> str:
    """Tokens a second, or seconds; "" where they were not measured."""
    return "" if value is None else f"{value:.{decimals}f}"


def interval(estimate: dict[str, Any]) -> str:
    """A value with its interval."""
    return f"{estimate['value']:.3f} [{estimate['ci_low']:.3f}, {estimate['ci_high']:.3f}]"


def signed(difference: dict[str, Any]) -> str:
    """A difference with its interval."""
    low, high = difference["ci_low"], difference["ci_high"]
    return f"{difference['value']:+.3f} [{low:+.3f}, {high:+.3f}]"
