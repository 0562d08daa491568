"""Owns a plan's pictures: bytes by row length, by term and by precision, as one PNG and as a page."""

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
from halfbyte.plan.memory import layers_words
from halfbyte.plan.report import TERMS, Plan
from halfbyte.plan.shape import Lengths
from halfbyte.plan.weights import STORED
from halfbyte.run_dir import write_text

INK, OURS, BAD = "#1f2933", "#0f766e", "#b91c1c"
LINES = (("#b6c2d1", "o"), ("#94a3b8", "s"), ("#64748b", "^"), ("#475569", "D"))
ROWS = (8, 4, 2)  # in a micro-batch, beside 1 and the planned ones; the first are drawn first
SHORTEST, LONGEST = 128, 2048  # tokens; the longest at least
TRACED_LAYERS = 80  # that all points may come to together; a layer takes about 0.1 s
SMALL = 0.02  # of the whole: smaller terms share a bar
CLIP = 2.5  # times the device: what takes more runs off the picture
FAR = 3.0  # times what is drawn: a larger device is only named
# What a plan depends on beside the model's name; without keys the whole section.
SETTINGS: dict[str, tuple[str, ...]] = {
    "model": (),
    "adapter": (),
    "data": ("max_length",),
    "train": ("batch_size", "micro_batch_size", "optimizer", "checkpointing"),
}

Curves = dict[int, dict[int, int]]  # rows → length → bytes needed
Pictures = dict[str, Callable[[Any], None]]  # title → what draws it


def write_plots(plan: Plan, report: dict[str, Any], name: Path) -> list[Path]:
    """Write a plan's pictures.

    Args:
        plan: what was planned.
        report: ``as_json`` of it.
        name: path of both files; they differ in their suffixes.

    Returns:
        The PNG, then the HTML page, which has the report's tables too.
    """
    stem = name.with_suffix("") if name.suffix.lower() in (".png", ".html") else name
    png, html = (stem.with_name(stem.name + suffix) for suffix in (".png", ".html"))
    curves = trace_curves(plan)
    pictures: Pictures = {
        "Needed by row length, GB": lambda axes: _draw_curves(axes, plan, report, curves),
        "Needed at the peak, GB": lambda axes: _draw_terms(axes, report),
        "Weights in memory by precision, GB": lambda axes: _draw_load(axes, report),
    }
    png.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=png.parent) as folder:
        _draw_png(report, pictures).savefig(Path(folder, png.name), format="png")
        os.replace(Path(folder, png.name), png)
    write_text(html, _html(plan, report, pictures))
    return [png, html]


