"""Owns a plan's pictures: bytes against row length, the sum at the peak, precisions; as PNG and HTML."""

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

from halfbyte.errors import PlanError
from halfbyte.plan.advice import micro_batches
from halfbyte.plan.devices import find_device
from halfbyte.plan.memory import Lengths
from halfbyte.plan.report import TERMS, Plan
from halfbyte.run_dir import write_text

INK, OURS, OTHERS, BAD = "#1f2933", "#0f766e", "#94a3b8", "#b91c1c"
SHADES = ("#b6c2d1", "#94a3b8", "#64748b", "#475569")  # more rows, darker
MARKERS = "os^D"
SHORTEST, LONGEST = 128, 2048  # tokens; the longest at least
ROWS = (1, 2, 4, 8)
MAX_LENGTHS = 8
TRACED_LAYERS = 80  # that the lengths and micro-batches may come to: a layer takes about 0.1 s
SMALL = 0.02  # of the whole: smaller terms share a bar
CLIP = 2.5  # times the device: bytes beyond that are drawn no more
FAR = 3.0  # times what is drawn: a device beyond that is only named
PNG_SIZE, PNG_DPI = (11, 8), 150
SVG_WIDTH = 5.6
WORDS = {"nf4_single": "nf4, constants\nas they are"}

# What a plan depends on, beside the model's name; an empty tuple stands for the whole section.
SETTINGS: dict[str, tuple[str, ...]] = {
    "model": (),
    "adapter": (),
    "data": ("max_length",),
    "train": ("batch_size", "micro_batch_size", "optimizer", "checkpointing"),
}

Curves = dict[int, dict[int, int]]  # rows → length → bytes needed
Picture = tuple[str, float, Callable[[Any], None]]  # title, height in inches, what draws it


def write_plots(plan: Plan, report: dict[str, Any], name: Path) -> list[Path]:
    """Write a plan's pictures.

    Args:
        plan: what was planned.
        report: ``as_json`` of it.
        name: path of both files without their suffixes.

    Returns:
        The PNG, then the HTML page that also has the report's tables.
    """
    stem = name.with_suffix("") if name.suffix.lower() in (".png", ".html") else name
    paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".html")]
    curves = trace_curves(plan)
    pictures: list[Picture] = [
        (_curves_title(plan), 3.6, lambda axes: _draw_curves(axes, plan, curves)),
        ("Needed at the peak, GB", 3.4, lambda axes: _draw_terms(axes, report)),
        ("Weights in memory by precision, GB", 3.4, lambda axes: _draw_load(axes, report)),
    ]
    _write_bytes(paths[0], _png(report, pictures))
    write_text(paths[1], _html(plan, report, pictures))
    return paths


