"""Owns the row formats: five are read, into a conversation or a text, or an error names the bad row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from halfbyte.data.sources import Table
from halfbyte.errors import DataError

SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: system, user or assistant.
        content: its text.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """Either a conversation that ends with the assistant, or raw text.

    Attributes:
        place: where the row comes from, such as ``file:line``.
        messages: the conversation, empty for raw text.
        text: the raw text, None for a conversation.
    """

    place: str
    messages: tuple[Message, ...] = ()
    text: str | None = None

    @property
    def prompt(self) -> str:
        """Text that identifies the row's question: every turn but the last answer, or the raw text.

        System messages are left out.
        """
        if self.text is not None:
            return self.text
        return "\n".join(m.content for m in self.messages[:-1] if m.role != "system")

    @property
    def answer(self) -> str:
        """Content of the last assistant turn; empty for raw text."""
        return self.messages[-1].content if self.messages else ""

    def as_json(self) -> dict[str, Any]:
        """Return the row as JSON for a file in the run folder; ``row_from_json`` reads it back."""
        record: dict[str, Any] = {"place": self.place}
        if self.text is not None:
            return {**record, "text": self.text}
        return {**record, "messages": [asdict(message) for message in self.messages]}


def row_from_json(record: dict[str, Any]) -> Row:
    """Read back a row that ``Row.as_json`` wrote."""
    messages = tuple(Message(**message) for message in record.get("messages", ()))
    return Row(record["place"], messages, record.get("text"))


# Columns that each format needs, and those that it may have besides.
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ()),
    "sharegpt": (("conversations",), ("system",)),
    "prompt_completion": (("prompt", "completion"), ("system",)),
    "alpaca": (("instruction", "output"), ("input", "system")),
    "text": (("text",), ()),
}

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def detect_format(table: Table, columns: dict[str, str]) -> str:
    """Return the one format whose columns the table has, after renaming.

    Raises:
        DataError: no format fits, or several do.
    """
    present = set(_renamed_columns(table, columns))
    fitting = [name for name, (needed, _) in FORMATS.items() if set(needed) <= present]
    if len(fitting) == 1:
        return fitting[0]
    table_columns = f"{table.name}: found the columns {', '.join(table.columns)}"
    formats = "; ".join(f"{name}: {', '.join(needed)}" for name, (needed, _) in FORMATS.items())
    if not fitting:
        raise DataError(
            f"{table_columns}, which fit no known format. Allowed: {formats}. Name yours with"
            " data.columns, such as {prompt: question, completion: answer}"
        )
    raise DataError(
        f"{table_columns}, which fit several formats: {', '.join(fitting)}. Set data.format to one"
    )


def parse_rows(
    table: Table, format_name: str, columns: dict[str, str], system: str | None
) -> list[Row]:
    """Parse every raw row of a table.

    Args:
        table: the rows as stored.
        format_name: a key of ``FORMATS``, or ``auto``.
        columns: names of the format's columns to names of the table's columns.
        system: system message for conversations that have none.

    Raises:
        DataError: a column is missing, or rows are malformed; up to ten are named at once.
    """
    if format_name == "auto":
        format_name = detect_format(table, columns)
    needed, optional = FORMATS[format_name]
    _check_columns(table, format_name, columns, needed, optional)
    parse = PARSERS[format_name]
    rows, errors = [], []
    for raw in table.rows:
        values = {name: raw.values.get(columns.get(name, name)) for name in (*needed, *optional)}
        try:
            rows.append(_with_system(parse(raw.place, values), system))
        except DataError as error:
            errors.append(str(error))
    if errors:
        more = f"\n… and {len(errors) - 10} more rows" if len(errors) > 10 else ""
        raise DataError("\n".join(errors[:10]) + more)
    return rows


def _renamed_columns(table: Table, columns: dict[str, str]) -> list[str]:
    """Return the table's column names after renaming them to the format's names."""
    present = set(table.columns)
    renamed = [name for name, source in columns.items() if source in present]
    return renamed + [name for name in table.columns if name not in columns.values()]


def _check_columns(
    table: Table,
    format_name: str,
    columns: dict[str, str],
    needed: tuple[str, ...],
    optional: tuple[str, ...],
) -> None:
    """Check that the table has every column that the format needs or ``columns`` names.

    Raises:
        DataError: a column is missing, or ``columns`` names one that the format does not have.
    """
    present = table.columns
    unknown = [name for name in columns if name not in needed + optional]
    if unknown:
        raise DataError(
            f"data.columns: {unknown[0]!r} is not a column of the format {format_name}; allowed: "
            + ", ".join(needed + optional)
        )
    missing = [columns.get(name, name) for name in needed if columns.get(name, name) not in present]
    missing += [
        source for source in columns.values() if source not in present and source not in missing
    ]
    if missing:
        raise DataError(
            f"{table.name}: the column {missing[0]!r} is missing; found: {', '.join(present)}. The format"
            f" {format_name} needs {', '.join(needed)}; name yours with data.columns,"
            " such as {" + f"{needed[0]}: {present[0]}" + "}"
        )


def _with_system(row: Row, system: str | None) -> Row:
    """Return the row with this system message, unless it has one or is raw text."""
    if system is None or row.text is not None or row.messages[0].role == "system":
        return row
    return Row(row.place, (Message("system", system), *row.messages))


def _with_system_column(row: Row, system: Any) -> Row:
    """Return the row with the system message of its ``system`` column, if that holds one."""
    return row if system in (None, "") else _with_system(row, _text_of(row.place, "system", system))


def _text_of(place: str, column: str, value: Any) -> str:
    """Return ``value`` if it is text that can be trained on.

    Raises:
        DataError: it is not a string, is blank, or is not valid Unicode.
    """
    if not isinstance(value, str):
        actual = (
            "null"
            if value is None
            else f"{type(value).__name__} {json.dumps(value, default=str)[:60]}"
        )
        raise DataError(f"{place}: {column} is {actual}; text is expected")
    if not value.strip():
        raise DataError(f"{place}: {column} is blank; text is expected")
    if SURROGATES.search(value):
        raise DataError(
            f"{place}: {column} holds half a surrogate pair, which is not valid Unicode text"
        )
    return value


def _parse_messages(place: str, values: dict[str, Any]) -> Row:
    return _conversation(place, "messages", values["messages"], "role", "content", {})


def _parse_sharegpt(place: str, values: dict[str, Any]) -> Row:
    row = _conversation(
        place, "conversations", values["conversations"], "from", "value", SHAREGPT_ROLES
    )
    return _with_system_column(row, values["system"])


def _conversation(
    place: str, column: str, turns: Any, role_key: str, text_key: str, roles: dict[str, str]
) -> Row:
    """Parse a list of turns.

    Args:
        place: where the row comes from.
        column: name of the column, for errors.
        turns: dicts, or pairs of a column's name and a dict where the turns come from two columns.
        role_key: key of a turn's role.
        text_key: key of a turn's content.
        roles: the format's role names to ours; empty if they are the same.

    Raises:
        DataError: the turns are malformed or in the wrong order.
    """
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{place}: {column} is {str(turns)[:60]!r}; a list of turns is expected")
    messages = []
    counts: dict[str, int] = {}
    for item in turns:
        turn_column, turn = item if isinstance(item, tuple) else (column, item)
        number = counts.get(turn_column, 0)
        counts[turn_column] = number + 1
        location = f"{turn_column}[{number}]"
        if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
            keys = ", ".join(turn) if isinstance(turn, dict) else repr(turn)[:60]
            raise DataError(f"{place}: {location} has {keys}; {role_key} and {text_key} are needed")
        role = (
            roles.get(turn[role_key], turn[role_key]) if isinstance(turn[role_key], str) else None
        )
        if role not in ("system", "user", "assistant"):
            raise DataError(
                f"{place}: {location}.{role_key} is {turn[role_key]!r}; allowed: "
                + ", ".join(roles or ("system", "user", "assistant"))
            )
        messages.append(Message(role, _text_of(place, f"{location}.{text_key}", turn[text_key])))
    _check_order(place, column, messages)
    return Row(place, tuple(messages))


def _check_order(place: str, column: str, messages: list[Message]) -> None:
    """Check that user and assistant alternate and the assistant comes last.

    Raises:
        DataError: they do not.
    """
    turns = messages[1:] if messages[0].role == "system" else messages
    for number, message in enumerate(turns):
        expected = "user" if number % 2 == 0 else "assistant"
        if message.role != expected:
            order = ", ".join(message.role for message in messages)
            raise DataError(
                f"{place}: {column} has the roles {order}; user and assistant must alternate, after"
                " at most one system message"
            )
    if not turns or turns[-1].role != "assistant":
        raise DataError(
            f"{place}: {column} ends without an assistant turn, so there is nothing to learn"
        )


def _parse_prompt_completion(place: str, values: dict[str, Any]) -> Row:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        if not prompt or not completion:
            empty = "completion" if prompt else "prompt"
            raise DataError(f"{place}: {empty} is an empty list; a list of turns is expected")
        turns = [("prompt", turn) for turn in prompt] + [
            ("completion", turn) for turn in completion
        ]
        row = _conversation(place, "prompt and completion", turns, "role", "content", {})
        return _with_system_column(row, values["system"])
    return _pair(place, values, "prompt", "completion")


def _parse_alpaca(place: str, values: dict[str, Any]) -> Row:
    if values["input"] not in (None, ""):
        instruction = _text_of(place, "instruction", values["instruction"])
        extra_input = _text_of(place, "input", values["input"])
        values = {**values, "instruction": f"{instruction}\n\n{extra_input}"}
    return _pair(place, values, "instruction", "output")


def _pair(place: str, values: dict[str, Any], question: str, answer: str) -> Row:
    """Return the conversation of the columns ``question`` and ``answer``."""
    messages = (
        Message("user", _text_of(place, question, values[question])),
        Message("assistant", _text_of(place, answer, values[answer])),
    )
    return _with_system_column(Row(place, messages), values["system"])


def _parse_text(place: str, values: dict[str, Any]) -> Row:
    return Row(place, text=_text_of(place, "text", values["text"]))


PARSERS: dict[str, Callable[[str, dict[str, Any]], Row]] = {
    "messages": _parse_messages,
    "sharegpt": _parse_sharegpt,
    "prompt_completion": _parse_prompt_completion,
    "alpaca": _parse_alpaca,
    "text": _parse_text,
}
