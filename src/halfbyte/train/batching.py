"""Owns the grouping of rows: the order of training rows, and how a step is split into passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import Sampler

from halfbyte.config.schema import Run, Speed
from halfbyte.data.prefix_tree import Layout, Tokens, cut_step, lay_out, pass_tokens
from halfbyte.forward.scoring import row_losses


@dataclass(frozen=True)
class Cutting:
    """How the rows of a step are divided into passes.

    Attributes:
        micro_batch_size: a pass holds at most as many tokens as this number of the longest rows.
        share: whether common prefixes are computed once.
        padded: whether the rows of a pass are padded to the longest.
        max_tokens: that limit in tokens, for the training rows.
    """

    micro_batch_size: int
    share: bool
    padded: bool
    max_tokens: int

    @classmethod
    def of(
        cls, rows: Sequence[Tokens], micro_batch_size: int, speed: Speed, refusal: str
    ) -> Cutting:
        """Choose the cutting for training rows; ``refusal`` says why the model needs padded rows, if so."""
        share, padded = speed.layout(refusal)
        tokens = pass_tokens(rows, micro_batch_size, share=share, padded=padded)
        return cls(micro_batch_size, share, padded, tokens)

    def layout(
        self,
        rows: Sequence[Tokens],
        weights: Sequence[float] | None = None,
        groups: Sequence[int] = (),
    ) -> Layout:
        """Lay these rows out as one pass, as ``lay_out`` does."""
        return lay_out(rows, share=self.share, padded=self.padded, weights=weights, groups=groups)

    def step(
        self,
        rows: Sequence[Tokens],
        weights: Sequence[float] | None = None,
        groups: Sequence[int] = (),
    ) -> list[Layout]:
        """Split the rows of an optimizer step into passes."""
        cut = cut_step(rows, self.max_tokens, share=self.share, padded=self.padded)
        return [
            self.layout(
                [rows[number] for number in numbers],
                weights and [weights[number] for number in numbers],
                groups and [groups[number] for number in numbers],
            )
            for numbers in cut
        ]

    def longest(self, rows: Sequence[Tokens]) -> list[Tokens]:
        """Return the longest of these rows, up to ``micro_batch_size`` of them."""
        return sorted(rows, key=lambda row: -len(row[0]))[: self.micro_batch_size]

    def losses(self, model: nn.Module, rows: Sequence[Tokens]) -> list[tuple[float, int]]:
        """Run ``row_losses`` with passes laid out in the same way."""
        rows_a_pass = self.micro_batch_size
        return row_losses(model, rows, rows_a_pass, share=self.share, padded=self.padded)


class StepwiseSampler(Sampler[int]):
    """Row numbers in the order of a seeded shuffle, dealt to processes by length within each step.

    The loss of a step is a sum over its tokens, so the order of rows within a step only affects how
    much work each process gets. Each epoch has its own shuffle, which depends only on the seed and the
    epoch.

    Args:
        lengths: number of tokens in each row.
        step_rows: rows in one optimizer step, over all processes.
        seed: seed of the shuffle.
        num_processes: number of processes, which take the batches of a step in turn.
    """

    def __init__(
        self, lengths: list[int], step_rows: int, seed: int, num_processes: int = 1
    ) -> None:
        self.lengths = lengths
        self.step_rows = step_rows
        self.seed = seed
        self.num_processes = num_processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Select the shuffle of ``epoch``; accelerate calls this method."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of rows in an epoch."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """Yield each row number once."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        for start in range(0, len(shuffled), self.step_rows):
            step = shuffled[start : start + self.step_rows]
            step.sort(key=lambda row: self.lengths[row])
            for first in range(self.num_processes):
                yield from step[first :: self.num_processes]


def warn_of_padding(run: Run, cutting: Cutting, refusal: str) -> None:
    """Print why rows are padded, or that dropout differs from that of padded rows."""
    if run.speed.no_padding and cutting.padded:
        why = refusal or "train.neftune_alpha makes noise by the length of padded rows"
        print(f"rows are padded, and what they share is computed for each: {why}")
    elif cutting.share and run.adapter.dropout > 0:
        print(
            "adapter.dropout: what rows share is computed once, so that it drops out alike in all"
        )
