"""Owns the charts of a plan: bytes by row length, by term and by precision, as a PNG and an HTML page."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from halfbyte.plan.advice import micro_batches
from halfbyte.plan.devices import ASSUMED
from halfbyte.plan.memory import checkpointing_text
from halfbyte.plan.report import Plan
from halfbyte.plan.report_text import TERMS
from halfbyte.plan.shape import Lengths
from halfbyte.plan.weights import STORED
from halfbyte.run_dir import write_text

INK, OURS, BAD = "#1f2933", "#0f766e", "#b91c1c"
LINES = (("#b6c2d1", "o"), ("#94a3b8", "s"), ("#64748b", "^"), ("#475569", "D"))
ROWS = (
    8,
    4,
    2,
)  # of a micro-batch, drawn besides 1 and the planned number; the first ones are preferred
SHORTEST, LONGEST = 128, 2048  # tokens; longer plans are drawn up to twice their length
TRACED_LAYERS = 80  # limit for all points together; a layer takes about 0.1 s
SMALL = 0.02  # of the needed bytes: smaller terms share a bar
CLIP = 2.5  # times the device's memory: larger values are outside the chart
FAR = 3.0  # times the largest value: a device with more memory is named but not drawn
# The settings that a plan depends on besides the model's name; no keys mean the whole section.
SETTINGS: dict[str, tuple[str, ...]] = {
    "model": (),
    "adapter": (),
    "data": ("max_length",),
    "train": ("batch_size", "micro_batch_size", "optimizer", "checkpointing"),
}

Curves = dict[int, dict[int, int]]  # rows → length → bytes needed
Charts = dict[str, Callable[[Any], None]]  # title → the function that draws it on axes


def write_plots(plan: Plan, report: dict[str, Any], name: Path) -> list[Path]:
    """Write the charts of a plan.

    Args:
        plan: the plan.
        report: the result of ``as_json`` for the plan.
        name: path of both files, which differ in their suffixes.

    Returns:
        The PNG, then the HTML page, which also has the report's tables.
    """
    stem = name.with_suffix("") if name.suffix.lower() in (".png", ".html") else name
    png, html = (stem.with_name(stem.name + suffix) for suffix in (".png", ".html"))
    curves = trace_curves(plan)
    charts: Charts = {
        "Needed by row length, GB": lambda axes: _draw_curves(axes, plan, report, curves),
        "Needed at the peak, GB": lambda axes: _draw_terms(axes, report),
        "Weights in memory by precision, GB": lambda axes: _draw_load(axes, report),
    }
    png.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=png.parent) as folder:
        _draw_png(report, charts).savefig(Path(folder, png.name), format="png")
        os.replace(Path(folder, png.name), png)
    write_text(html, _html(plan, report, charts))
    return [png, html]


def trace_curves(plan: Plan) -> Curves:
    """Plan the bytes needed at several row lengths, for several micro-batches that the run could have."""
    planner, train = plan.planner, plan.train
    base, extra = planner.step.cut.base, planner.step.cut.extra
    num_points = TRACED_LAYERS // (len(base) + len(extra) * (len(base) + 1))
    possible = micro_batches(plan.run.train.batch_size // planner.world)
    others = [n for n in (1, *ROWS) if n in possible and n != train.micro_batch_size]
    others = others[: 4 if num_points >= 5 * 5 else 3 if num_points >= 4 * 4 else 2]
    lengths = _row_lengths(plan, min(8, max(3, num_points // (1 + len(others)))))
    limit = plan.device.total_bytes - plan.device.in_use_bytes
    curves: Curves = {}
    for rows in sorted([train.micro_batch_size, *others]):
        curve = {train.length: train.needed_bytes} if rows == train.micro_batch_size else {}
        for length in lengths:
            if length not in curve:
                micro_batch = Lengths.all_of(length, rows)
                other = planner.train(
                    micro_batch,
                    rows,
                    checkpointing=train.checkpointing,
                    recompute=train.shape.recompute,
                )
                curve[length] = other.needed_bytes
            if curve[length] > max(CLIP * limit, 1.25 * train.needed_bytes):
                break  # longer rows are outside the chart
        curves[rows] = dict(sorted(curve.items()))
    return curves


def _row_lengths(plan: Plan, max_lengths: int) -> list[int]:
    """Return powers of two that the model accepts: the shortest, and the longest of the others."""
    longest = max(LONGEST, 2 * plan.train.length)
    text = plan.planner.config.get_text_config()
    longest = min(longest, getattr(text, "max_position_embeddings", None) or longest)
    powers = [1 << n for n in range(SHORTEST.bit_length() - 1, longest.bit_length())]
    return [*powers[:1], *powers[1:][1 - max_lengths :]] or [plan.train.length]


def _limit(report: dict[str, Any], highest: float) -> tuple[float, bool, str]:
    """Return the device's memory in GB, whether it is near enough to draw, and its label."""
    device = report["device"]
    limit = (device["total_bytes"] - device["in_use_bytes"]) / 1e9
    title = device["title"] if len(device["title"]) <= 32 else device["title"][:31] + "…"
    text = f"{title}: {limit:.3f} GB{' free' if device['in_use_bytes'] else ''}"
    near = limit <= FAR * highest
    return limit, near, f"dashed: {text}" if near else f"{text}, outside the chart"


