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

    Blocks may follow one another, and an empty block is no thoughts. A mark that closes a block which nothing has
    opened counts where it stands alone on its line: then the prompt has opened it. Of an answer that ends within
    its thoughts nothing is left.

    Args:
        text: the answer.
        marks: what closes a block, by what opens it.
    """
    blocks, rest = [], text
    openers = _any_of(tuple(marks))
    while opening := openers.match(rest.lstrip()):
        begun = rest.lstrip()
        block, closer, rest = begun[opening.end() :].partition(_closer(marks, opening.group()))
        blocks.append(block.strip())
        if not closer:
            break
    if blocks:
        return "\n".join(filter(None, blocks)) or None, rest.lstrip()
    closing = _alone(tuple(marks.values())).search(text)
    if closing is None or openers.search(text[: closing.start()]):
        return None, text  # a block within the answer is the answer's own
    return text[: closing.start()].strip() or None, text[closing.end() :].lstrip()


def _closer(marks: Mapping[str, str], opener: str) -> str:
    """Return what closes a block, by what opened it in whatever case."""
    closer = next(closer for mark, closer in marks.items() if mark.casefold() == opener.casefold())
    return closer if opener in marks else _cased(closer, opener)


def _cased(closer: str, opener: str) -> str:
    """Return a closing mark in the case of its opening one, as ``</Think>`` for ``<Think>``."""
    word = re.sub(r"\W", "", opener)
    return re.sub(re.escape(word), word, closer, flags=re.IGNORECASE)


def without_thoughts(text: str) -> str:
    """Return an answer without its thoughts."""
    return split_thoughts(text)[1]


@functools.lru_cache(maxsize=64)
def _any_of(marks: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(pattern_of(marks).pattern, re.IGNORECASE)


@functools.lru_cache(maxsize=64)
def _alone(marks: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"^[ \t]*(?:{pattern_of(marks).pattern})[ \t]*$", re.MULTILINE)