def trace_curves(plan: Plan) -> Curves:
    """Bytes needed at several row lengths, for several micro-batches that the run could have."""
    planner, train = plan.planner, plan.train
    base, more = planner.step.cut.base, planner.step.cut.more
    budget = TRACED_LAYERS // (len(base) + len(more) * (len(base) + 1))
    possible = micro_batches(plan.run.train.batch_size // planner.world)
    # The planned micro-batch, then the extremes, then what lies between.
    others = [n for n in (1, *ROWS[:0:-1]) if n in possible and n != train.micro_batch_size]
    num_lines = 5 if budget >= 5 * 5 else 4 if budget >= 4 * 4 else 3
    rows = sorted([train.micro_batch_size, *others[: num_lines - 1]])
    lengths = _lengths(plan, min(MAX_LENGTHS, max(3, budget // len(rows))))
    limit, curves = _limit(plan), Curves()
    for count in rows:
        curve = curves[count] = {}
        if count == train.micro_batch_size:
            curve[train.length] = train.needed_bytes
        for length in lengths:
            if length not in curve:
                curve[length] = planner.train(
                    Lengths.all_of(length, count), count, checkpointing=train.checkpointing
                ).needed_bytes
            if curve[length] > max(CLIP * limit, 1.25 * train.needed_bytes):
                break  # it runs off the picture, and more tokens never take less
        curves[count] = dict(sorted(curve.items()))
    return curves


def _lengths(plan: Plan, most: int) -> list[int]:
    """Powers of two that the model can take: the shortest, and the longest of them."""
    text = plan.planner.config.get_text_config()
    longest = max(LONGEST, 2 * plan.train.length)
    longest = min(longest, getattr(text, "max_position_embeddings", None) or longest)
    found = [1 << n for n in range(SHORTEST.bit_length() - 1, longest.bit_length())]
    return [*found[:1], *found[1:][1 - most :]] or [plan.train.length]


def _limit(plan: Plan) -> int:
    return plan.device.total_bytes - plan.device.in_use_bytes


def _curves_title(plan: Plan) -> str:
    recompute = "on" if plan.train.checkpointing else "off"
    return f"Needed by row length, GB, checkpointing {recompute}"


def _draw_curves(axes: Any, plan: Plan, curves: Curves) -> None:
    train, limit = plan.train, _limit(plan) / 1e9
    shades, markers = iter(SHADES), iter(MARKERS)
    for count, curve in curves.items():
        planned = count == train.micro_batch_size
        axes.plot(
            list(curve),
            [size / 1e9 for size in curve.values()],
            color=OURS if planned else next(shades),
            marker="." if planned else next(markers),
            linewidth=2.2 if planned else 1.4,
            markersize=8 if planned else 4,
            label=f"{count} row{'s' if count > 1 else ''}",
        )
    needed = train.needed_bytes / 1e9
    what = f"planned: {train.micro_batch_size} × {train.length} tokens, {needed:.3f} GB"
    colour = OURS if plan.fits else BAD
    axes.plot(train.length, needed, "o", ms=11, mfc="none", mec=colour, mew=2, zorder=5, label=what)
    highest = max(max(curve.values()) for curve in curves.values()) / 1e9
    top = 1.08 * max(highest, limit if limit <= FAR * highest else 0)
    top = min(top, max(CLIP * limit, 1.25 * needed))
    axes.set_ylim(0, top)
    longest = max(length for curve in curves.values() for length in curve)
    axes.set_xlim(0, 1.03 * longest)
    axes.set_xticks([n for n in sorted({n for c in curves.values() for n in c}) if n > longest / 9])
    axes.set_xlabel("tokens in a row")
    axes.set_ylabel("GB")
    _draw_limit(axes, plan, curves, (longest, top))
    axes.legend(
        frameon=False, ncols=len(curves), loc="lower left", bbox_to_anchor=(-0.02, 1.0), fontsize=9
    )


def _draw_limit(axes: Any, plan: Plan, curves: Curves, corner: tuple[float, float]) -> None:
    """The device as a line, named where no curve runs."""
    limit, (longest, top) = _limit(plan) / 1e9, corner
    name = _device(plan.device.title, _limit(plan), plan.device.in_use_bytes)
    style: dict[str, Any] = {"color": BAD, "fontsize": 9, "parse_math": False}
    if limit > top:
        axes.text(0.01 * longest, 0.98 * top, f"↑ {name}", va="top", **style)
        return
    axes.axhline(limit, color=BAD, linewidth=1.2, linestyle="--")
    starts = [size / 1e9 for curve in curves.values() for n, size in curve.items()]
    crowded = [size for size in starts if limit < size < limit + 0.12 * top]
    below = bool(crowded) or limit > 0.92 * top
    axes.text(
        0.01 * longest,
        limit - (0.015 if below else -0.01) * top,
        name,
        va="top" if below else "bottom",
        **style,
    )


def _device(title: str, limit: int, in_use: int) -> str:
    short = title if len(title) <= 32 else title[:31] + "…"
    return f"{short}: {limit / 1e9:.3f} GB{' free' if in_use else ''}"


def _draw_terms(axes: Any, report: dict[str, Any]) -> None:
    """One bar for each term, the largest first, each beginning where the last one ended."""
    train, needed = report["train"], report["train"]["needed_bytes"]
    terms = {name.replace("_", " "): train[f"{name}_bytes"] for name in TERMS}
    small = [name for name, size in terms.items() if 0 < size < SMALL * needed]
    bars = sorted(
        ((n, s) for n, s in terms.items() if s > 0 and (len(small) < 2 or n not in small)),
        key=lambda bar: -bar[1],
    )
    if len(small) > 1:
        bars.append((f"{len(small)} others", sum(terms[name] for name in small)))
    start = 0
    for row, (_, size) in enumerate(bars):
        axes.barh(row, size / 1e9, left=start / 1e9, color=OURS, height=0.64)
        start += size
        _number(axes, start, row, size)
    axes.barh(len(bars), needed / 1e9, color=INK, height=0.64)
    _number(axes, needed, len(bars), needed)
    _finish_bars(axes, report, [*(name for name, _ in bars), "needed"], needed)


def _draw_load(axes: Any, report: dict[str, Any]) -> None:
    sizes = {
        WORDS.get(name, name): stored["true_bytes"]
        for name, stored in report["load"].items()
        if isinstance(stored, dict) and "true_bytes" in stored
    }
    for row, size in enumerate(sizes.values()):
        axes.barh(row, size / 1e9, color=OURS, height=0.64)
        _number(axes, size, row, size)
    _finish_bars(axes, report, list(sizes), max(sizes.values()))


def _number(axes: Any, end: int, row: int, size: int) -> None:
    text = axes.annotate(
        f"{size / 1e9:.3f}",
        (end / 1e9, row),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        zorder=4,
    )
    text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})


def _finish_bars(axes: Any, report: dict[str, Any], names: list[str], highest: int) -> None:
    """Names, range, and the device as a line where it is near enough to compare with."""
    device = report["device"]
    limit = device["total_bytes"] - device["in_use_bytes"]
    label = _device(device["title"], limit, device["in_use_bytes"])
    near = limit <= FAR * highest
    if near:
        axes.axvline(limit / 1e9, color=BAD, linewidth=1.2, linestyle="--", zorder=0.5)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.2 * highest, 1.04 * limit if near else 0) / 1e9)
    axes.set_xlabel(label if near else f"{label} →", color=BAD, fontsize=9, parse_math=False)


