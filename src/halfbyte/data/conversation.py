"""Owns a row once it is read: its conversation with tools and thoughts, or its raw text."""

from __future__ import annotations

import functools
import json
from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any

OPENING_ROLES = ("system", "developer")  # roles of a message before the first turn


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool that an assistant turn makes.

    Attributes:
        name: the tool's name.
        arguments: its arguments, as the JSON text of an object.
        id: the call's id, which the tool's turn repeats.
    """

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: system, developer, user, assistant or tool.
        content: its text; "" only for an assistant that calls tools and for a tool without output.
        reasoning: an assistant's thoughts before its content, if they are a field of their own.
        tool_calls: the tools that an assistant calls.
        tool_call_id: id of the call that a tool's turn answers.
        name: name of who speaks, or of the tool.
        learnt: whether an assistant's turn is trained on.
    """

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    learnt: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether role and content are all that there is for a chat template."""
        return not (self.reasoning or self.tool_calls or self.tool_call_id or self.name)

    @property
    def text(self) -> str:
        """All text of the turn."""
        calls = [f"{call.name} {call.arguments}" for call in self.tool_calls]
        return "\n".join(filter(None, [self.name, self.reasoning, self.content, *calls]))

    def as_json(self) -> dict[str, Any]:
        """Return the turn without fields that have their default value."""
        record: dict[str, Any] = {"role": self.role, "content": self.content}
        for key in ("reasoning", "tool_call_id", "name"):
            if getattr(self, key) is not None:
                record[key] = getattr(self, key)
        if self.tool_calls:
            record["tool_calls"] = [
                [call.name, call.arguments, call.id] for call in self.tool_calls
            ]
        if not self.learnt:
            record["learnt"] = False
        return record


@dataclass(frozen=True, slots=True)
class Row:
    """Either a conversation that ends with the assistant, or raw text.

    Attributes:
        place: where the row comes from, such as ``file:line``.
        messages: the conversation, empty for raw text.
        text: the raw text, None for a conversation.
        tools: JSON text of the list of tools that the assistant may call, "" for none.
        weight: factor of the row's loss.
    """

    place: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: str = ""
    weight: float = 1.0

    @property
    def prompt(self) -> str:
        """Text that identifies the row's question: all that the model sees before the last answer.

        Of raw text that is the text itself.
        """
        if self.text is not None:
            return self.text
        texts = [message.text for message in self.messages[:-1]]
        return "\n".join([self.tools, *texts] if self.tools else texts)

    def prompt_beside(self, systems: Container[str]) -> str:
        """Return the prompt without a system message that is one of ``systems``.

        The message of a config stands in every row that has none of its own: it tells no rows apart.
        """
        first = self.messages[0] if self.messages else None
        if first is not None and first.role == "system" and first.content in systems:
            return replace(self, messages=self.messages[1:]).prompt
        return self.prompt

    @property
    def answer(self) -> str:
        """Content of the last assistant turn; empty for raw text."""
        return self.messages[-1].content if self.messages else ""

    def as_json(self) -> dict[str, Any]:
        """Return the row as JSON for a file in the run folder; ``row_from_json`` reads it back."""
        record: dict[str, Any] = {"place": self.place}
        if self.tools:
            record["tools"] = self.tools
        if self.weight != 1:
            record["weight"] = self.weight
        if self.text is not None:
            return {**record, "text": self.text}
        return {**record, "messages": [message.as_json() for message in self.messages]}


def row_from_json(record: dict[str, Any]) -> Row:
    """Read back a row that ``Row.as_json`` wrote."""
    messages = tuple(message_from_json(message) for message in record.get("messages", ()))
    return Row(
        record["place"],
        messages,
        record.get("text"),
        record.get("tools", ""),
        record.get("weight", 1.0),
    )


def message_from_json(record: dict[str, Any]) -> Message:
    """Read back a turn that ``Message.as_json`` wrote."""
    calls = tuple(ToolCall(*call) for call in record.get("tool_calls", ()))
    return Message(**{**record, "tool_calls": calls})


def system_in_question(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return messages with the system message at the beginning of the first question."""
    if not messages or messages[0].role not in OPENING_ROLES:
        return messages
    system, *turns = messages
    if not turns or turns[0].role != "user":
        return messages
    first = replace(turns[0], content=f"{system.content}\n\n{turns[0].content}")
    return (first, *turns[1:])


@functools.lru_cache(maxsize=1024)
def tools_of(tools: str) -> list[dict[str, Any]]:
    """Return the tools of a row as chat templates take them; callers must not change them."""
    return list(json.loads(tools))
