"""Owns the hints of contamination: scores without rows like training ones, and answers that the base knows already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halfbyte.config import Run
from halfbyte.data.conversation import Row
from halfbyte.data.ledger import NEAR_DUPLICATE, Ledger
from halfbyte.data.normal import normalised
from halfbyte.eval.measure import Variant, score_intervals
from halfbyte.eval.variants import BASE_FULL

CERTAIN_NATS = 0.1  # per token, below which the base is nearly certain of an answer
MIN_TOKENS = 4  # of an answer that says anything about memory


def scores_without_duplicates(
    ledger: Ledger, rows: Sequence[Row], variants: Sequence[Variant], run: Run
) -> dict[str, dict[str, Any]]:
    """Return each variant's scores on the rows whose prompt is nearly that of no training row.

    Empty where that are all rows, or none, and where the ledger does not name all pairs.
    """
    if ledger.total("near_duplicates") > len(ledger.near_duplicates):
        return {}
    near = {pair.held_out for pair in ledger.near_duplicates}
    kept = [number for number, row in enumerate(rows) if row.place.split(", turn ")[0] not in near]
    if len(kept) in (0, len(rows)):
        return {}
    return {
        variant.name: score_intervals(
            {metric: [scores[n] for n in kept] for metric, scores in variant.scores.items()}, run
        )
        for variant in variants
        if variant.scores
    }


def duplicate_note(ledger: Ledger, clean: dict[str, dict[str, Any]], metric: str) -> str:
    """Say how many prompts are nearly alike, and what the scores are without them."""
    if not ledger.near_duplicates:
        return "No training prompt is an exact or near duplicate of a held-out one."
    note = (
        f"{ledger.total('near_duplicates')} pairs of training and held-out prompts are near duplicates (Jaccard"
        f" similarity of 5-character shingles at least {NEAR_DUPLICATE}); see ledger.json. There are no exact"
        " duplicates."
    )
    figures = [
        f"{name} {estimates[metric]['value']:.3f}"
        for name, estimates in clean.items()
        if metric in estimates
    ]
    if not figures:
        return note
    count = next(iter(clean.values()))[metric]["n"]
    return f"{note} {metric} on the {count} rows without one: {', '.join(figures)}."


def repeated_note(rows: Sequence[Row]) -> list[str]:
    """Say how many held-out rows have the prompt of another one; nothing if none has."""
    count = len(rows) - len({normalised(row.prompt) for row in rows})
    if not count:
        return []
    return [
        f"{count} of the {len(rows)} rows have the prompt of another one. Intervals count them as rows of their own, so"
        " that they are narrower than they should be: take such rows out of the test set."
    ]


def memory_note(variants: Sequence[Variant]) -> list[str]:
    """Say of how many wanted answers the base is nearly certain before training; nothing if of none."""
    losses = next((one.losses for one in variants if one.name == BASE_FULL), [])
    long = [(loss, count) for loss, count in losses if count >= MIN_TOKENS]
    certain = sum(loss < CERTAIN_NATS * count for loss, count in long)
    if not certain:
        return []
    return [
        f"The base is nearly certain of {certain} of {len(long)} wanted answers before any training (less than"
        f" {CERTAIN_NATS} nats per token): they are easy, or it was trained on them."
    ]
