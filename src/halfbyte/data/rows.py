"""Owns what a row means: five shapes in, one conversation or one text out, or an error that names it."""

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
    """One turn; ``role`` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """Either a conversation that ends with the assistant, or raw ``text``."""

    place: str
    messages: tuple[Message, ...] = ()
    text: str | None = None

    @property
    def prompt(self) -> str:
        """What identifies the row's question: every turn but the last answer, or the raw text."""
        if self.text is not None:
            return self.text
        return "\n".join(m.content for m in self.messages[:-1] if m.role != "system")

    @property
    def answer(self) -> str:
        """The last assistant turn, or nothing for raw text."""
        return self.messages[-1].content if self.messages else ""

    def as_json(self) -> dict[str, Any]:
        """The row for a file in the run folder; ``row_from_json`` reads it back."""
        record: dict[str, Any] = {"place": self.place}
        if self.text is not None:
            return {**record, "text": self.text}
        return {**record, "messages": [asdict(message) for message in self.messages]}


def row_from_json(record: dict[str, Any]) -> Row:
    """Read back a row that ``Row.as_json`` wrote."""
    messages = tuple(Message(**message) for message in record.get("messages", ()))
    return Row(record["place"], messages, record.get("text"))


# Columns that a format must have; the ones in brackets may be there besides.
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
    """The one format whose columns the table has, after renaming.

    Raises:
        DataError: none fits, or several do.
    """
    present = set(_renamed_columns(table, columns))
    fitting = [name for name, (needed, _) in FORMATS.items() if set(needed) <= present]
    if len(fitting) == 1:
        return fitting[0]
    found = f"{table.name}: found the columns {', '.join(table.columns)}"
    shapes = "; ".join(f"{name}: {', '.join(needed)}" for name, (needed, _) in FORMATS.items())
    if not fitting:
        raise DataError(
            f"{found}, which are no format that halfbyte knows. Allowed: {shapes}. Name yours with"
            " data.columns, such as {prompt: question, completion: answer}"
        )
    raise DataError(
        f"{found}, which fit several formats: {', '.join(fitting)}. Set data.format to one"
    )


def parse_rows(
    table: Table, format_name: str, columns: dict[str, str], system: str | None
) -> list[Row]:
    """Turn every raw row into a Row.

    Args:
        table: the rows as stored.
        format_name: a key of ``FORMATS``, or ``auto``.
        columns: the format's column names to the table's own.
        system: system message for conversations that bring none.

    Raises:
        DataError: a column is missing, or rows are malformed; up to ten are named at once.
    """
    if format_name == "auto":
        format_name = detect_format(table, columns)
    needed, optional = FORMATS[format_name]
    _check_columns(table, format_name, columns, needed, optional)
    parse = PARSERS[format_name]
    rows, faults = [], []
    for raw in table.rows:
        values = {name: raw.values.get(columns.get(name, name)) for name in (*needed, *optional)}
        try:
            rows.append(_with_system(parse(raw.place, values), system))
        except DataError as error:
            faults.append(str(error))
    if faults:
        more = f"\n… and {len(faults) - 10} more rows" if len(faults) > 10 else ""
        raise DataError("\n".join(faults[:10]) + more)
    return rows


def _renamed_columns(table: Table, columns: dict[str, str]) -> list[str]:
    own = set(table.columns)
    renamed = [name for name, theirs in columns.items() if theirs in own]
    return renamed + [name for name in table.columns if name not in columns.values()]


def _check_columns(
    table: Table,
    format_name: str,
    columns: dict[str, str],
    needed: tuple[str, ...],
    optional: tuple[str, ...],
) -> None:
    own = table.columns
    unknown = [name for name in columns if name not in needed + optional]
    if unknown:
        raise DataError(
            f"data.columns: {unknown[0]!r} is no column of the format {format_name}; allowed: "
            + ", ".join(needed + optional)
        )
    missing = [columns.get(name, name) for name in needed if columns.get(name, name) not in own]
    missing += [
        theirs for theirs in columns.values() if theirs not in own and theirs not in missing
    ]
    if missing:
        raise DataError(
            f"{table.name}: the column {missing[0]!r} is missing; found: {', '.join(own)}. The format"
            f" {format_name} needs {', '.join(needed)}; name yours with data.columns,"
            " such as {" + f"{needed[0]}: {own[0]}" + "}"
        )


