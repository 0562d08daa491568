"""Owns the thoughts of an answer: what stands in a thinking block before it, and what is left without."""

from __future__ import annotations

import re

from halfbyte.data.conversation import Message
from halfbyte.data.special_tokens import pattern_of

MARKS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<reasoning>": "</reasoning>",
    "[THINK]": "[/THINK]",
    "<|channel>thought": "<channel|>",
    "<|START_THINKING|>": "<|END_THINKING|>",
}
OPENERS = re.compile(pattern_of(MARKS).pattern, re.IGNORECASE)
CLOSER_ALONE = re.compile(rf"^[ \t]*(?:{pattern_of(MARKS.values()).pattern})[ \t]*$", re.MULTILINE)


def split_thoughts(text: str) -> tuple[str | None, str]:
    """Return the thoughts of an answer, None if it has none, and the answer without them.

    Blocks may follow one another, and an empty block is no thoughts. A mark that closes a block which nothing has
    opened counts where it stands alone on its line: then the prompt has opened it. Of an answer that ends within
    its thoughts nothing is left.
    """
    blocks, rest = [], text
    while opening := OPENERS.match(rest.lstrip()):
        begun = rest.lstrip()
        block, closer, rest = begun[opening.end() :].partition(_closer(opening.group()))
        blocks.append(block.strip())
        if not closer:
            break
    if blocks:
        return "\n".join(filter(None, blocks)) or None, rest.lstrip()
    closing = CLOSER_ALONE.search(text)
    if closing is None or OPENERS.search(text[: closing.start()]):
        return None, text  # a block within the answer is the answer's own
    return text[: closing.start()].strip() or None, text[closing.end() :].lstrip()


def _closer(opener: str) -> str:
    """Return what closes a block, in the case of what opened it, as ``</Think>`` for ``<Think>``."""
    closer = next(closer for mark, closer in MARKS.items() if mark.casefold() == opener.casefold())
    word = re.sub(r"\W", "", opener)
    return closer if opener in MARKS else re.sub(re.escape(word), word, closer, flags=re.IGNORECASE)


def without_thoughts(text: str) -> str:
    """Return an answer without its thoughts."""
    return split_thoughts(text)[1]


def message_thoughts(message: Message) -> str | None:
    """Return the thoughts of a turn, be they a field of their own or a block in its content; None without any."""
    return message.reasoning or split_thoughts(message.content)[0]
