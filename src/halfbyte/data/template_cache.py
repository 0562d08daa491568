"""Owns texts of rows from templates that only copy: rendered once for all rows with the same roles."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from halfbyte.data.rows import Message
from halfbyte.data.special_tokens import SENTINEL_START
from halfbyte.data.template_analysis import only_copies
from halfbyte.errors import DataError

# A stand-in for a content, between two spaces by which it is seen whether its ends were trimmed.
EDGE = "\u2003"
MARKS = re.compile(f"({EDGE}?)([\U000f0000-\U000ffffd])({EDGE}?)")


@dataclass(frozen=True)
class _Shape:
    """A rendered text with places for contents: literal, content, literal, …, literal.

    ``places`` has the number of the message whose content comes next, and whether it is trimmed.
    """

    literals: list[str]
    places: list[tuple[int, bool]]

    def text(self, contents: list[str], trimmed: list[str]) -> str:
        parts = [""] * (len(self.literals) + len(self.places))
        parts[::2] = self.literals
        parts[1::2] = [(trimmed if trim else contents)[number] for number, trim in self.places]
        return "".join(parts)


class Shapes:
    """What one chat template makes of conversations, by their roles.

    Args:
        template: Jinja text, or None.
        render: runs the template: the text of a conversation, then of the prompt of each answer.
    """

    def __init__(
        self, template: str | None, render: Callable[[tuple[Message, ...]], list[str]]
    ) -> None:
        self._render = render
        self._copies = isinstance(template, str) and (
            only_copies(template) and EDGE not in template and not MARKS.search(template)
        )
        self._known: dict[tuple[str, ...], list[_Shape]] = {}

    def texts(self, messages: tuple[Message, ...]) -> Iterator[str] | None:
        """What ``render`` would give; None where only running the template can tell."""
        if not self._copies:
            return None
        roles = tuple(message.role for message in messages)
        if roles not in self._known:
            self._known[roles] = self._learn(roles)
        shapes = self._known[roles]
        contents = [message.content for message in messages]
        trimmed = [content.strip() for content in contents]
        return (shape.text(contents, trimmed) for shape in shapes) if shapes else None

    def _learn(self, roles: tuple[str, ...]) -> list[_Shape]:
        marked = tuple(
            Message(role, f"{EDGE}{chr(SENTINEL_START + number)}{EDGE}")
            for number, role in enumerate(roles)
        )
        try:
            texts = self._render(marked)
        except DataError:  # the template refuses such roles: each row is told so with its place
            return []
        shapes = [_shape_of(text) for text in texts]
        return [] if None in shapes else [shape for shape in shapes if shape is not None]


def _shape_of(text: str) -> _Shape | None:
    """The places of stand-ins in a rendered text; None if the template has cut into one."""
    found = MARKS.split(text)
    literals, before, chars, after = found[::4], found[1::4], found[2::4], found[3::4]
    if before != after or any(EDGE in literal for literal in literals):
        return None
    places = [
        (ord(char) - SENTINEL_START, not edge) for char, edge in zip(chars, before, strict=True)
    ]
    return _Shape(literals, places)
