"""Owns the comparison of a copy with the trained model: KL, top-1 agreement and loss on held-out rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn

from halfbyte.data.encoded import IGNORED
from halfbyte.forward.packed import pad_right

LOGITS_BYTES = 512 << 20  # for the trained model's log-probabilities, in fp32
BATCH_LOGITS_BYTES = 512 << 20

Rows = list[tuple[list[int], list[int]]]
# (rows, positions in each, columns of the reference) → (log-probabilities (N, W) in fp32, loss)
Predict = Callable[[Rows, list[list[int]], int], tuple[torch.Tensor, float]]


@dataclass(frozen=True)
class Reference:
    """The trained model's log-probabilities (N, V), in fp32 on the CPU, and its loss on given rows."""

    log_probs: torch.Tensor
    loss: float
    positions: list[list[int]]


@dataclass(frozen=True)
class Fidelity:
    """How close a copy is to the trained model.

    Attributes:
        kl_nats_per_token: mean KL(trained ‖ copy) over positions.
        top1_agreement: share of positions with the same most likely next token.
        loss: mean over labelled tokens, in nats.
    """

    kl_nats_per_token: float
    top1_agreement: float
    loss: float
    num_positions: int

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss)

    def as_json(self) -> dict[str, float | int]:
        """Return the figures for a report."""
        return asdict(self)


def choose_positions(rows: Rows, vocabulary: int) -> list[list[int]]:
    """Return the positions to compare in each row: all, or only the last ones if memory is short."""
    each = max(1, LOGITS_BYTES // (4 * vocabulary) // len(rows))
    return [list(range(max(0, len(ids) - 1 - each), len(ids) - 1)) for ids, _ in rows]


def reference(predict: Predict, rows: Rows, vocabulary: int) -> Reference:
    """Predict the rows with the trained model."""
    positions = choose_positions(rows, vocabulary)
    log_probs, loss = predict(rows, positions, vocabulary)
    return Reference(log_probs, loss, positions)


def fidelity(predict: Predict, rows: Rows, trained: Reference) -> Fidelity:
    """Compare a copy's predictions with the trained model's at each position.

    If the copy has fewer columns, both are normalised over those: the other columns are padding of the
    embedding, which no token uses.
    """
    return agreement(*predict(rows, trained.positions, trained.log_probs.shape[1]), trained)


def agreement(log_probs: torch.Tensor, loss: float, trained: Reference) -> Fidelity:
    """Compare a copy's log-probabilities at the reference's positions with the reference."""
    width = log_probs.shape[1]
    kl, same = 0.0, 0
    for start in range(0, len(log_probs), 256):
        ours = trained.log_probs[start : start + 256, :width].double().log_softmax(dim=1)
        theirs = log_probs[start : start + 256].double().log_softmax(dim=1)
        kl += float((ours.exp() * (ours - theirs)).sum())
        same += int((ours.argmax(1) == theirs.argmax(1)).sum())
    count = len(log_probs)
    return Fidelity(kl / count, same / count, loss, count)


def torch_predict(model: nn.Module, pad_id: int) -> Predict:
    """Return the ``Predict`` function of a transformers or PEFT model."""
    return functools.partial(_predict, model, pad_id)


@torch.no_grad()
def _predict(
    model: nn.Module, pad_id: int, rows: Rows, positions: list[list[int]], vocabulary: int
) -> tuple[torch.Tensor, float]:
    device = next(model.parameters()).device
    model.eval()
    chosen, total, count = [], 0.0, 0
    longest = max(len(ids) for ids, _ in rows)
    batch_rows = max(1, BATCH_LOGITS_BYTES // (4 * longest * vocabulary))
    for start in range(0, len(rows), batch_rows):
        part = rows[start : start + batch_rows]
        batch = pad_right(part, pad_id, device)
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        for row, keep in enumerate(positions[start : start + batch_rows]):
            chosen.append(torch.log_softmax(logits[row, keep].float(), dim=-1).cpu())
        labels = batch["labels"][:, 1:]
        mask = labels != IGNORED
        total += float(
            nn.functional.cross_entropy(logits[:, :-1][mask].float(), labels[mask], reduction="sum")
        )
        count += int(mask.sum())
    return torch.cat(chosen), total / count
