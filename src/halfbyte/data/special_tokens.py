"""Owns special tokens: which strings they are, and how the same characters in messages stay text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from halfbyte.data.rows import Message
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Supplementary private use area A: its characters replace special-token text while the template runs.
SENTINEL_START = 0xF0000
SENTINELS = re.compile("[\U000f0000-\U000ffffd]")


class SpecialTokens:
    """The special tokens of one tokenizer and template.

    Args:
        strings: text of every special token; longer ones match before those that they contain.
        tokenizer: maps each to its id.

    Attributes:
        strings: text of every special token.
        ids: special-token text to token id.
        pattern: matches the next special-token text in a text.
    """

    def __init__(self, strings: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.strings = frozenset(strings)
        longest_first = sorted(self.strings, key=lambda token: (-len(token), token))
        self.ids: dict[str, int] = {
            token: tokenizer.convert_tokens_to_ids(token) for token in longest_first
        }
        alternatives = "|".join(map(re.escape, longest_first)) or r"(?!)"
        self.pattern = re.compile(alternatives)
        self._split_pattern = re.compile(f"({alternatives})")
        self._prefixes = {token[:size] for token in self.strings for size in range(1, len(token))}
        self._suffixes = {token[size:] for token in self.strings for size in range(1, len(token))}
        self._last_of_prefixes = {prefix[-1] for prefix in self._prefixes}
        self._first_of_suffixes = {suffix[0] for suffix in self._suffixes}
        self._max_length = max(map(len, self.strings), default=0)

    def split(self, text: str) -> list[str]:
        """Split ``text`` into text, special token, text, …, text; the texts may be empty."""
        return self._split_pattern.split(text)

    def escape(
        self, messages: tuple[Message, ...], place: str
    ) -> tuple[tuple[Message, ...], dict[str, str]]:
        """Replace special-token text in messages by sentinels.

        The ends of a message are replaced as well where they could complete a special token together
        with what the template writes next to them.

        Returns:
            The messages with sentinels, and the text that each sentinel stands for.

        Raises:
            DataError: a message itself contains a sentinel.
        """
        originals: dict[str, str] = {}

        def sentinel_for(text: str) -> str:
            for char, original in originals.items():
                if original == text:
                    return char
            char = chr(SENTINEL_START + len(originals))
            originals[char] = text
            return char

        escaped = []
        for message in messages:
            content = message.content
            if SENTINELS.search(content):
                raise DataError(
                    f"{place}: a {message.role} message holds a private-use character"
                    " (U+F0000 to U+FFFFD), which halfbyte reserves; remove it"
                )
            content = self.pattern.sub(lambda match: sentinel_for(match.group()), content)
            size = len(content.rstrip())
            tail = self._prefix_start(content, size)
            if tail < size:
                content = content[:tail] + sentinel_for(content[tail:size]) + content[size:]
            lead = len(content) - len(content.lstrip())
            head = self._suffix_end(content, lead)
            if head > lead:
                content = content[:lead] + sentinel_for(content[lead:head]) + content[head:]
            unchanged = content == message.content
            escaped.append(message if unchanged else Message(message.role, content))
        return tuple(escaped), originals

    def _prefix_start(self, content: str, size: int) -> int:
        """Return where the longest proper prefix of a special token starts that ends at ``size``.

        Where none does, return ``size``.
        """
        if size == 0 or content[size - 1] not in self._last_of_prefixes:
            return size
        first = max(0, size - self._max_length)
        return next((n for n in range(first, size) if content[n:size] in self._prefixes), size)

    def _suffix_end(self, content: str, lead: int) -> int:
        """Return where the longest proper suffix of a special token ends that starts at ``lead``.

        Where none does, return ``lead``.
        """
        if lead == len(content) or content[lead] not in self._first_of_suffixes:
            return lead
        last = min(len(content), lead + self._max_length)
        return next((n for n in range(last, lead, -1) if content[lead:n] in self._suffixes), lead)