def trace_curves(plan: Plan) -> Curves:
    """Bytes needed at several row lengths, for several micro-batches that the run could have."""
    planner, train = plan.planner, plan.train
    base, more = planner.step.cut.base, planner.step.cut.more
    num_points = TRACED_LAYERS // (len(base) + len(more) * (len(base) + 1))
    possible = micro_batches(plan.run.train.batch_size // planner.world)
    others = [n for n in (1, *ROWS) if n in possible and n != train.micro_batch_size]
    others = others[: 4 if num_points >= 5 * 5 else 3 if num_points >= 4 * 4 else 2]
    lengths = _lengths(plan, min(8, max(3, num_points // (1 + len(others)))))
    limit = plan.device.total_bytes - plan.device.in_use_bytes
    curves: Curves = {}
    for rows in sorted([train.micro_batch_size, *others]):
        curve = {train.length: train.needed_bytes} if rows == train.micro_batch_size else {}
        for length in lengths:
            if length not in curve:
                batch = Lengths.all_of(length, rows)
                other = planner.train(
                    batch,
                    rows,
                    checkpointing=train.checkpointing,
                    recompute=train.shape.recompute,
                )
                curve[length] = other.needed_bytes
            if curve[length] > max(CLIP * limit, 1.25 * train.needed_bytes):
                break  # the rest runs off the picture
        curves[rows] = dict(sorted(curve.items()))
    return curves


def _lengths(plan: Plan, most: int) -> list[int]:
    """Powers of two that the model can take: the shortest, and the longest of them."""
    longest = max(LONGEST, 2 * plan.train.length)
    text = plan.planner.config.get_text_config()
    longest = min(longest, getattr(text, "max_position_embeddings", None) or longest)
    found = [1 << n for n in range(SHORTEST.bit_length() - 1, longest.bit_length())]
    return [*found[:1], *found[1:][1 - most :]] or [plan.train.length]


def _limit(report: dict[str, Any], highest: float) -> tuple[float, bool, str]:
    """What the device has, in GB, whether that is near enough to be drawn, and words for it."""
    device = report["device"]
    limit = (device["total_bytes"] - device["in_use_bytes"]) / 1e9
    title = device["title"] if len(device["title"]) <= 32 else device["title"][:31] + "…"
    text = f"{title}: {limit:.3f} GB{' free' if device['in_use_bytes'] else ''}"
    near = limit <= FAR * highest
    return limit, near, f"dashed: {text}" if near else f"{text}, beyond the picture"


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
    limit, near, name = _limit(report, highest)
    top = min(1.08 * max(highest, limit * near), max(CLIP * limit, 1.25 * needed))
    recompute = f"GB, checkpointing {layers_words(train.recompute)}"
    axes.set(xlim=(0, 1.03 * lengths[-1]), ylim=(0, top), ylabel=recompute)
    axes.set_xticks([length for length in lengths if length > lengths[-1] / 9])
    what = f"in the circle: planned {train.micro_batch_size} × {train.length}, {needed:.3f} GB"
    axes.set_xlabel(f"tokens in a row; {what}\n{name}", fontsize=9, parse_math=False)
    if near:
        axes.axhline(limit, color=BAD, lw=1.2, ls="--", zorder=0.5)
    looks = {"frameon": False, "fontsize": 9, "columnspacing": 1.2, "handlelength": 1.6}
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(curves), **looks)


def _draw_terms(axes: Any, report: dict[str, Any]) -> None:
    """Each term's bar begins where the last one ended; the largest comes first."""
    train, needed = report["train"], report["train"]["needed_bytes"]
    terms = {name.replace("_", " "): train[f"{name}_bytes"] for name in TERMS}
    found = sorted(((size, name) for name, size in terms.items() if size > 0), reverse=True)
    small = [size for size, _ in found if size < SMALL * needed]
    others = [(sum(small), f"{len(small)} others")]
    bars = [*found[: -len(small)], *others] if len(small) > 1 else found
    starts = [sum(size for size, _ in bars[:row]) for row in range(len(bars))]
    _draw_bars(axes, report, [*bars, (needed, "needed")], [*starts, 0])


def _draw_load(axes: Any, report: dict[str, Any]) -> None:
    words = {"nf4_single": "nf4, no double\nquantisation"}
    bars = [(report["load"][name]["true_bytes"], words.get(name, name)) for name in STORED]
    _draw_bars(axes, report, bars, [0] * len(bars))


def _draw_bars(
    axes: Any, report: dict[str, Any], bars: list[tuple[int, str]], starts: list[int]
) -> None:
    """Bars with their bytes, and the device as a line where it is near enough to compare with."""
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


def _draw_png(report: dict[str, Any], pictures: Pictures) -> Figure:
    figure = Figure(figsize=(11, 8), dpi=150)
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.12)
    title = f"{report['target']}\n{_verdict(report)}"
    figure.suptitle(title, fontsize=13, parse_math=False)
    places = figure.subplot_mosaic([[0, 0], [1, 2]], height_ratios=(1.1, 1))
    for axes, (title, draw) in zip(places.values(), pictures.items(), strict=True):
        draw(axes)
        pad = 26 if axes.get_legend() else 8
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=pad)
    return figure


def _svg(draw: Callable[[Any], None]) -> str:
    figure = Figure(figsize=(4.8, 3.5), layout="constrained")
    draw(figure.add_subplot())
    stream = io.StringIO()
    # A fixed salt and no date: the same numbers give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "halfbyte"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _html(plan: Plan, report: dict[str, Any], pictures: Pictures) -> str:
    import jinja2

    template = resources.files("halfbyte.plan").joinpath("templates/plan.html.jinja")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["gb"] = lambda size: f"{size / 1e9:.3f}"
    return environment.from_string(template.read_text("utf-8")).render(
        report=report,
        verdict=_verdict(report),
        command=_command(plan),
        pictures=[(title, _svg(draw)) for title, draw in pictures.items()],
        terms=TERMS,
    )


def _verdict(report: dict[str, Any]) -> str:
    device, margin = report["device"], report["device"]["margin_bytes"] / 1e9
    if device["fits"]:
        return f"Fits on {device['title']}, with {margin:.3f} GB to spare"
    return f"Does not fit on {device['title']}: {-margin:.3f} GB too large"


def _command(plan: Plan) -> str:
    """The call that plans this again from the model's name alone."""
    parts = ["python", "train/plan.py", plan.target]
    for section, keys in SETTINGS.items():
        values = getattr(plan.run, section)
        for key, field in type(values).model_fields.items():
            value = getattr(values, key)
            if not field.is_required() and key in (keys or [key]) and value != field.default:
                plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w-]*", value)
                parts.append(f"{section}.{key}={value if plain else json.dumps(value)}")
    named = plan.device.kind == "cpu" or plan.device.facts in ((), (ASSUMED,))
    return shlex.join([*parts, "--device", plan.device.name if named else "auto"])
