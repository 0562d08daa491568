"""Owns the texts of copying chat templates: one rendering serves all rows with the same roles."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from halfbyte.data.answers import Sample, Span
from halfbyte.data.conversation import Message
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
        answers: for each answer, where it starts and ends: a part's number, with literals and contents
            counted together, and the characters from its start.
    """

    literals: list[str]
    placeholders: list[tuple[int, bool]]
    answers: list[tuple[tuple[int, int], tuple[int, int]]]

    def fill(self, messages: tuple[Message, ...]) -> Sample:
        """Return the text with each message's content put in, and its answers."""
        contents = [message.content for message in messages]
        parts = [""] * (len(self.literals) + len(self.placeholders))
        parts[::2] = self.literals
        parts[1::2] = [
            contents[number].strip() if trim else contents[number]
            for number, trim in self.placeholders
        ]
        starts = list(accumulate(map(len, parts), initial=0))
        learnt = [message.learnt for message in messages if message.role == "assistant"]
        spans = [
            Span(starts[first] + skipped, starts[last] + taken, is_learnt)
            for ((first, skipped), (last, taken)), is_learnt in zip(
                self.answers, learnt, strict=True
            )
        ]
        return Sample("".join(parts), spans)


class TemplateCache:
    """The texts that one chat template writes, rendered once for each sequence of roles.

    Args:
        template: Jinja text, or None.
        render: makes samples of a conversation whose answers are all to be learnt.
    """

    def __init__(
        self, template: str | None, render: Callable[[tuple[Message, ...]], list[Sample]]
    ) -> None:
        self._render = render
        self._copies = isinstance(template, str) and (
            only_copies(template) and EDGE not in template and not PLACEHOLDERS.search(template)
        )
        self._rendered: dict[tuple[str, ...], _RenderedTemplate | None] = {}

    def sample(self, messages: tuple[Message, ...]) -> Sample | None:
        """Return what ``render`` would, or None if the template must be run for these messages.

        The messages are plain: they have no field but role, content and whether they are learnt.
        """
        if not self._copies:
            return None
        roles = tuple([message.role for message in messages])
        if roles not in self._rendered:
            self._rendered[roles] = self._render_roles(roles)
        rendered = self._rendered[roles]
        return rendered.fill(messages) if rendered else None

    def _render_roles(self, roles: tuple[str, ...]) -> _RenderedTemplate | None:
        """Render placeholders with these roles; None if that fails, damages one, or is no single text."""
        messages = tuple(
            Message(role, f"{EDGE}{chr(SENTINEL_START + number)}{EDGE}")
            for number, role in enumerate(roles)
        )
        try:
            samples = self._render(messages)
        except (
            DataError
        ):  # the template rejects these roles: each row gets that error with its place
            return None
        if len(samples) != 1 or len(samples[0].spans) != roles.count("assistant"):
            return None
        return _parse(samples[0])


def _parse(sample: Sample) -> _RenderedTemplate | None:
    """Split a rendered text at its placeholders; None if the template has cut into one of them."""
    literals, placeholders = [], []
    boundaries: dict[int, tuple[int, int]] = {}  # offset in the text to a part and an offset in it
    at = 0
    matches = list(PLACEHOLDERS.finditer(sample.text))
    for number, match in enumerate([*matches, None]):
        end = match.start() if match else len(sample.text)
        literals.append(sample.text[at:end])
        boundaries |= {offset: (2 * number, offset - at) for offset in range(at, end + 1)}
        if match is None:
            break
        before, char, after = match.groups()
        if before != after:
            return None
        placeholders.append((ord(char) - SENTINEL_START, not before))
        at = match.end()
    if any(EDGE in literal for literal in literals):
        return None
    offsets = [(span.start, span.end) for span in sample.spans]
    if not all(start in boundaries and end in boundaries for start, end in offsets):
        return None
    answers = [(boundaries[start], boundaries[end]) for start, end in offsets]
    return _RenderedTemplate(literals, placeholders, answers)
