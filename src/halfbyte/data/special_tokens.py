"""Owns control tokens: which strings they are, and messages in which the same characters are text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from halfbyte.data.rows import Message
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Supplementary private use area A: stands in for control strings while the template runs.
SENTINEL_START = 0xF0000
SENTINELS = re.compile("[\U000f0000-\U000ffffd]")


class Controls:
    """The control strings of one tokenizer and template.

    Args:
        strings: every control string, longer ones found before those that they contain.
        tokenizer: gives each its id.

    Attributes:
        ids: control string to token id.
        pattern: finds the next control string in a text.
    """

    def __init__(self, strings: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.strings = frozenset(strings)
        longest_first = sorted(self.strings, key=lambda token: (-len(token), token))
        self.ids: dict[str, int] = {
            token: tokenizer.convert_tokens_to_ids(token) for token in longest_first
        }
        either = "|".join(map(re.escape, longest_first)) or r"(?!)"
        self.pattern = re.compile(either)
        self._cut = re.compile(f"({either})")
        self._starts = {token[:size] for token in self.strings for size in range(1, len(token))}
        self._ends = {token[size:] for token in self.strings for size in range(1, len(token))}
        self._last_of_starts = {start[-1] for start in self._starts}
        self._first_of_ends = {end[0] for end in self._ends}
        self._longest = max(map(len, self.strings), default=0)

    def split(self, text: str) -> list[str]:
        """Text, control string, text, …, text: the parts of ``text`` in turn, texts may be empty."""
        return self._cut.split(text)

    def neutralise(
        self, messages: tuple[Message, ...], place: str
    ) -> tuple[tuple[Message, ...], dict[str, str]]:
        """Messages with a sentinel for each control string, and what each sentinel stands for.

        The ends of a message are guarded too, where they could complete a control string together
        with what the template writes next to them.

        Raises:
            DataError: a message holds a sentinel itself.
        """
        table: dict[str, str] = {}

        def sentinel(text: str) -> str:
            for char, known in table.items():
                if known == text:
                    return char
            char = chr(SENTINEL_START + len(table))
            table[char] = text
            return char

        neutral = []
        for message in messages:
            content = message.content
            if SENTINELS.search(content):
                raise DataError(
                    f"{place}: a {message.role} message holds a private-use character"
                    " (U+F0000 to U+FFFFD), which halfbyte reserves; remove it"
                )
            content = self.pattern.sub(lambda found: sentinel(found.group()), content)
            size = len(content.rstrip())
            tail = self._tail(content, size)
            if tail < size:
                content = content[:tail] + sentinel(content[tail:size]) + content[size:]
            lead = len(content) - len(content.lstrip())
            head = self._head(content, lead)
            if head > lead:
                content = content[:lead] + sentinel(content[lead:head]) + content[head:]
            same = content == message.content
            neutral.append(message if same else Message(message.role, content))
        return tuple(neutral), table

    def _tail(self, content: str, size: int) -> int:
        """Where the longest beginning of a control string begins that ends at ``size``."""
        if size == 0 or content[size - 1] not in self._last_of_starts:
            return size
        first = max(0, size - self._longest)
        return next((n for n in range(first, size) if content[n:size] in self._starts), size)

    def _head(self, content: str, lead: int) -> int:
        """Where the longest ending of a control string ends that begins at ``lead``."""
        if lead == len(content) or content[lead] not in self._first_of_ends:
            return lead
        last = min(len(content), lead + self._longest)
        return next((n for n in range(last, lead, -1) if content[lead:n] in self._ends), lead)
