"""Owns special tokens: which strings they are, and how the same characters in messages stay text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from halfbyte.data.conversation import Message, ToolCall
from halfbyte.data.fields import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Supplementary private use area A: its characters replace special-token text while the template runs.
SENTINEL_START = 0xF0000
SENTINELS = re.compile("[\U000f0000-\U000ffffd]")


def longest_first(strings: Iterable[str]) -> list[str]:
    """Return strings so that each stands before those that it contains."""
    return sorted(strings, key=lambda string: (-len(string), string))


def pattern_of(strings: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of these strings, the longest first; it matches nothing of none."""
    return re.compile("|".join(map(re.escape, longest_first(strings))) or r"(?!)")


class SpecialTokens:
    """The special tokens of one tokenizer and template.

    A text in which the same characters stand by chance, or to deceive, must not turn into such a token.
    What an assistant writes may hold those that the model itself writes inside an answer, such as the
    marks of thoughts and of tool calls.

    Args:
        strings: text of every special token; longer ones match before those that they contain.
        tokenizer: maps each to its id.
        marks: those that no text may hold, an assistant's neither: marks of turns, stop tokens, BOS, EOS;
            None for all.

    Attributes:
        strings: text of every special token.
        marks: text of those that no text may hold.
        ids: special-token text to token id.
        pattern: matches the next special-token text in a text.
    """

    def __init__(
        self,
        strings: Iterable[str],
        tokenizer: PreTrainedTokenizerBase,
        marks: Iterable[str] | None = None,
    ) -> None:
        self.strings = frozenset(strings)
        self.marks = self.strings if marks is None else self.strings & frozenset(marks)
        self.ids: dict[str, int] = {
            token: tokenizer.convert_tokens_to_ids(token) for token in longest_first(self.strings)
        }
        self.pattern = pattern_of(self.strings)
        self._mark_pattern = pattern_of(self.marks)
        self._split_pattern = re.compile(f"({self.pattern.pattern})")
        self._prefixes = {token[:size] for token in self.strings for size in range(1, len(token))}
        self._suffixes = {token[size:] for token in self.strings for size in range(1, len(token))}
        self._last_of_prefixes = {prefix[-1] for prefix in self._prefixes}
        self._first_of_suffixes = {suffix[0] for suffix in self._suffixes}
        self._first_chars = {token[0] for token in self.strings}
        self._max_length = max(map(len, self.strings), default=0)

    def split(self, text: str) -> list[str]:
        """Split ``text`` into text, special token, text, …, text; the texts may be empty."""
        return self._split_pattern.split(text)

    def escape(
        self, messages: tuple[Message, ...], place: str, tools: str = ""
    ) -> tuple[tuple[Message, ...], str, dict[str, str]]:
        """Replace special-token text in messages and tools by sentinels.

        The ends of a text are replaced as well where they could complete a special token together with
        what the template writes next to them.

        Returns:
            The messages and tools with sentinels, and the text that each sentinel stands for.

        Raises:
            RowError: a text itself contains a sentinel.
        """
        escaper = _Escaper(self, place)
        escaped = tuple([escaper.message(message) for message in messages])
        return escaped, escaper.json(tools, "tools") if tools else tools, escaper.originals

    def leaves(self, text: str) -> bool:
        """Return whether it is plain at a glance that ``escape`` replaces nothing in a text."""
        if not text.isascii():  # it may hold a sentinel
            return False
        for char in self._first_chars:
            if char in text:
                return False
        first, last = text[:1], text[-1:]
        return not (
            first.isspace()
            or last.isspace()
            or first in self._first_of_suffixes
            or last in self._last_of_prefixes
        )

    def ends(self, text: str) -> bool:
        """Return whether a text ends with a special token."""
        return text.endswith(tuple(self.ids))

    def of_role(self, role: str) -> re.Pattern[str]:
        """Return the pattern of special-token text that stays text in what this role writes."""
        return self._mark_pattern if role == "assistant" else self.pattern

    def prefix_start(self, content: str, size: int) -> int:
        """Return where the longest proper prefix of a special token starts that ends at ``size``.

        Where none does, return ``size``.
        """
        if size == 0 or content[size - 1] not in self._last_of_prefixes:
            return size
        first = max(0, size - self._max_length)
        return next((n for n in range(first, size) if content[n:size] in self._prefixes), size)

    def suffix_end(self, content: str, lead: int) -> int:
        """Return where the longest proper suffix of a special token ends that starts at ``lead``.

        Where none does, return ``lead``.
        """
        if lead == len(content) or content[lead] not in self._first_of_suffixes:
            return lead
        last = min(len(content), lead + self._max_length)
        return next((n for n in range(last, lead, -1) if content[lead:n] in self._suffixes), lead)


class _Escaper:
    """Puts sentinels into the texts of one row.

    Attributes:
        originals: the text that each sentinel stands for.
    """

    def __init__(self, tokens: SpecialTokens, place: str) -> None:
        self.tokens, self.place = tokens, place
        self.originals: dict[str, str] = {}

    def message(self, message: Message) -> Message:
        """Return the message with sentinels, or itself if there is nothing to replace."""
        if message.is_plain and self.tokens.leaves(message.content):
            return message
        pattern = self.tokens.of_role(message.role)
        content = self._text(message.content, pattern, message.role)
        if message.is_plain:
            return message if content is message.content else replace(message, content=content)
        return replace(
            message,
            content=content,
            reasoning=message.reasoning and self._text(message.reasoning, pattern, message.role),
            name=message.name and self._text(message.name, self.tokens.pattern, message.role),
            tool_call_id=message.tool_call_id
            and self._text(message.tool_call_id, self.tokens.pattern, message.role),
            tool_calls=tuple(
                ToolCall(
                    self._text(call.name, self.tokens.pattern, message.role),
                    self.json(call.arguments, message.role),
                    call.id and self._text(call.id, self.tokens.pattern, message.role),
                )
                for call in message.tool_calls
            ),
        )

    def json(self, text: str, owner: str) -> str:
        """Return JSON text with sentinels in its strings, whose quotes keep their ends from the template."""
        self._check(text, owner)
        return self.tokens.pattern.sub(lambda match: self._sentinel(match.group()), text)

    def _text(self, text: str, pattern: re.Pattern[str], owner: str) -> str:
        self._check(text, owner)
        written = text
        text = pattern.sub(lambda match: self._sentinel(match.group()), text)
        size = len(text.rstrip())
        tail = self.tokens.prefix_start(text, size)
        if tail < size:
            text = text[:tail] + self._sentinel(text[tail:size]) + text[size:]
        lead = len(text) - len(text.lstrip())
        head = self.tokens.suffix_end(text, lead)
        if head > lead:
            text = text[:lead] + self._sentinel(text[lead:head]) + text[head:]
        return written if text == written else text

    def _check(self, text: str, owner: str) -> None:
        if SENTINELS.search(text):
            raise RowError(
                self.place,
                "a private-use character",
                f"a {owner} message holds a private-use character (U+F0000 to U+FFFFD), which halfbyte"
                " reserves; remove it",
            )

    def _sentinel(self, text: str) -> str:
        for char, original in self.originals.items():
            if original == text:
                return char
        char = chr(SENTINEL_START + len(self.originals))
        self.originals[char] = text
        return char
