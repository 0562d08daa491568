"""Owns the held-out loss during training, over all processes, and per source where there are several."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from halfbyte.data.samples import TokenRows
from halfbyte.train.batching import Cutting
from halfbyte.train.source_losses import SourceLosses

if TYPE_CHECKING:
    from accelerate import Accelerator


class EvaluationCutError(Exception):
    """A signal has come during an evaluation, which may take long, and which the next attempt makes again."""


def held_out_losses(
    model: torch.nn.Module,
    cutting: Cutting,
    rows: TokenRows,
    weights: list[float] | None,
    sources: SourceLosses | None,
    state: Accelerator,
) -> tuple[float, dict[str, float]]:
    """Return the held-out loss in nats per labelled token, and that of each source by its name.

    Args:
        model: the model with its adapter.
        cutting: how rows are divided into passes.
        rows: the held-out rows of all processes.
        weights: a factor for each; None for 1.
        sources: which row is of which source; None where there is one.
        state: the processes that train together, each of which computes its share.
    """
    own = slice(state.process_index, None, state.num_processes)
    losses = cutting.losses(model, rows[own])
    factors = (weights or [1.0] * len(rows))[own]
    total = sum(w * loss for w, (loss, _) in zip(factors, losses, strict=True))
    count = sum(w * count for w, (_, count) in zip(factors, losses, strict=True))
    sums = state.reduce(torch.tensor([total, count], dtype=torch.float64, device=state.device))
    by_source = sources.of_rows(losses, factors, sources.held_out[own], state) if sources else {}
    return float(sums[0] / sums[1]), by_source


def of_main_process(
    evaluated: tuple[int, float | None], state: Accelerator
) -> tuple[int, float | None]:
    """Return the step and the loss of the last evaluation as the main process knows them, which has the records."""
    if state.num_processes == 1:
        return evaluated
    known = [evaluated]
    torch.distributed.broadcast_object_list(known, src=0)
    return known[0]
