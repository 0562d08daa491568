"""Owns the verdict: the paired differences of the trained variant to every other one, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halfbyte.config import Run
from halfbyte.config.section import OPPONENTS
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
from halfbyte.eval.measure import Variant
from halfbyte.eval.pages import interval, signed
from halfbyte.eval.report_record import estimate_of
from halfbyte.eval.variants import BASE_FULL, BASE_NF4, FEWSHOT, is_trained, trained_name
from halfbyte.scoring.rows import LOSS_METRIC


def differences(run: Run, variants: list[Variant], metric: str) -> dict[str, dict[str, Any]]:
    """Return the trained variant's paired difference to every other variant on the deciding metric."""
    ours = ours_of(variants)
    if ours is None:
        return {}
    level = (run.eval.confidence, run.eval.resamples, run.seed)
    against = {}
    for other in variants:
        if other is not ours:
            difference = _difference(run, ours, other, metric)
            loss = _difference(run, ours, other, LOSS_METRIC) if other.losses else None
            scores, other_scores = ours.scores.get(metric, []), other.scores.get(metric, [])
            against[other.name] = {
                **difference.as_json(),
                **(evidence(scores, other_scores, *level) if scores else {}),
                "verdict": judge(difference, scores, other_scores, run.eval.confidence),
                "held_out_loss_drop": loss and loss.as_json(),
            }
    return against


def ours_of(variants: list[Variant]) -> Variant | None:
    """Return the trained variant that the verdict is about."""
    by_name = {variant.name: variant for variant in variants}
    name = trained_name(by_name)
    return by_name[name] if name else None


def _difference(run: Run, ours: Variant, other: Variant, metric: str) -> Estimate:
    """Return by how much ``ours`` is better, row by row: a higher score, or a lower loss."""
    level = (run.eval.confidence, run.eval.resamples, run.seed)
    if metric != LOSS_METRIC:
        return paired_difference(ours.scores[metric], other.scores[metric], *level)
    (losses, counts), (other_losses, _) = ours.loss_columns(), other.loss_columns()
    drops = [b - a for a, b in zip(losses, other_losses, strict=True)]
    return ratio_interval(drops, counts, *level)


def overall(differences: dict[str, dict[str, Any]]) -> str:
    """Return the worst verdict against the other variants, leaving out its merged and exported copies."""
    others = [name for name in differences if not is_trained(name)]
    verdicts = {differences[name]["verdict"] for name in others}
    for verdict in (LOSS, NO_GAIN, GAIN):
        if verdict in verdicts:
            return verdict
    return NO_GAIN


def cheapest(run: Run, variants: Sequence[Variant], metric: str) -> str | None:
    """Return the cheapest variant that is not shown to be worse than the one with the highest score.

    The cheapest has the fewest bytes of weights; of equal ones, it takes the least time. None where the metric
    does not score answers, or those of one variant alone.
    """
    scored = [variant for variant in variants if variant.scores.get(metric)]
    if len(scored) < 2:
        return None
    best = max(scored, key=lambda variant: sum(variant.scores[metric]))
    level = (run.eval.confidence, run.eval.resamples, run.seed)
    as_good = []
    for variant in scored:
        ours, theirs = best.scores[metric], variant.scores[metric]
        difference = paired_difference(ours, theirs, *level)
        if judge(difference, ours, theirs, run.eval.confidence) != GAIN:
            as_good.append(variant)
    return min(as_good, key=_cost).name


def _cost(variant: Variant) -> tuple[int, float]:
    """Return bytes and time of a variant; the time of one that was not measured is the longest."""
    seconds = variant.row_seconds
    return variant.weights_bytes, float("inf") if seconds is None else seconds


def verdict_line(
    entries: list[dict[str, Any]], against: dict[str, dict[str, Any]], metric: str, run: Run
) -> str:
    """Say in one line how the trained variant does against each baseline, and against the opponents."""
    by_name = {entry["name"]: entry for entry in entries}
    ours = trained_name(by_name)
    baselines = [BASE_FULL, FEWSHOT, *(baseline.name for baseline in run.eval.baselines), BASE_NF4]
    verdicts = {name: difference["verdict"] for name, difference in against.items()}
    # The smaller the difference, the stronger the opponent.
    strongest = sorted(
        (name for name in OPPONENTS if name in against), key=lambda name: against[name]["value"]
    )
    unbeaten = [name for name in strongest if verdicts[name] != GAIN]
    shown = [name for name in baselines if name in against] + (unbeaten or strongest[:1])
    parts = [
        f"{verdicts[name]} against {name} ({signed(against[name])}{_rows_needed(against[name])})"
        for name in shown
    ]
    if ours is None or not parts:
        return "No verdict: the comparison lacks a trained variant or a baseline."
    bases = {verdicts[name] for name in (BASE_FULL, FEWSHOT, BASE_NF4) if name in verdicts}
    if unbeaten and bases == {GAIN}:
        parts.insert(0, f"gain over the base, not over {' and '.join(unbeaten)}")
    elif strongest and not unbeaten:
        parts[-1] += ", the strongest opponent"
    estimate = interval(estimate_of(by_name[ours], metric))
    return f"{ours}: {metric} {estimate} — " + "; ".join(parts) + "."


def _rows_needed(difference: dict[str, Any]) -> str:
    """Say how many rows would show a difference that these rows did not show."""
    needed = difference.get("rows_needed")
    if difference["verdict"] != NO_GAIN or needed is None or needed <= difference["n"]:
        return ""
    return f"; a difference this small needs {needed:,} rows to be shown, not {difference['n']:,}"
