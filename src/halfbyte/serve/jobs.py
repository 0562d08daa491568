"""Owns the jobs of an engine: a request for one answer, and the events that report its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from halfbyte.serve.sampling import SampledToken, Sampler
from halfbyte.serve.text import TextStream

FinishReason = Literal["stop", "length", "timeout", "cancelled", "grammar", "error"]


@dataclass(frozen=True)
class Event:
    """Progress of a request: new text and tokens, or its end.

    Attributes:
        detail: the cause of the end, where the reason alone does not tell it.
    """

    text: str = ""
    tokens: tuple[SampledToken, ...] = ()
    finish_reason: FinishReason | None = None
    detail: str = ""


@dataclass
class Job:
    """A request for one answer.

    Attributes:
        prompt: ids, at least one.
        adapter: name of its adapter, or None for the base.
        max_tokens: length of the longest answer.
        stop_ids: tokens that end the answer.
        emit: called with events in the engine's thread; must not block.
        deadline: when the answer is cut off, on the monotonic clock.
        scores_prompt: number of the likeliest tokens to report in each place of the prompt; None to score none.
        num_shared: tokens of the prompt that the KV cache already held.
        prompt_tokens: the scored tokens of the prompt, from the second on.
    """

    prompt: list[int]
    adapter: str | None
    sampler: Sampler
    stream: TextStream
    max_tokens: int
    stop_ids: frozenset[int]
    emit: Callable[[Event], None]
    deadline: float
    scores_prompt: int | None = None
    cancelled: bool = False
    num_shared: int = 0
    num_generated: int = 0
    prompt_tokens: list[SampledToken] = field(default_factory=list)
