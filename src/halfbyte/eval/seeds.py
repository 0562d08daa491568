"""Owns the verdict over several trainings: what of a difference is due to rows, and what to the seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from halfbyte.eval.intervals import Scores, crossed_difference, judge
from halfbyte.eval.pages import interval, signed


def over_seeds(ours: Scores, others: Mapping[str, Scores], confidence: float) -> dict[str, Any]:
    """Compare trainings of the same settings with the variants that were not trained.

    Args:
        ours: scores, (trainings, rows).
        others: scores, (rows,), of each other variant.
        confidence: of the intervals.
    """
    alone = crossed_difference(ours, np.zeros((1, ours.shape[1])), confidence)
    against = {}
    for name, theirs in others.items():
        spread = crossed_difference(ours, theirs[None], confidence)
        estimate = spread.estimate
        against[name] = {
            **estimate.as_json(),
            "over_rows": spread.over_rows,
            "over_trainings": spread.over_trainings,
            "verdict": judge(estimate, [], [], confidence),
        }
    return {
        "trainings": len(ours),
        "score": alone.estimate.as_json(),
        "training_sd": alone.training_sd,
        "against": against,
    }


def seed_lines(comparison: dict[str, Any]) -> list[str]:
    """Format what several trainings show together, the strongest of the others first; nothing for other runs."""
    seeds = comparison["seeds"]
    if not seeds:
        return []
    lines = [
        "",
        f"The runs differ in the seed alone. {comparison['metric']} of {seeds['trainings']} trainings:"
        f" {interval(seeds['score'])}, over rows and trainings. From one training to another it varies by"
        f" {seeds['training_sd']:.3f} (standard deviation) beyond what so few rows let it vary.",
    ]
    if not seeds["against"]:
        return lines
    lines += ["", "| against | difference | verdict | error from rows | error from trainings |"]
    lines.append("|" + " --- |" * 5)
    for name, one in sorted(seeds["against"].items(), key=lambda item: item[1]["value"]):
        errors = f"{one['over_rows']:.3f} | {one['over_trainings']:.3f}"
        lines.append(f"| {name} | {signed(one)} | {one['verdict']} | {errors} |")
    return lines
