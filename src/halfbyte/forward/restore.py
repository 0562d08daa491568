"""Owns putting a model's forward back after a library has replaced it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def forward_kept(model: nn.Module) -> Iterator[None]:
    """Give ``model`` the forward it had before, whatever the body of the ``with`` puts in its place.

    TRL 1.16 replaces it on construction of SFTTrainer (``add_fused_lm_head``) by one that scores all
    positions. Can go when TRL lets the caller choose.
    """
    before = vars(model).get("forward")
    yield
    if before is None:
        vars(model).pop("forward", None)
    else:
        model.forward = before