def _draw_curves(axes: Any, plan: Plan, report: dict[str, Any], curves: Curves) -> None:
    train, needed = plan.train, plan.train.needed_bytes / 1e9
    lines = iter(LINES)
    axes.spines[["top", "right"]].set_visible(False)
    for rows, curve in curves.items():
        planned = rows == train.micro_batch_size
        colour, marker = (OURS, ".") if planned else next(lines)
        sizes = [size / 1e9 for size in curve.values()]
        label = f"{rows} row{'s' if rows > 1 else ''}"
        axes.plot(list(curve), sizes, marker + "-", color=colour, lw=1 + planned, ms=5, label=label)
    ring = OURS if plan.fits else BAD
    axes.plot(train.length, needed, "o", ms=11, mfc="none", mec=ring, mew=2, zorder=5)
    lengths = sorted({length for curve in curves.values() for length in curve})
    highest = max(size for curve in curves.values() for size in curve.values()) / 1e9
    limit, near, device_label = _limit(report, highest)
    top = min(1.08 * max(highest, limit * near), max(CLIP * limit, 1.25 * needed))
    y_label = f"GB, checkpointing {checkpointing_text(train.recompute)}"
    axes.set(xlim=(0, 1.03 * lengths[-1]), ylim=(0, top), ylabel=y_label)
    axes.set_xticks([length for length in lengths if length > lengths[-1] / 9])
    circle = f"circle: planned {train.micro_batch_size} × {train.length}, {needed:.3f} GB"
    axes.set_xlabel(f"tokens in a row; {circle}\n{device_label}", fontsize=9, parse_math=False)
    if near:
        axes.axhline(limit, color=BAD, lw=1.2, ls="--", zorder=0.5)
    style = {"frameon": False, "fontsize": 9, "columnspacing": 1.2, "handlelength": 1.6}
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(curves), **style)


def _draw_terms(axes: Any, report: dict[str, Any]) -> None:
    """Draw a bar for each term, the largest first, each beginning where the last one ends."""
    train, needed = report["train"], report["train"]["needed_bytes"]
    terms = {name.replace("_", " "): train[f"{name}_bytes"] for name in TERMS}
    largest_first = sorted(((size, name) for name, size in terms.items() if size > 0), reverse=True)
    small = [size for size, _ in largest_first if size < SMALL * needed]
    others = [(sum(small), f"{len(small)} others")]
    bars = [*largest_first[: -len(small)], *others] if len(small) > 1 else largest_first
    starts = [sum(size for size, _ in bars[:row]) for row in range(len(bars))]
    _draw_bars(axes, report, [*bars, (needed, "needed")], [*starts, 0])


