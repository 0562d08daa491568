"""Owns how a probe decides: its tokens, how far two computations may differ, which errors are refusals."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.errors import ModelError
from halfbyte.faults import is_out_of_memory

# In 16 bits a model may be sure of nothing on tokens that it has seldom seen, such as a row of control
# tokens: SmolLM2 in bf16 is 0.7 from itself in fp32 there and 0.02 on words. So a probe tries other tokens
# before it fails.
PROBE_ATTEMPTS = 3
PROBE_STRIDE, PROBE_SHIFT = 7919, 104_729  # primes: ids from all over a vocabulary
# Allowed norm of the difference, relative to the norm: more than rounding. In 16 bits rounding adds up over
# layers, so more is allowed where the plain pass differs from itself, up to a part of what another context
# would change.
TREE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
NOISE_FACTOR = 2
CONTEXT_FRAC = 0.25
PACKAGE = __name__.partition(".")[0]


def first_conclusive(attempt: Callable[[int], tuple[str, bool]]) -> str:
    """Repeat a probe on other tokens until it passes or its refusal is conclusive.

    Args:
        attempt: takes the number of the attempt; returns a refusal or "", and whether it is conclusive.

    Returns:
        the refusal of the last attempt, or "".
    """
    refusal = ""
    for number in range(PROBE_ATTEMPTS):
        refusal, is_conclusive = attempt(number)
        if not refusal or is_conclusive:
            break
    return refusal


@dataclass(frozen=True)
class Tolerance:
    """How far two ways to compute the same hidden states or logits may differ.

    Attributes:
        gap: the largest allowed ``relative_gap``.
        fault: a larger gap is a fault whatever the tokens; one in between may be rounding, which only other
            tokens tell.
    """

    gap: float
    fault: float

    @classmethod
    def of(cls, model: Any, noise: float, context_effect: float) -> Tolerance:
        """Set the tolerance for a model.

        Args:
            model: its embedding's dtype counts; the residual stream may be wider.
            noise: ``relative_gap`` of the plain pass from itself, computed in another order.
            context_effect: ``relative_gap`` of the plain pass after other tokens.
        """
        dtype = model.get_input_embeddings().weight.dtype
        least, most = TREE_TOLERANCE[dtype], CONTEXT_FRAC * context_effect
        if dtype == torch.float32:
            return cls(least, least)
        gap = max(least, min(NOISE_FACTOR * noise, most))
        return cls(gap, max(gap, NOISE_FACTOR * noise, most))


def probe_ids(model: Any, count: int, attempt: int) -> list[int]:
    """Return token ids for a probe, different ones for each attempt."""
    vocab_size = int(model.config.get_text_config().vocab_size)
    return [(PROBE_STRIDE * (n + 1) + PROBE_SHIFT * attempt) % vocab_size for n in range(count)]


def relative_gap(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference, relative to the norm of ``expected``."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


@contextlib.contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode, and back into the mode it was in, whatever the body raises."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def refusal_of(error: Exception) -> str:
    """Return the text of an error that speaks against a model, or raise the error again, unchanged.

    This is the rule of every probe. An error is a refusal only if the architecture is to blame:

    - Lack of memory never is a refusal: the model would do on a larger device.
    - An error is a refusal if transformers, torch or the model's own code raises it, that is, if its
      traceback ends there.
    - A RuntimeError, ValueError or ModelError that our own code raises is one too: the shapes, dtypes or
      options that the architecture gave to our attention do not fit. Any other error of our own code is our
      bug.

    Raises:
        Exception: ``error`` itself, if it is no refusal.
    """
    is_fault = isinstance(error, RuntimeError | ValueError | ModelError) or not _is_ours(error)
    if is_out_of_memory(error) or not is_fault:
        raise error
    return str(error)


def _is_ours(error: Exception) -> bool:
    """Whether the innermost frame of an error's traceback belongs to this package."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").split(".")[0] == PACKAGE
