"""Owns the order of training rows: shuffled, and grouped by length inside each optimizer step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class StepwiseSampler(Sampler[int]):
    """Row numbers in the order of a seeded shuffle, sorted by length within each optimizer step.

    The loss of a step is a sum over its tokens, so that the order of rows inside a step changes
    nothing but the padding of its micro-batches. Each epoch has a shuffle of its own, which depends
    on seed and epoch alone.

    Args:
        lengths: tokens of each row.
        step_rows: rows in one optimizer step, over all processes.
        seed: of the shuffle.
    """

    def __init__(self, lengths: list[int], step_rows: int, seed: int) -> None:
        self.lengths = lengths
        self.step_rows = step_rows
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of ``epoch``; accelerate calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """Each row number once."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        for start in range(0, len(shuffled), self.step_rows):
            step = shuffled[start : start + self.step_rows]
            yield from sorted(step, key=lambda row: self.lengths[row])