def _png(report: dict[str, Any], pictures: list[Picture]) -> bytes:
    figure = Figure(figsize=PNG_SIZE, dpi=PNG_DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, hspace=0.04)  # type: ignore[union-attr]
    figure.suptitle(
        f"{report['target']}\n{_verdict(report)}", fontsize=13, color=INK, parse_math=False
    )
    places = figure.subplot_mosaic([[0, 0], [1, 2]], height_ratios=(1.1, 1))
    for place, (title, _, draw) in enumerate(pictures):
        axes = places[place]
        axes.set_title(
            title, loc="left", fontsize=11, fontweight="bold", pad=22 if not place else 8
        )
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _svg(picture: Picture) -> str:
    _, height, draw = picture
    figure = Figure(figsize=(SVG_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    stream = io.StringIO()
    # A fixed salt and no date: the same numbers give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "halfbyte"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _html(plan: Plan, report: dict[str, Any], pictures: list[Picture]) -> str:
    import jinja2

    template = resources.files("halfbyte.plan").joinpath("templates/plan.html.jinja")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["gb"] = lambda size: f"{size / 1e9:.3f}"
    return environment.from_string(template.read_text("utf-8")).render(
        report=report,
        verdict=_verdict(report),
        command=_command(plan),
        pictures=[(picture[0], _svg(picture)) for picture in pictures],
        terms=TERMS,
    )


def _verdict(report: dict[str, Any]) -> str:
    device = report["device"]
    name, margin = device["title"], device["margin_bytes"] / 1e9
    if device["fits"]:
        return f"Fits on {name}, with {margin:.3f} GB to spare"
    return f"Does not fit on {name}: {-margin:.3f} GB too large"


def _command(plan: Plan) -> str:
    """The call that plans this again from the model's name alone."""
    parts = ["python", "train/plan.py", plan.target]
    for section, keys in SETTINGS.items():
        values = getattr(plan.run, section)
        for key in keys or [key for key in type(values).model_fields if key != "name"]:
            value = getattr(values, key)
            if value != type(values).model_fields[key].get_default(call_default_factory=True):
                plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w-]*", value)
                parts.append(f"{section}.{key}={value if plain else json.dumps(value)}")
    try:
        known = find_device(plan.device.name).title == plan.device.title
    except PlanError:
        known = False
    return shlex.join([*parts, "--device", plan.device.name if known else "auto"])


def _write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
