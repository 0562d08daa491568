"""Owns the report's charts, as inline SVG."""

from __future__ import annotations

import io
import math
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from halfbyte.eval.report_record import Curve, Report, by_score, estimate_of
from halfbyte.eval.variants import TRAINED

# Size of a label in the chart of memory and quality, as shares of its axes.
LABEL_WIDTH, LABEL_HEIGHT = 0.25, 0.085
MIN_SECONDS = 0.1  # that the chart of time and quality shows
INK, OURS, OTHERS, BAD = "#1f2933", "#0f766e", "#94a3b8", "#b91c1c"


def metric_bars(report: Report) -> str:
    """Draw the deciding metric of each variant with its confidence interval, the best one first."""
    entries = by_score(report)
    figure, axes = _figure(height=0.5 + 0.42 * len(entries))
    for row, entry in enumerate(reversed(entries)):
        estimate = estimate_of(entry, report.metric)
        axes.barh(row, estimate["value"], color=_colour(entry), height=0.6)
        axes.plot([estimate["ci_low"], estimate["ci_high"]], [row, row], color=INK, linewidth=1.5)
        axes.text(
            estimate["ci_high"] + 0.01, row, f"{estimate['value']:.2f}", va="center", fontsize=9
        )
    axes.set_yticks(range(len(entries)), [entry["name"] for entry in reversed(entries)])
    highest = max(estimate_of(entry, report.metric)["ci_high"] for entry in entries)
    axes.set_xlim(0, max(1.0, highest) * 1.1)
    axes.set_xlabel(report.metric.replace("_", " "))
    return _svg(figure)


def memory_against_quality(report: Report) -> str:
    """Draw each variant's weights in MB against the deciding metric."""
    megabytes = {entry["name"]: entry["weights_bytes"] / 1e6 for entry in report.variants}
    return _cost_against_quality(report, megabytes, "weights, MB")


def time_against_quality(report: Report) -> str:
    """Draw each variant's seconds per 1,000 rows, on a logarithmic scale, against the deciding metric."""
    seconds = {
        entry["name"]: math.log10(max(entry["seconds_per_1000_rows"], MIN_SECONDS))
        for entry in report.variants
        if entry["seconds_per_1000_rows"] is not None
    }
    return _cost_against_quality(report, seconds, "seconds per 1,000 rows", is_log=True)


def _cost_against_quality(
    report: Report, costs: dict[str, float], label: str, *, is_log: bool = False
) -> str:
    """Draw the cost of each variant, or its logarithm, against the deciding metric; "" without any."""
    entries = [entry for entry in report.variants if entry["name"] in costs]
    if not entries:
        return ""
    figure, axes = _figure(height=2.8)
    points = {}
    for entry in entries:
        estimate, cost = estimate_of(entry, report.metric), costs[entry["name"]]
        points[entry["name"]] = (cost, estimate["value"])
        axes.plot([cost] * 2, [estimate["ci_low"], estimate["ci_high"]], color=OTHERS, linewidth=1)
        axes.plot(cost, estimate["value"], "o", color=_colour(entry))
    lowest, highest = min(costs.values()), max(costs.values())
    if is_log:
        lowest, highest = math.floor(lowest), max(math.ceil(highest), math.floor(lowest) + 1)
        axes.set_xticks(range(lowest, highest + 1))
        axes.set_xticklabels([f"{10.0**power:,g}" for power in range(lowest, highest + 1)])
    else:
        lowest = 0
    width = 1.35 * ((highest - lowest) or 1)
    axes.set_xlim(lowest - 0.02 * width, lowest + width)
    if report.metric != "held_out_loss":
        axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(label)
    axes.set_ylabel(report.metric.replace("_", " "))
    for name, y in label_places(points, width, axes.get_ylim()).items():
        axes.text(points[name][0] + 0.015 * width, y, name, va="center", fontsize=9)
    return _svg(figure)


def label_places(
    points: dict[str, tuple[float, float]], width: float, limits: tuple[float, float]
) -> dict[str, float]:
    """Return the heights of labels beside their points, moved apart where they would overlap.

    Args:
        points: points by label, in the units of the axes.
        width: width of the axes.
        limits: lowest and highest value of the axes.
    """
    distance = LABEL_HEIGHT * (limits[1] - limits[0])
    placed: dict[str, float] = {}
    for name, (x, y) in sorted(points.items(), key=lambda item: item[1][1]):
        overlapping = [
            placed[other]
            for other in placed
            if abs(points[other][0] - x) < LABEL_WIDTH * width and placed[other] > y - distance
        ]
        placed[name] = max([y, *(height + distance for height in overlapping)])
    return placed


