"""Owns the texts of copying chat templates: one rendering serves all rows with the same roles."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from halfbyte.data.rows import Message
from halfbyte.data.special_tokens import SENTINEL_START
from halfbyte.data.template_analysis import only_copies
from halfbyte.errors import DataError

# A placeholder stands for a content, between two spaces that show whether the template trimmed its ends.
EDGE = "\u2003"
PLACEHOLDERS = re.compile(f"({EDGE}?)([\U000f0000-\U000ffffd])({EDGE}?)")


@dataclass(frozen=True)
class _RenderedTemplate:
    """A rendered text with placeholders for contents: literal, content, literal, …, literal.

    Attributes:
        literals: the texts that the template writes, one more than there are placeholders.
        placeholders: for each, the number of the message whose content it stands for, and whether the
            template trims that content.
    """

    literals: list[str]
    placeholders: list[tuple[int, bool]]

    def fill(self, contents: list[str], trimmed: list[str]) -> str:
        """Return the text with each message's content, or its trimmed content, put in."""
        parts = [""] * (len(self.literals) + len(self.placeholders))
        parts[::2] = self.literals
        parts[1::2] = [
            (trimmed if trim else contents)[number] for number, trim in self.placeholders
        ]
        return "".join(parts)


class TemplateCache:
    """The texts that one chat template writes, rendered once for each sequence of roles.

    Args:
        template: Jinja text, or None.
        render: runs the template: the text of a conversation, then of the prompt of each answer.
    """

    def __init__(
        self, template: str | None, render: Callable[[tuple[Message, ...]], list[str]]
    ) -> None:
        self._render = render
        self._copies = isinstance(template, str) and (
            only_copies(template) and EDGE not in template and not PLACEHOLDERS.search(template)
        )
        self._rendered: dict[tuple[str, ...], list[_RenderedTemplate]] = {}

    def texts(self, messages: tuple[Message, ...]) -> Iterator[str] | None:
        """Return what ``render`` would, or None if the template must be run for these messages."""
        if not self._copies:
            return None
        roles = tuple(message.role for message in messages)
        if roles not in self._rendered:
            self._rendered[roles] = self._render_roles(roles)
        rendered = self._rendered[roles]
        contents = [message.content for message in messages]
        trimmed = [content.strip() for content in contents]
        return (text.fill(contents, trimmed) for text in rendered) if rendered else None

    def _render_roles(self, roles: tuple[str, ...]) -> list[_RenderedTemplate]:
        """Render placeholders with these roles; empty if that fails or damages a placeholder."""
        messages = tuple(
            Message(role, f"{EDGE}{chr(SENTINEL_START + number)}{EDGE}")
            for number, role in enumerate(roles)
        )
        try:
            texts = self._render(messages)
        except (
            DataError
        ):  # the template rejects these roles: each row gets that error with its place
            return []
        rendered = [_parse(text) for text in texts]
        return [] if None in rendered else [text for text in rendered if text is not None]


def _parse(text: str) -> _RenderedTemplate | None:
    """Split a rendered text at its placeholders; None if the template has cut into one of them."""
    parts = PLACEHOLDERS.split(text)
    literals, before, chars, after = parts[::4], parts[1::4], parts[2::4], parts[3::4]
    if before != after or any(EDGE in literal for literal in literals):
        return None
    placeholders = [
        (ord(char) - SENTINEL_START, not edge) for char, edge in zip(chars, before, strict=True)
    ]
    return _RenderedTemplate(literals, placeholders)
