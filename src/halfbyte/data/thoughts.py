"""Owns the thoughts of an answer: what stands in a thinking block before it, and what is left without."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

from halfbyte.data.special_tokens import pattern_of

MARKS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<reasoning>": "</reasoning>",
    "[THINK]": "[/THINK]",
    "<|channel>thought": "<channel|>",
    "<|START_THINKING|>": "<|END_THINKING|>",
}


def split_thoughts(text: str, marks: Mapping[str, str] = MARKS) -> tuple[str | None, str]:
    """Return the thoughts of an answer, None if it has none, and the answer without them.

    An empty block is no thoughts. The block may have been opened by the prompt. Of an answer that ends within its thoughts nothing is left.

    Args:
        text: the answer.
        marks: what closes a block, by what opens it.
    """
    begun = text.lstrip()
    opening = _any_of(tuple(marks)).match(begun)
    if opening is not None:
        thoughts, closer, rest = begun[opening.end() :].partition(marks[opening.group()])
        return thoughts.strip() or None, rest.lstrip() if closer else ""
    closing = _any_of(tuple(marks.values())).search(text)
    if closing is None or _any_of(tuple(marks)).search(text[: closing.start()]):
        return None, text  # a block within the answer is the answer's own
    return text[: closing.start()].strip() or None, text[closing.end() :].lstrip()


def without_thoughts(text: str) -> str:
    """Return an answer without its thoughts."""
    return split_thoughts(text)[1]


@functools.lru_cache(maxsize=64)
def _any_of(marks: tuple[str, ...]) -> re.Pattern[str]:
    return pattern_of(marks)
