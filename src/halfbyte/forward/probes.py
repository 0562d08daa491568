"""Owns how a probe decides: the tokens it tries, and how far two ways to compute the same may be apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# In 16 bits a model may be sure of nothing on tokens that it has seldom seen, such as a row of control tokens:
# SmolLM2 in bf16 is 0.7 from itself in fp32 there and 0.02 on words. So other tokens are tried before it fails.
PROBE_TURNS = 3
PROBE_STRIDE, PROBE_SHIFT = 7919, 104_729  # primes: words from all over a vocabulary
# Norm of the difference by the norm: rounding is below. In 16 bits it adds up over layers, so that more is
# allowed where the plain pass differs from itself, up to a part of what another context would change.
TREE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
NOISE_FACTOR = 2
CONTEXT_FRAC = 0.25


def first_sure(attempt: Callable[[int], tuple[str, bool]]) -> str:
    """The refusal of the first turn of a probe that has none or is sure of it, else that of the last."""
    refusal = ""
    for turn in range(PROBE_TURNS):
        refusal, is_sure = attempt(turn)
        if not refusal or is_sure:
            break
    return refusal


@dataclass(frozen=True)
class Allowed:
    """How far two ways to compute the same may be apart.

    Attributes:
        gap: as ``relative_gap``.
        is_sure: whether a larger gap is a fault; else the plain pass differs from itself too much to say.
    """

    gap: float
    is_sure: bool

    @classmethod
    def of(cls, model: Any, noise: float, context: float) -> Allowed:
        """From how far the plain pass is from itself, and from what it gives after other tokens."""
        dtype = model.get_input_embeddings().weight.dtype  # the residual stream may be wider
        least, most = TREE_TOLERANCE[dtype], CONTEXT_FRAC * context
        if dtype == torch.float32:
            return cls(least, True)
        return cls(max(least, min(NOISE_FACTOR * noise, most)), NOISE_FACTOR * noise <= most)


def probe_words(model: Any, count: int, turn: int) -> list[int]:
    """Tokens for a probe, others at each turn."""
    limit = int(model.config.get_text_config().vocab_size)
    return [(PROBE_STRIDE * (n + 1) + PROBE_SHIFT * turn) % limit for n in range(count)]


def relative_gap(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference by the norm."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())
