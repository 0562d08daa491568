"""Owns what the benchmark reports: medians over repetitions, ratios, and the tables for people."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

Cell = dict[str, Any]  # one model with one dataset: its sizes, sweeps, runs and held-out losses
DROPPED_STEPS = 2
OURS = "halfbyte"
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}
HEAD = (
    "tool",
    "steps/s",
    "tokens/s",
    "labelled/s",
    "peak, GB",
    "first step, s",
    "held-out loss",
    "curve",
    "GEMM peak",
    "micro-batch",
    "recompute",
    "adapter",
    "halfbyte: speed",
    "memory",
)


def check_losses(runs: list[dict[str, Any]], dtype: str) -> None:
    """Stop if tools do not train on the same rows from the same weights.

    Raises:
        SystemExit: losses of the first step differ by more than rounding.
    """
    found = {run["tool"]: run["losses"][0] for run in runs if "losses" in run}
    if found and max(found.values()) > min(found.values()) * (1 + TOLERANCE[dtype]):
        shown = ", ".join(f"{name} {loss:.6f}" for name, loss in found.items())
        raise SystemExit(
            f"no report: losses of the first step differ by over {TOLERANCE[dtype]}: {shown}"
        )


def num_dropped(steps: int) -> int:
    """Steps at the beginning of a run that its speed leaves out."""
    return min(DROPPED_STEPS, steps - 1)


def summary(cell: Cell, gemm_flops: float) -> list[dict[str, Any]]:
    """A line for each tool: medians over its repetitions, or how it failed.

    ``steps_per_s`` is of the median step, the others of all that are timed.
    """
    names = list(dict.fromkeys(run["tool"] for run in cell["runs"]))
    lines = []
    for name in names:
        runs = [run for run in cell["runs"] if run["tool"] == name]
        failed = [run["failed"] for run in runs if "failed" in run]
        if failed:
            lines.append({"tool": name, "failed": failed[0]})
            continue
        figures = [_figures(cell, run, gemm_flops) for run in runs]
        median = {key: statistics.median(f[key] for f in figures) for key in figures[0]}
        facts = {key: runs[0][key] for key in ("micro_batch", "checkpointing", "adapter_dtype")}
        held_out = {"held_out_loss": cell["held_out_losses"][name]}
        lines.append({"tool": name, "reps": len(runs)} | median | held_out | facts)
    return lines


def _figures(cell: Cell, run: dict[str, Any], gemm_flops: float) -> dict[str, float]:
    kept = slice(num_dropped(len(run["step_s"])), None)
    seconds, steps = run["step_s"][kept], cell["steps"][kept]
    assert len(seconds) == len(steps), "a tool has not taken every step"
    total = sum(seconds)
    return {
        "steps_per_s": 1 / statistics.median(seconds),
        "tokens_per_s": sum(step["tokens"] for step in steps) / total,
        "labelled_per_s": sum(step["labelled"] for step in steps) / total,
        "peak_bytes": run["peak_bytes"],
        "first_step_s": run["first_step_s"],
        "curve_distance": _distance(cell, run),
        "gemm_frac": sum(step["flop"] for step in steps) / total / gemm_flops,
    }


def _distance(cell: Cell, run: dict[str, Any]) -> float:
    """Largest relative difference of a step's loss from the reference tool's."""
    reference: list[float] | None = next(
        (r["losses"] for r in cell["runs"] if r["tool"] == cell["reference"] and "losses" in r),
        None,
    )
    if reference is None:
        return float("nan")
    losses: list[float] = run["losses"]
    return max(abs(a / b - 1) for a, b in zip(losses, reference, strict=True))


def write(report: dict[str, Any], path: Path) -> None:
    """``path``.json with every run and ``path``.md with the tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(as_markdown(report))


def as_markdown(report: dict[str, Any]) -> str:
    """The whole report."""
    settings = report["settings"]
    lines = [
        f"`{report['command']}`",
        "",
        f"{report['processor']}, {settings['threads']} threads; {settings['dtype']} matrix product:"
        f" {report['gemm_flops'] / 1e9:,.0f} GFLOP/s measured.",
        f"NF4 with double quantisation, {settings['dtype']} compute, r = alpha ="
        f" {settings['rank']} on all linear layers, {settings['step_rows']} rows a step, fused AdamW, lr"
        f" {settings['learning_rate']}, clip 1.0. {settings['num_steps']} steps, the first"
        f" {num_dropped(settings['num_steps'])} not timed; {settings['reps']} interleaved repetitions, medians.",
        "",
        "Tokens are real ones, without padding. Curve: largest relative difference of a step's loss from"
        " the reference's. GEMM peak: share of it that the needed work comes to. The last two columns:"
        " steps/s of halfbyte over the tool's, memory of the tool over halfbyte's.",
    ]
    for cell in report["cells"]:
        lines += ["", *_table(cell, report["gemm_flops"])]
    lines += ["", "| tool | libraries |", "| --- | --- |"]
    for name, versions in report["versions"].items():
        lines.append(f"| {name} | {', '.join(f'{k} {v}' for k, v in versions.items())} |")
    return "\n".join(lines) + "\n"


def _table(cell: Cell, gemm_flops: float) -> list[str]:
    tokens = sum(step["tokens"] for step in cell["steps"])
    labelled = sum(step["labelled"] for step in cell["steps"])
    loads = [run["load"] for run in cell["runs"]]
    tried = [
        f"{s['tool']} {s['micro_batch']}: {s.get('failed') or '{:.2f} s'.format(s['seconds'])}"
        for s in cell["sweeps"]
    ]
    lines = summary(cell, gemm_flops)
    ours = next((line for line in lines if line["tool"] == OURS and "failed" not in line), None)
    return [
        f"## {cell['model']}, {cell['dataset']}",
        "",
        f"{cell['about']}. {tokens / len(cell['steps']):,.0f} tokens a step,"
        f" {labelled / tokens:.0%} labelled. Held-out loss of the base:"
        f" {cell['held_out_losses']['base']:.4f}. Reference of the curve: {cell['reference']}."
        f" Load average before the runs: {min(loads):.2f} to {max(loads):.2f}."
        + (f" Micro-batches tried: {', '.join(tried)}." if tried else ""),
        "",
        f"| {' | '.join(HEAD)} |",
        f"|{' --- |' * len(HEAD)}",
        *(_line(line, ours) for line in lines),
    ]


def _line(line: dict[str, Any], ours: dict[str, Any] | None) -> str:
    if "failed" in line:
        return f"| {line['tool']} | failed: {line['failed']} |{' |' * (len(HEAD) - 2)}"
    cells = [
        line["tool"],
        f"{line['steps_per_s']:.3f}",
        f"{line['tokens_per_s']:,.0f}",
        f"{line['labelled_per_s']:,.0f}",
        f"{line['peak_bytes'] / 1e9:.2f}",
        f"{line['first_step_s']:.1f}",
        f"{line['held_out_loss']:.4f}",
        f"{line['curve_distance']:.1e}",
        f"{line['gemm_frac']:.0%}",
        f"{line['micro_batch']}",
        "on" if line["checkpointing"] else "off",
        line["adapter_dtype"],
        f"{ours['steps_per_s'] / line['steps_per_s']:.2f}×" if ours else "",
        f"{line['peak_bytes'] / ours['peak_bytes']:.2f}×" if ours else "",
    ]
    return f"| {' | '.join(cells)} |"