def _draw_load(axes: Any, report: dict[str, Any]) -> None:
    labels = {"nf4_single": "nf4, no double\nquantisation"}
    bars = [(report["load"][name]["true_bytes"], labels.get(name, name)) for name in STORED]
    _draw_bars(axes, report, bars, [0] * len(bars))


def _draw_bars(
    axes: Any, report: dict[str, Any], bars: list[tuple[int, str]], starts: list[int]
) -> None:
    """Draw bars with their bytes, and the device's memory as a line where it is near enough."""
    axes.spines[["top", "right"]].set_visible(False)
    for row, ((size, name), start) in enumerate(zip(bars, starts, strict=True)):
        colour, end = INK if name == "needed" else OURS, (start + size) / 1e9
        axes.barh(row, size / 1e9, left=start / 1e9, color=colour, height=0.64)
        text = axes.annotate(
            f"{size / 1e9:.3f}", (end, row), (4, 0), textcoords="offset points", va="center"
        )
        text.set(fontsize=9, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    highest = max(size for size, _ in bars) / 1e9
    limit, near, label = _limit(report, highest)
    if near:
        axes.axvline(limit, color=BAD, lw=1.2, ls="--", zorder=0.5)
    axes.set_yticks(range(len(bars)), [name for _, name in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.2 * highest, 1.04 * limit * near))
    axes.set_xlabel(label, color=BAD, fontsize=9, parse_math=False)


def _draw_png(report: dict[str, Any], charts: Charts) -> Figure:
    figure = Figure(figsize=(11, 8), dpi=150)
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.12)
    title = f"{report['target']}\n{_verdict(report)}"
    figure.suptitle(title, fontsize=13, parse_math=False)
    mosaic = figure.subplot_mosaic([[0, 0], [1, 2]], height_ratios=(1.1, 1))
    for axes, (title, draw) in zip(mosaic.values(), charts.items(), strict=True):
        draw(axes)
        pad = 26 if axes.get_legend() else 8
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=pad)
    return figure


def _svg(draw: Callable[[Any], None]) -> str:
    figure = Figure(figsize=(4.8, 3.5), layout="constrained")
    draw(figure.add_subplot())
    stream = io.StringIO()
    # With a fixed salt and no date the same numbers give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "halfbyte"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _html(plan: Plan, report: dict[str, Any], charts: Charts) -> str:
    import jinja2

    template = resources.files("halfbyte.plan").joinpath("templates/plan.html.jinja")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["gb"] = lambda size: f"{size / 1e9:.3f}"
    return environment.from_string(template.read_text("utf-8")).render(
        report=report,
        verdict=_verdict(report),
        command=_command(plan),
        charts=[(title, _svg(draw)) for title, draw in charts.items()],
        terms=TERMS,
        checkpointing=checkpointing_text(report["train"]["settings"]["checkpointing"]),
    )


def _verdict(report: dict[str, Any]) -> str:
    device, margin = report["device"], report["device"]["margin_bytes"] / 1e9
    if device["fits"]:
        return f"Fits on {device['title']}, with {margin:.3f} GB to spare"
    return f"Does not fit on {device['title']}: {-margin:.3f} GB too large"


def _command(plan: Plan) -> str:
    """Return the command that makes this plan again from the model's name alone."""
    parts = ["halfbyte", "plan", plan.target]
    for section, keys in SETTINGS.items():
        values = getattr(plan.run, section)
        for key, field in type(values).model_fields.items():
            value = getattr(values, key)
            if not field.is_required() and key in (keys or [key]) and value != field.default:
                is_word = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w-]*", value)
                parts.append(f"{section}.{key}={value if is_word else json.dumps(value)}")
    has_name = plan.device.kind == "cpu" or plan.device.facts in ((), (ASSUMED,))
    return shlex.join([*parts, "--device", plan.device.name if has_name else "auto"])
