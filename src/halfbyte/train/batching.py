"""Owns which rows go together: the order of training rows, and the cut of a step into passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import Sampler

from halfbyte.config.schema import Speed
from halfbyte.data.prefix_tree import Layout, Tokens, cut_step, lay_out, pass_tokens
from halfbyte.forward.scoring import row_losses


@dataclass(frozen=True)
class Cutting:
    """How the rows of a step become passes.

    Attributes:
        micro_batch_size: a pass takes at most the tokens of so many of the longest rows.
        share: compute common prefixes once.
        padded: pad the rows of a pass to the longest.
        max_tokens: what that comes to for the training rows.
    """

    micro_batch_size: int
    share: bool
    padded: bool
    max_tokens: int

    @classmethod
    def of(
        cls, rows: Sequence[Tokens], micro_batch_size: int, speed: Speed, refusal: str
    ) -> Cutting:
        """For these training rows; ``refusal``: why the model takes padded rows alone, if it does."""
        share, padded = speed.layout(refusal)
        tokens = pass_tokens(rows, micro_batch_size, share=share, padded=padded)
        return cls(micro_batch_size, share, padded, tokens)

    def layout(self, rows: Sequence[Tokens]) -> Layout:
        """One pass over these rows."""
        return lay_out(rows, share=self.share, padded=self.padded)

    def step(self, rows: Sequence[Tokens]) -> list[Layout]:
        """The passes of an optimizer step."""
        cut = cut_step(rows, self.max_tokens, share=self.share, padded=self.padded)
        return [self.layout([rows[number] for number in numbers]) for numbers in cut]

    def losses(self, model: nn.Module, rows: Sequence[Tokens]) -> list[tuple[float, int]]:
        """``row_losses`` in passes of the same kind."""
        rows_a_pass = self.micro_batch_size
        return row_losses(model, rows, rows_a_pass, share=self.share, padded=self.padded)


class StepwiseSampler(Sampler[int]):
    """Row numbers in the order of a seeded shuffle, dealt to processes by length within each step.

    The loss of a step is a sum over its tokens, so that the order of rows inside a step changes
    nothing but which process has how much to do. Each epoch has a shuffle of its own, which depends on
    seed and epoch alone.

    Args:
        lengths: tokens of each row.
        step_rows: rows in one optimizer step, over all processes.
        seed: of the shuffle.
        num_processes: each takes a batch of a step in turn.
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
            step.sort(key=lambda row: self.lengths[row])
            for first in range(self.num_processes):
                yield from step[first :: self.num_processes]
