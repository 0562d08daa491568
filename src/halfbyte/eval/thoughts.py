"""Owns the thoughts of an answer: what stands in a thinking block before it, and what is left without."""

from __future__ import annotations

import re

MARKS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<reasoning>": "</reasoning>",
    "[THINK]": "[/THINK]",
    "<|channel>": "<channel|>",
    "<|START_THINKING|>": "<|END_THINKING|>",
}
OPENER = re.compile("|".join(map(re.escape, MARKS)))
CLOSER = re.compile("|".join(map(re.escape, MARKS.values())))


def split_thoughts(text: str) -> tuple[str | None, str]:
    """Return the thoughts of an answer, None if it has none, and the answer without them.

    The block may have been opened by the prompt. Of an answer that ends within its thoughts nothing is left.
    """
    opener = OPENER.match(text.lstrip())
    closer = CLOSER.search(text)
    if closer is None:
        return (text.lstrip()[opener.end() :].strip(), "") if opener else (None, text)
    if opener is None and OPENER.search(text[: closer.start()]):
        return None, text  # a block within the answer is the answer's own
    thoughts = text[: closer.start()].lstrip()
    return thoughts[opener.end() if opener else 0 :].strip(), text[closer.end() :].lstrip()


def without_thoughts(text: str) -> str:
    """Return an answer without its thoughts."""
    return split_thoughts(text)[1]
