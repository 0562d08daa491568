"""Owns the losses of single sources, where a run is trained on several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from halfbyte.forward.packed_layout import PackedLayout
from halfbyte.train.setup import Setup

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class SourceLosses:
    """Sums losses and their weights for each source.

    Attributes:
        names: names of the sources.
        train: number of the source of each training row.
        held_out: number of the source of each row on which the loss is measured.
        sums: losses in nats and weights since they were taken, for each source; (2, S).
    """

    names: list[str]
    train: list[int]
    held_out: list[int]
    sums: torch.Tensor | None = field(default=None)

    @classmethod
    def of(cls, setup: Setup) -> SourceLosses | None:
        """Return the sums of a training, None if it has one source."""
        sources = setup.run.data.sources()
        if sum(part == "train" for part, _ in sources) < 2:
            return None
        names = [source.name or "" for _, source in sources]
        return cls(names, setup.train.sources.tolist(), setup.held_out.sources.tolist())

    def add(self, layout: PackedLayout, losses: torch.Tensor) -> torch.Tensor:
        """Add the losses (N,) of a pass to those of its rows' sources; return their weighted sum."""
        counts = layout["shares"]  # (S, N): those of each prediction, divided among the sources
        found = torch.stack([counts @ losses.detach().float(), counts.sum(dim=1)])  # (2, S)
        self.sums = found if self.sums is None else self.sums + found
        return (losses * layout["counts"]).sum()

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the mean loss of each source since this was last called, over all processes."""
        sums, self.sums = self.sums, None
        if sums is None:
            sums = torch.zeros(2, len(self.names), device=accelerator.device)
        return self._means(sums, accelerator)

    def of_rows(
        self,
        losses: Sequence[tuple[float, int]],
        weights: Sequence[float],
        groups: Sequence[int],
        accelerator: Accelerator,
    ) -> dict[str, float]:
        """Return the mean loss of each source over all processes.

        Args:
            losses: the summed loss and the number of labels of each row of this process.
            weights: the rows' weights.
            groups: the numbers of their sources.
            accelerator: the processes.
        """
        sums = torch.zeros(2, len(self.names), dtype=torch.float64)
        for (loss, count), weight, group in zip(losses, weights, groups, strict=True):
            sums[0, group] += weight * loss
            sums[1, group] += weight * count
        return self._means(sums.to(accelerator.device), accelerator)

    def _means(self, sums: torch.Tensor, accelerator: Accelerator) -> dict[str, float]:
        losses, counts = accelerator.reduce(sums, "sum").tolist()
        return {
            name: loss / count
            for name, loss, count in zip(self.names, losses, counts, strict=True)
            if count > 0
        }
