"""Owns the scores of whole rows: the loss of each, and whether each label is the likeliest token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from halfbyte.data.prefix_tree import Tokens, cut_step, lay_out, pass_tokens
from halfbyte.forward.packed import has_tree_attention

# A scored row puts all of its tokens into one pass, a growing answer one token into each: a scoring pass takes
# so many times fewer rows.
ROWS_PER_SCORED = 4


def row_losses(
    model: nn.Module,
    rows: Sequence[Tokens],
    num_rows: int,
    *,
    share: bool = True,
    padded: bool = False,
) -> list[tuple[float, int]]:
    """Return, for each row, its summed loss in nats and its number of labelled tokens.

    The result does not depend on how rows are grouped into passes, except for rounding.

    Args:
        model: a model with ``add_token_loss``.
        rows: ids and labels of each row.
        num_rows: a pass takes at most the tokens of so many of the longest rows.
        share: compute common prefixes once.
        padded: pad the rows of a pass to the longest.
    """
    losses = _predictions(model, rows, num_rows, "each", share=share, padded=padded)
    return [(sum(row.tolist()), len(row)) for row in losses]


def row_scores(
    model: nn.Module, rows: Sequence[Tokens], num_rows: int
) -> list[tuple[float, list[bool]]]:
    """Return, for each row, its summed loss in nats and, for each labelled token, if it is the likeliest one.

    As ``row_losses``: rows with a common prefix, such as the choices of a question, share it.
    """
    scores = _predictions(model, rows, num_rows, "scores", share=True, padded=False)
    return [(sum(losses.tolist()), (hits > 0).tolist()) for losses, hits in scores]


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
    """Return the model's ``token_loss`` of each row's n predictions: (n,) of losses, or (2, n) of scores."""
    if not rows:
        return []
    results: dict[int, torch.Tensor] = {}
    # Passes are as large as what is computed: padded rows where the model has no tree, and on an
    # accelerator, which gathers the keys of each row, as if nothing were shared.
    padded = padded or not has_tree_attention(model)
    counts_shared = share and not (
        token_loss == "scores" and next(model.parameters()).device.type != "cpu"
    )
    max_tokens = pass_tokens(rows, num_rows, share=counts_shared, padded=padded)
    training = model.training
    model.eval()
    for numbers in cut_step(rows, max_tokens, share=counts_shared, padded=padded):
        members = [rows[number] for number in numbers]
        layout = lay_out(members, share=share, padded=padded)
        predictions = model(layout=layout, token_loss=token_loss).double().cpu()  # (…, N)
        for number, columns in zip(numbers, layout.predictions, strict=True):
            results[number] = predictions[..., columns]  # (…, n)
    model.train(training)
    return [results[row] for row in range(len(rows))]
