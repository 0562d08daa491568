"""Owns the turns of a conversation as data sets write them: their roles, parts, thoughts and weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from halfbyte.bounds import shorten
from halfbyte.data.conversation import OPENING_ROLES, Message
from halfbyte.data.fields import (
    NO_MEDIA,
    REFUSED_IN_TURN,
    Account,
    Fields,
    RowError,
    is_blank,
    is_nothing_word,
    is_unicode,
    json_value,
    quoted,
    valid_text,
)
from halfbyte.data.tool_calls import parse_calls
from halfbyte.data.turn_order import check_order, repair

# Role names of OpenAI, ShareGPT, LLaMA-Factory and ms-swift to ours.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
PLAIN_ROLES = ("system", "user", "human", "assistant", "gpt")
CALL_ROLES = ("function_call", "tool_call")  # their content is a call, or a list of calls
PART_KINDS = ("text", "thinking", "reasoning", "tool_call")
LEARNT_KEYS = ("weight", "train", "loss", "loss_weight", "trainable")
NO, YES = (0, "0", "false"), (1, "1", "true")


def parse_turns(
    place: str, turns: Sequence[tuple[str, Any]], account: Account
) -> tuple[Message, ...]:
    """Parse the turns of a conversation.

    Args:
        place: where the row comes from.
        turns: each turn with the name of the column that holds it.
        account: names the repairs to apply, and counts them and the keys that are not used.

    Raises:
        RowError: a turn is malformed, or they are in the wrong order.
    """
    messages: list[Message] = []
    counts: Counter[str] = Counter()
    after_call = False
    for column, written in turns:
        number, counts[column] = counts[column], counts[column] + 1
        plain = _plain_message(written)
        if plain is not None:
            messages.append(plain)
            after_call = False
            continue
        turn = _Turn.of(place, f"{column}[{number}]", written)
        message = turn.message(account)
        if message is None:
            continue
        if turn.is_call and after_call:  # parallel calls in turns of their own
            message = _joined(messages.pop(), message, turn)
        messages.append(message)
        after_call = turn.is_call
    messages = repair(messages, account)
    check_order(place, " and ".join(counts), messages)
    return tuple(messages)


def _joined(first: Message, second: Message, turn: _Turn) -> Message:
    """Return one message of two turns that each hold a call.

    Raises:
        RowError: one is to be learnt, and the other not.
    """
    if first.learnt != second.learnt:
        raise RowError(
            turn.place,
            "parallel calls of different weights",
            f"{turn.where} and the call before it have different weights; give both the same",
        )
    thoughts = [message.reasoning for message in (first, second) if message.reasoning]
    return replace(
        first,
        tool_calls=(*first.tool_calls, *second.tool_calls),
        reasoning="\n\n".join(thoughts) or None,
    )


def _plain_message(turn: Any) -> Message | None:
    """Return the message of a turn with a role and valid text and no more, as most are; else None."""
    if not isinstance(turn, dict) or len(turn) != 2:
        return None
    if "role" in turn:
        role, content = turn["role"], turn.get("content")
    else:
        role, content = turn.get("from"), turn.get("value")
    if role not in PLAIN_ROLES or not isinstance(content, str) or not content.strip():
        return None
    role = ROLES[role]
    may_be_none = role in OPENING_ROLES and (is_blank(content) or is_nothing_word(content))
    if may_be_none or not is_unicode(content):
        return None
    return Message(role, content)


@dataclass(frozen=True)
class _Turn:
    """A turn as it was written.

    Attributes:
        place: where the row comes from.
        where: the turn's column and number, for errors.
        values: its keys and values.
        role_key: key of its role.
        content_key: key of its content.
    """

    place: str
    where: str
    values: dict[str, Any]
    role_key: str
    content_key: str

    @classmethod
    def of(cls, place: str, where: str, values: Any) -> _Turn:
        """Read the role of a turn.

        Raises:
            RowError: it is no object, or its role is missing or unknown.
        """
        if not isinstance(values, dict):
            detail = f"{where} is {quoted(values)}; an object with role and content is needed"
            raise RowError(place, "a turn is no object", detail)
        role_key = "from" if "from" in values and "role" not in values else "role"
        content_key = "value" if "value" in values and "content" not in values else "content"
        turn = cls(place, where, values, role_key, content_key)
        if turn.name not in ROLES:
            raise turn.role_error()
        return turn

    @property
    def name(self) -> str:
        """The name of the role as it was written, "" if that is no text."""
        name = self.values.get(self.role_key)
        return name if isinstance(name, str) else ""

    @property
    def role(self) -> str:
        """The role among ours."""
        return ROLES[self.name]

    @property
    def is_call(self) -> bool:
        """Whether the role says that the content is a tool call."""
        return self.name in CALL_ROLES

    @property
    def content(self) -> Any:
        """What stands for its content, of any type."""
        return self.values.get(self.content_key)

    def role_error(self) -> RowError:
        """Return what is wrong with the role: it is missing or unknown."""
        if self.role_key not in self.values:
            keys = ", ".join(map(str, self.values))
            detail = f"{self.where} has {shorten(keys, 80)}; role and content are needed"
            return RowError(self.place, "a turn without role", detail)
        name = quoted(self.values[self.role_key])
        detail = f"{self.where}.{self.role_key} is {name}; allowed: {', '.join(ROLES)}"
        return RowError(self.place, "unknown role", detail)

    def message(self, account: Account) -> Message | None:
        """Return the turn as a message, or None if it is a blank system message.

        Raises:
            RowError: it is malformed, or has a key that would change what is learnt.
        """
        fields = Fields(self.place, self.where + ".", self.values)
        for key in (self.role_key, self.content_key):
            fields.take(key)
        if self.role in OPENING_ROLES and self._says_nothing(account):
            fields.finish(REFUSED_IN_TURN, account)
            return None
        message = self._message(fields, account)
        fields.finish(REFUSED_IN_TURN, account)
        return message

    def _says_nothing(self, account: Account) -> bool:
        """Whether a system message is none, however that is written."""
        content = self.content
        if isinstance(content, list):
            return all(map(_is_blank_part, content))
        return account.says_nothing(content)

    def _message(self, fields: Fields, account: Account) -> Message:
        """Return the message of a turn, whose other fields are still to be taken."""
        content, content_place = self.content, f"{self.where}.{self.content_key}"
        reasoning = fields.take("reasoning_content", "thinking", "reasoning")
        calls = fields.take("tool_calls", "function_call")
        if self.is_call:
            if calls is not None:
                raise fields.error("tool calls twice", "is a tool call and has others beside it")
            calls, content = content, None
        tool_calls = parse_calls(self.place, f"{self.where}.tool_calls", calls, account)
        if isinstance(content, list):
            parts = _Parts.of(self.place, content_place, content, account)
            content, thoughts = "".join(parts.texts), "\n".join(parts.thoughts) or None
            if parts.calls and tool_calls:
                raise fields.error(
                    "tool calls twice", "has tool calls in its content and beside it"
                )
            tool_calls = tool_calls or parse_calls(
                self.place, content_place, parts.calls or None, account
            )
            if reasoning and thoughts and reasoning != thoughts:
                raise fields.error("thoughts twice", "has different thoughts; keep one of them")
            reasoning = reasoning or thoughts
        if reasoning is not None:
            reasoning = valid_text(self.place, f"{self.where}.reasoning_content", reasoning)
        if not is_blank(content) or not (tool_calls or self.role == "tool"):
            content = valid_text(self.place, content_place, content)
        else:
            content = ""
        if self.role != "assistant" and (reasoning or tool_calls):
            raise fields.error(
                f"a {self.role} turn with thoughts or calls",
                f"is a {self.role} turn with thoughts or tool calls; only an assistant has them",
            )
        if reasoning and "</think>" in content:
            raise fields.error(
                "thoughts twice", "has thoughts in its content and beside it; keep one of them"
            )
        name, call_id = _optional_text(fields, "name"), _optional_text(fields, "tool_call_id")
        learnt = _is_learnt(fields, self.role)
        return Message(self.role, content, reasoning, tool_calls, call_id, name, learnt)


def _is_blank_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return is_blank(part)
    return all(is_blank(value) for key, value in part.items() if key != "type")


def _optional_text(fields: Fields, key: str) -> str | None:
    value = fields.take(key)
    return None if value is None else valid_text(fields.place, f"{fields.where}{key}", value)


def _is_learnt(fields: Fields, role: str) -> bool:
    """Return whether a turn is learnt, from its ``weight`` or another of ``LEARNT_KEYS``.

    Raises:
        RowError: a value is neither 0 nor 1, they differ, or it asks to learn what is no answer.
    """
    said = {key: fields.take(key) for key in LEARNT_KEYS}
    said = {key: value for key, value in said.items() if value is not None}
    for key, value in said.items():
        if value not in (*NO, *YES):
            raise fields.error(
                f"{key} of a turn", f"has the {key} {quoted(value)}; allowed: 0 or 1"
            )
    answers = {value in YES for value in said.values()}
    if len(answers) > 1:
        raise fields.error("two values for one field", f"has different {' and '.join(said)}")
    if True in answers and role != "assistant":
        raise fields.error(
            f"a {role} turn to be learnt",
            f"has the {next(iter(said))} 1, but is a {role} turn; an assistant's are learnt, or all"
            " text with data.loss_on=all",
        )
    return False not in answers


@dataclass
class _Parts:
    """What the parts of a content hold."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, place: str, where: str, parts: list[Any], account: Account) -> _Parts:
        """Read a list of parts.

        Raises:
            RowError: a part is neither text nor thoughts nor a tool call.
        """
        found = cls()
        for number, part in enumerate(parts):
            if isinstance(part, str):
                found.texts.append(part)
                continue
            kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
            if kind not in PART_KINDS:
                raise RowError(
                    place,
                    f"a content part of type {shorten(str(kind), 30)}",
                    f"{where}[{number}] is {quoted(part)}; only parts of type text are allowed: {NO_MEDIA}",
                )
            fields = Fields(place, f"{where}[{number}].", part)
            fields.take("type")
            value = fields.take(*dict.fromkeys((kind, "text", "value")))
            fields.finish(REFUSED_IN_TURN, account)
            if kind == "tool_call":
                calls = json_value(place, f"{where}[{number}]", value)
                found.calls += calls if isinstance(calls, list) else [calls]
                continue
            value = part.get(kind, part.get("text", part.get("value")))
            if not isinstance(value, str):
                detail = f"{where}[{number}] is {quoted(part)}; its text is missing"
                raise RowError(place, "a content part without text", detail)
            (found.texts if kind == "text" else found.thoughts).append(value)
        return found