def _with_system(row: Row, system: str | None) -> Row:
    if system is None or row.text is not None or row.messages[0].role == "system":
        return row
    return Row(row.place, (Message("system", system), *row.messages))


def _with_own_system(row: Row, system: Any) -> Row:
    """The row with the system message of its own column, if that holds one."""
    return row if system in (None, "") else _with_system(row, _text_of(row.place, "system", system))


def _text_of(place: str, column: str, value: Any) -> str:
    if not isinstance(value, str):
        came = (
            "null"
            if value is None
            else f"{type(value).__name__} {json.dumps(value, default=str)[:60]}"
        )
        raise DataError(f"{place}: {column} is {came}; text is expected")
    if not value.strip():
        raise DataError(f"{place}: {column} is blank; text is expected")
    if SURROGATES.search(value):
        raise DataError(f"{place}: {column} holds half a surrogate pair, which is no Unicode text")
    return value


def _parse_messages(place: str, values: dict[str, Any]) -> Row:
    return _conversation(place, "messages", values["messages"], "role", "content", {})


def _parse_sharegpt(place: str, values: dict[str, Any]) -> Row:
    row = _conversation(
        place, "conversations", values["conversations"], "from", "value", SHAREGPT_ROLES
    )
    return _with_own_system(row, values["system"])


def _conversation(
    place: str, column: str, turns: Any, role_key: str, text_key: str, roles: dict[str, str]
) -> Row:
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{place}: {column} is {str(turns)[:60]!r}; a list of turns is expected")
    messages = []
    counts: dict[str, int] = {}
    for named in turns:
        # Turns of two columns come with the name of theirs.
        own, turn = named if isinstance(named, tuple) else (column, named)
        number = counts.get(own, 0)
        counts[own] = number + 1
        here = f"{own}[{number}]"
        if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
            keys = ", ".join(turn) if isinstance(turn, dict) else repr(turn)[:60]
            raise DataError(f"{place}: {here} has {keys}; {role_key} and {text_key} are needed")
        role = (
            roles.get(turn[role_key], turn[role_key]) if isinstance(turn[role_key], str) else None
        )
        if role not in ("system", "user", "assistant"):
            raise DataError(
                f"{place}: {here}.{role_key} is {turn[role_key]!r}; allowed: "
                + ", ".join(roles or ("system", "user", "assistant"))
            )
        messages.append(Message(role, _text_of(place, f"{here}.{text_key}", turn[text_key])))
    _check_order(place, column, messages)
    return Row(place, tuple(messages))


def _check_order(place: str, column: str, messages: list[Message]) -> None:
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
            f"{place}: {column} ends without an assistant turn: there is nothing to learn"
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
        return _with_own_system(row, values["system"])
    return _pair(place, values, "prompt", "completion")


def _parse_alpaca(place: str, values: dict[str, Any]) -> Row:
    if values["input"] not in (None, ""):
        joined = f"{_text_of(place, 'instruction', values['instruction'])}\n\n{_text_of(place, 'input', values['input'])}"
        values = {**values, "instruction": joined}
    return _pair(place, values, "instruction", "output")


def _pair(place: str, values: dict[str, Any], question: str, answer: str) -> Row:
    messages = (
        Message("user", _text_of(place, question, values[question])),
        Message("assistant", _text_of(place, answer, values[answer])),
    )
    return _with_own_system(Row(place, messages), values["system"])


def _parse_text(place: str, values: dict[str, Any]) -> Row:
    return Row(place, text=_text_of(place, "text", values["text"]))


PARSERS: dict[str, Callable[[str, dict[str, Any]], Row]] = {
    "messages": _parse_messages,
    "sharegpt": _parse_sharegpt,
    "prompt_completion": _parse_prompt_completion,
    "alpaca": _parse_alpaca,
    "text": _parse_text,
}
