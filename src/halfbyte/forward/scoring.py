"""Owns what a model says of whole rows: the loss of each, and whether each label is the likeliest token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from halfbyte.data.prefix_tree import Tokens, cut_step, lay_out, pass_tokens

# A row that is scored takes a pass with all its tokens, an answer that grows with one: so many fewer rows.
ROWS_PER_SCORED = 4


def row_losses(
    model: nn.Module,
    rows: Sequence[Tokens],
    num_rows: int,
    *,
    share: bool = True,
    padded: bool = False,
) -> list[tuple[float, int]]:
    """For each row its summed loss in nats and the number of labelled tokens.

    ``model`` knows ``token_loss``; a pass takes at most the tokens of the ``num_rows`` longest rows. The
    result does not depend on how rows are put together but for rounding.
    """
    found = _predictions(model, rows, num_rows, "each", share=share, padded=padded)
    return [(sum(losses.tolist()), len(losses)) for losses in found]


def row_scores(
    model: nn.Module, rows: Sequence[Tokens], num_rows: int
) -> list[tuple[float, list[bool]]]:
    """For each row its summed loss in nats, and for each labelled token whether it is the likeliest one.

    As ``row_losses``: rows that begin alike, such as the choices of a question, share that beginning.
    """
    found = _predictions(model, rows, num_rows, "scores", share=True, padded=False)
    return [(sum(losses.tolist()), (hits > 0).tolist()) for losses, hits in found]


@torch.no_grad()
def _predictions(
    model: nn.Module,
    rows: Sequence[Tokens],
    num_rows: int,
    token_loss: Literal["each", "scores"],
    *,
    share: bool,
    padded: bool,
) -> list[torch.Tensor]:
    """What the model says of each row's predictions, (…, number of them)."""
    if not rows:
        return []
    found: dict[int, torch.Tensor] = {}
    # Passes are as large as what is computed: padded rows where the model has no tree, and on an
    # accelerator, which gathers the keys of each row, as if nothing were shared.
    padded = padded or getattr(model, "pads_rows", False)
    counted = share and not (
        token_loss == "scores" and next(model.parameters()).device.type != "cpu"
    )
    most = pass_tokens(rows, num_rows, share=counted, padded=padded)
    training = model.training
    model.eval()
    for numbers in cut_step(rows, most, share=counted, padded=padded):
        members = [rows[number] for number in numbers]
        layout = lay_out(members, share=share, padded=padded)
        told = model(layout=layout, token_loss=token_loss).double().cpu()
        for number, mine in zip(numbers, layout.predictions, strict=True):
            found[number] = told[..., mine]
    model.train(training)
    return [found[row] for row in range(len(rows))]
