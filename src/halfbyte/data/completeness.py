"""Owns the check that a template writes all that a row holds: what it drops would be learnt without."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from halfbyte.data.answers import THINK_OPENER, Sample
from halfbyte.data.chat_template import SYSTEM_REMEDY, ChatTemplate
from halfbyte.data.conversation import OPENING_ROLES, Message
from halfbyte.data.fields import RowError

OTHER_TEXT = "halfbyte"
THINK_MARK = re.compile(r"</?think(?:ing)?>|\[/?THINK\]")
# What to do about something that a template drops.
REMEDIES = {
    "system message": SYSTEM_REMEDY,
    "developer message": ". Call the role system if that is what it means",
    "thoughts": ". Write them into content, or set data.chat_template to one that writes thoughts",
    "name": ". Remove it, or write it into content",
}
# What a turn is without a field, or with another content.
WITHOUT: dict[str, Callable[[Message, int], Message]] = {
    "thoughts": lambda message, _: replace(message, reasoning=None),
    "tool calls": lambda message, call: replace(
        message, tool_calls=message.tool_calls[:call] + message.tool_calls[call + 1 :]
    ),
    "name": lambda message, _: replace(message, name=None),
    "content": lambda message, _: replace(message, content=OTHER_TEXT),
}
USE_ANOTHER = ". Set data.chat_template to one that writes them"


class Completeness:
    """Checks rows against one template, and remembers by the roles and fields of a row what it writes.

    Args:
        template: the template.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._drops: dict[tuple[str, ...], bool] = {}
        self._written: set[tuple[str, bool] | None] = set()  # first messages that texts depend on

    def check(
        self, messages: tuple[Message, ...], tools: str, samples: list[Sample], place: str
    ) -> bool:
        """Check that every field of a row is in the texts made of it.

        Args:
            messages: the conversation, escaped.
            tools: JSON text of its tools, escaped.
            samples: the texts.
            place: where the row comes from.

        Returns:
            whether the template altered a text, such as by trimming its ends.

        Raises:
            RowError: the template drops something.
        """
        texts = [sample.text for sample in samples]
        changed = False
        for number, message in enumerate(messages):
            content = message.content
            if content not in texts[0] and not any(content in text for text in texts[1:]):
                changed = True
                self._check_content(messages, tools, number, texts, place)
            elif content and (message.tool_calls or message.role in OPENING_ROLES):
                self._check_elsewhere(messages[: number + 2], tools, number, place)
            if message.is_plain:
                continue
            reasoning, turns = message.reasoning, messages[: number + 1]
            if reasoning and message.learnt:
                opened = self._opens_thoughts(turns[:-1], tools, place)
                if not (opened and _is_in(reasoning, texts)):
                    self._check_field(turns, tools, number, "thoughts", place)
            for call in range(len(message.tool_calls)):
                self._check_field(messages, tools, number, "tool calls", place, call)
            if message.name and not _repeats_call(messages[:number], message):
                self._check_field(messages, tools, number, "name", place)
        if tools:
            self._check_field(messages, tools, 0, "tools", place)
        return changed

    def _check_content(
        self,
        messages: tuple[Message, ...],
        tools: str,
        number: int,
        texts: list[str],
        place: str,
    ) -> None:
        """Check a content that no text holds as it is: its pieces, or that the template depends on it."""
        message = messages[number]
        pieces = THINK_MARK.split(message.content)
        # The thoughts of an answer that is not learnt may be left out.
        needed = pieces if message.learnt or message.role != "assistant" else pieces[-1:]
        if all(_is_in(piece, texts) for piece in needed):
            return
        if len(pieces) > 1 and _is_in(pieces[-1], texts):
            raise _dropped(place, "thoughts")
        other = (*messages[:number], replace(message, content=OTHER_TEXT), *messages[number + 1 :])
        if self._same(other, tools, messages, tools, place):
            raise _dropped(place, f"{message.role} message")

    def _check_elsewhere(
        self, messages: tuple[Message, ...], tools: str, number: int, place: str
    ) -> None:
        """Check a content whose text may stand elsewhere, as that of a system message in the question."""
        message = messages[number]
        first = None if message.tool_calls or number else (message.role, bool(tools))
        if first not in self._written:
            self._check_field(messages, tools, number, "content", place)
            if first is not None:
                self._written.add(first)

    def _opens_thoughts(self, messages: tuple[Message, ...], tools: str, place: str) -> bool:
        """Return whether the prompt opens thoughts, which then do not come from the template's answer."""
        key = ("opens", *_signature(messages, tools))
        if key not in self._drops:
            prompt = self.template.prompt(messages, place, tools)
            self._drops[key] = THINK_OPENER.search(prompt) is not None
        return self._drops[key]

    def _check_field(
        self,
        messages: tuple[Message, ...],
        tools: str,
        number: int,
        kind: str,
        place: str,
        call: int = 0,
    ) -> None:
        """Check that the template's text depends on a field; of tool calls, on that of this number.

        Raises:
            RowError: it does not.
        """
        key = (kind, str(number), str(call), *_signature(messages, tools))
        if key not in self._drops:
            other, other_tools = messages, tools
            if kind == "tools":
                other_tools = ""
            else:
                other = (
                    *messages[:number],
                    WITHOUT[kind](messages[number], call),
                    *messages[number + 1 :],
                )
            self._drops[key] = self._same(other, other_tools, messages, tools, place)
        if self._drops[key]:
            raise _dropped(place, f"{messages[number].role} message" if kind == "content" else kind)

    def _same(
        self,
        messages: tuple[Message, ...],
        tools: str,
        originals: tuple[Message, ...],
        original_tools: str,
        place: str,
    ) -> bool:
        """Return whether the template writes the same of two conversations."""
        try:
            text = self.template.render(messages, place, tools)
        except RowError:  # the template wants what was taken away
            return False
        return text == self.template.render(originals, place, original_tools)


def _signature(messages: tuple[Message, ...], tools: str) -> Iterator[str]:
    """Yield what a template may decide by: roles, and which fields there are."""
    yield str(bool(tools))
    for message in messages:
        fields = (message.content, message.reasoning, message.name)
        flags = "".join(str(int(bool(field))) for field in fields)
        yield f"{message.role}{flags}{len(message.tool_calls)}"


def _is_in(piece: str, texts: list[str]) -> bool:
    """Return whether a piece of content is in one of the texts, as it is or within JSON."""
    piece = piece.strip()
    in_json = json.dumps(piece, ensure_ascii=False)[1:-1]
    return any(piece in text or in_json in text for text in texts)


def _repeats_call(earlier: tuple[Message, ...], message: Message) -> bool:
    """Return whether a tool's name is that of a call before it, so that nothing is lost without it."""
    return message.role == "tool" and any(
        call.name == message.name for turn in earlier for call in turn.tool_calls
    )


def _dropped(place: str, what: str) -> RowError:
    reason = f"the chat template drops the {what}"
    remedy = REMEDIES.get(what, USE_ANOTHER)
    return RowError(place, reason, f"{reason}, which the model would then never see{remedy}")
