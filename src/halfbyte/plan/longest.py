"""Owns the longest row that each card can train: one row a pass, every token labelled, all layers recomputed.

With attention in one varlen call each phase of a step grows by the same bytes with every token, so that the
line through two traced steps gives every length. Tests trace the lengths that it gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from halfbyte.config.schema import Run
from halfbyte.errors import PlanError
from halfbyte.kernels.capability import TURING
from halfbyte.kernels.varlen import uses_flash
from halfbyte.plan.devices import DEVICES
from halfbyte.plan.memory import SLACK_FRAC, Planner
from halfbyte.plan.shape import Lengths

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from halfbyte.plan.devices import Device

TRACED = 16_384  # tokens of the longer traced row: more than any block of the loss, so that all of them are full
CLAMPED_TO = 128  # a length is rounded down to a multiple


@dataclass(frozen=True)
class Line:
    """Bytes of a phase by the tokens of its row, besides what is always live."""

    at_zero_bytes: float
    bytes_per_token: float

    def tokens(self, room_bytes: float) -> float:
        """Return the most tokens that take no more than this."""
        if self.bytes_per_token <= 0:
            return float("inf") if self.at_zero_bytes <= room_bytes else 0.0
        return max(0.0, (room_bytes - self.at_zero_bytes) / self.bytes_per_token)


def longest_rows(run: Run, config: PretrainedConfig) -> dict[str, int]:
    """Return for each card the most tokens of a row that it can train, 0 where not even a short one fits.

    Cards without attention in one call, and with settings or models without it, are left out: memory does not
    grow evenly there. No row is longer than the model's positions.
    """
    if not run.allowed_speed.varlen_attention:
        return {}
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or 0
    heads: int = getattr(text, "num_attention_heads", None) or 1
    head_size: int = getattr(text, "head_dim", None) or text.hidden_size // heads

    def kind(card: Device) -> tuple[bool, bool]:
        return card.has_bf16, uses_flash(card.capability, torch.float16, head_size)

    by_card: dict[str, int] = {}
    cards = [card for card in DEVICES.values() if (card.capability or TURING) >= TURING]
    for _, group in groupby(sorted(cards, key=kind, reverse=True), key=kind):
        alike = list(group)
        try:
            planner = Planner(run, config, alike[0])
        except PlanError:  # the config sets what these cards have not
            continue
        if not planner.step.shares:
            return {}
        lines = _lines(planner, min(TRACED, limit or TRACED))
        fixed = sum(planner.fixed_bytes().values()) - planner.device.workspace_bytes
        for card in alike:
            spare = card.usable_bytes - card.workspace_bytes - fixed
            room = spare / (1 + SLACK_FRAC[card.kind])
            tokens = min(line.tokens(room) for line in lines)
            bound = min(tokens, limit) if limit else tokens
            by_card[card.name] = (
                int(bound) if bound == limit else int(bound) // CLAMPED_TO * CLAMPED_TO
            )
    return dict(sorted(by_card.items(), key=lambda one: DEVICES[one[0]].total_bytes))


def _lines(planner: Planner, length: int) -> list[Line]:
    """Return the line of each phase through a row of this length and one of half of it."""
    half = length // 2
    fixed = sum(planner.fixed_bytes().values())
    short, long = (
        planner.train(Lengths.all_of(tokens, 1), 1, checkpointing=True).phases
        for tokens in (half, length)
    )
    lines = []
    for phase, size in long.items():
        slope = (size - short[phase]) / (length - half)
        lines.append(Line(size - fixed - slope * length, slope))
    return lines