def difference_bars(report: Report) -> str:
    """Draw the trained variant's difference to the base on the domain and in each benchmark; "" without."""
    name = next((n for n in ("base-full", "base-nf4") if n in report.differences), None)
    if name is None:
        return ""
    bars = [(report.metric, report.differences[name], INK)]
    for entry in report.benchmarks:
        if name in entry["differences"]:
            difference = entry["differences"][name]
            colour = {"forgets": BAD, "better": OURS}.get(difference["verdict"], OTHERS)
            bars.append((entry["task"], difference, colour))
    figure, axes = _figure(height=0.7 + 0.42 * len(bars))
    for row, (_, difference, colour) in enumerate(reversed(bars)):
        ends = [difference["ci_low"], difference["ci_high"]]
        axes.plot(ends, [row, row], color=colour, linewidth=1.5)
        axes.plot(difference["value"], row, "o", color=colour)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(bars)), [label.replace("_", " ") for label, *_ in reversed(bars)])
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.set_xlabel(f"difference to {name}")
    return _svg(figure)


def answer_lengths(report: Report) -> str:
    """Draw the lengths of the middle 80 % of each variant's answers, in tokens, and of the wanted ones."""
    bars = [(e["name"], e["lengths"], e) for e in report.variants if e["lengths"]["answers"]]
    if not bars:
        return ""
    figure, axes = _figure(height=0.7 + 0.42 * len(bars))
    for row, (_, lengths, entry) in enumerate(reversed(bars)):
        low, middle, high = lengths["answers"]
        colour = _colour(entry)
        axes.plot([low, high], [row, row], color=colour, linewidth=6, solid_capstyle="butt")
        axes.plot(middle, row, "|", color=INK, markersize=12)
        cut, total = entry["finish_reasons"]["length"], sum(entry["finish_reasons"].values())
        axes.text(high + 0.5, row, f"{cut / total:.0%} cut off", va="center", fontsize=9)
    low, _, high = bars[0][1]["wanted"]
    axes.axvspan(low, high, color=OURS, alpha=0.12, linewidth=0)
    axes.set_yticks(range(len(bars)), [name for name, *_ in reversed(bars)])
    axes.set_xlim(0, 1.25 * max(lengths["answers"][2] for _, lengths, _ in bars) + 1)
    axes.set_xlabel("tokens per answer (10th, 50th, 90th percentile); shaded: expected answers")
    return _svg(figure)


def loss_curve(records: list[dict[str, Any]]) -> str:
    """Draw training and held-out loss by step, in nats per labelled token."""
    figure, axes = _figure(height=2.8)
    for key, label, colour, style in (
        ("loss", "training", OTHERS, "-"),
        ("eval_loss", "held out", OURS, "o-"),
    ):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _svg(figure)


def learning_curve(curve: Curve) -> str:
    """Draw the score of each variant against the number of training rows, on a logarithmic scale."""
    figure, axes = _figure(height=2.8)
    sizes = [point.rows for point in curve.points]
    for name in curve.points[-1].scores:
        estimates = [point.scores[name] for point in curve.points]
        values = [estimate["value"] for estimate in estimates]
        below = [one["value"] - one["ci_low"] for one in estimates]
        above = [one["ci_high"] - one["value"] for one in estimates]
        colour = OURS if name == curve.ours else OTHERS
        axes.errorbar(sizes, values, yerr=[below, above], fmt="o-", color=colour, markersize=4)
        axes.text(sizes[-1] * 1.05, values[-1], name, va="center", fontsize=9)
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlim(sizes[0] * 0.8, sizes[-1] * 2.5)
    axes.set_xlabel("training rows")
    axes.set_ylabel(curve.metric.replace("_", " "))
    return _svg(figure)


def _colour(entry: dict[str, Any]) -> str:
    """Return the colour of a variant, by whether it is a trained one."""
    return OURS if entry["name"] in TRAINED else OTHERS


def _figure(height: float) -> tuple[Figure, Any]:
    """Return an empty figure of this height and its axes."""
    figure = Figure(figsize=(6.4, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> str:
    """Return a figure as an ``<svg>`` element."""
    stream = io.StringIO()
    # With a fixed salt and without a date, the same numbers give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "halfbyte", "font.size": 10}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
