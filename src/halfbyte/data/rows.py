"""Owns the row formats: five are read, into a conversation or a text, or an error names the bad row."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from halfbyte.config.dataset import DataSource
from halfbyte.data.choices import question_with_choices
from halfbyte.data.columns import check_columns, flat_columns, renamed_columns
from halfbyte.data.conversation import OPENING_ROLES, Message, Row
from halfbyte.data.fields import (
    REFUSED_IN_ROW,
    Account,
    Fields,
    RowError,
    has_value,
    json_value,
    quoted,
    valid_text,
)
from halfbyte.data.raw import RawRow, Table
from halfbyte.data.tool_calls import parse_tools
from halfbyte.data.turns import parse_turns
from halfbyte.errors import DataError

HEAD_ROWS = 1000  # rows off whose columns the format is read
# Columns that each format needs, and those that it may have besides.
EVERY_ROW = ("weight",)
EVERY_CONVERSATION = ("system", "tools", *EVERY_ROW)
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), EVERY_CONVERSATION),
    "sharegpt": (("conversations",), EVERY_CONVERSATION),
    "prompt_completion": (("prompt", "completion"), ("reasoning_content", *EVERY_CONVERSATION)),
    "alpaca": (("instruction", "output"), ("input", "reasoning_content", *EVERY_CONVERSATION)),
    "multiple_choice": (("question", "choices", "answer"), EVERY_CONVERSATION),
    "text": (("text",), EVERY_ROW),
}


class ParsedRows:
    """The rows of a source, parsed one after another; those that cannot be used are their errors.

    Args:
        table: the rows as stored.
        source: the source, each key with a value.
        account: names the repairs to apply, and counts them and the keys that are not used.

    Attributes:
        format: the format, read off the first rows where it is ``auto``; "" before they are iterated.
    """

    def __init__(self, table: Table, source: DataSource, account: Account) -> None:
        self.table, self.account = table, account
        self._wanted = source.format or "auto"
        self._columns = source.columns or {}
        self._system = source.system
        self.format = ""

    def __iter__(self) -> Iterator[Row | RowError]:
        """Yield each row, or its error.

        Raises:
            DataError: the source cannot be read, a column is missing, or no format fits.
        """
        rows = iter(self.table)
        head = list(islice(rows, HEAD_ROWS))
        self.format = self._wanted
        if self._wanted == "auto":
            try:
                self.format = self._detect()
            except DataError:
                deque(rows, maxlen=0)  # later rows may have further columns
                self.format = self._detect()
                head, rows = [], iter(self.table)
        needed, optional = FORMATS[self.format]
        refused = REFUSED_IN_ROW
        if "chosen" in self._columns.values():  # the other answer is left out by choice
            refused = {key: why for key, why in refused.items() if key != "rejected"}
        parser = _Parser(PARSERS[self.format], self._system, self.account, refused)
        sources = {name: self._columns.get(name, name) for name in (*needed, *optional)}
        used = frozenset(sources.values())
        nested = {name for name in used if "." in name}
        missing = nested.intersection(sources[name] for name in optional)
        for raw in chain(head, rows):
            if isinstance(raw, RowError):
                yield raw
                continue
            if nested:
                raw = RawRow(raw.place, flat_columns(raw.values, used))
                missing -= raw.values.keys()
            values = {name: raw.values.get(source) for name, source in sources.items()}
            others = {key: value for key, value in raw.values.items() if key not in used}
            try:
                yield parser.parse(raw.place, values, others)
            except RowError as error:
                yield error
        if self._wanted == "auto":
            self._detect()  # whether further columns make it ambiguous
        check_columns(self.table, self.format, self._columns, needed, optional)
        if missing:
            raise DataError(
                f"{self.table.name}: data.columns names {sorted(missing)[0]!r}, which no row has; found the columns"
                f" {', '.join(self.table.columns)}"
            )

    def _detect(self) -> str:
        """Return the one format whose columns the table has, after renaming.

        Raises:
            DataError: no format fits, or several do.
        """
        table = self.table
        present = set(renamed_columns(table, self._columns))
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


@dataclass(frozen=True)
class _Parser:
    """Parses the rows of one table.

    Attributes:
        parse_format: makes a row of the values of its format's columns.
        system: system message for conversations that have none.
        account: names the repairs to apply, and counts them and the keys that are not used.
        refused: other columns that a row must not have, with what to do about them.
    """

    parse_format: Callable[[_Parser, str, dict[str, Any]], Row]
    system: str | None
    account: Account
    refused: dict[str, str]

    def parse(self, place: str, values: dict[str, Any], others: dict[str, Any]) -> Row:
        """Return the row with these values of the format's columns and of ``others``.

        Raises:
            RowError: the row is malformed, or another column would change what is learnt.
        """
        fields = Fields(place, "", others)
        fields.refuse(self.refused)
        row = self.parse_format(self, place, values)
        fields.finish({}, self.account)
        if row.text is None:
            row = self._with_system(row, values["system"])
            if has_value(values["tools"]):
                row = replace(row, tools=parse_tools(place, values["tools"]))
        if has_value(values["weight"]):
            row = replace(row, weight=_weight(place, values["weight"]))
        return row

    def turns(self, place: str, turns: list[tuple[str, Any]]) -> Row:
        """Return the conversation of these turns, each with its column's name."""
        return Row(place, parse_turns(place, turns, self.account))

    def _with_system(self, row: Row, column: Any) -> Row:
        """Return the row with the system message of its column or of the config, unless it has one."""
        if row.messages[0].role in OPENING_ROLES:
            if not self.account.says_nothing(column):
                raise RowError(
                    row.place,
                    "two system messages",
                    "has a system message in its turns and in the column system; keep one of them",
                )
            return row
        if not self.account.says_nothing(column):
            system = valid_text(row.place, "system", column)
        elif self.system is not None:
            system = self.system
        else:
            return row
        return replace(row, messages=(Message("system", system), *row.messages))

    def pair(self, place: str, values: dict[str, Any], question: str, answer: str) -> Row:
        """Return the conversation of the columns ``question`` and ``answer``."""
        reasoning = values["reasoning_content"]
        if has_value(reasoning):
            reasoning = valid_text(place, "reasoning_content", reasoning)
        else:
            reasoning = None
        prompt = valid_text(place, question, values[question])
        completion = valid_text(place, answer, values[answer])
        if reasoning and "</think>" in completion:
            raise RowError(
                place,
                "thoughts twice",
                f"has thoughts in {answer} and in reasoning_content; keep one of them",
            )
        return Row(place, (Message("user", prompt), Message("assistant", completion, reasoning)))


def _weight(place: str, value: Any) -> float:
    """Return the weight of a row.

    Raises:
        RowError: it is no number of at least 0.
    """
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise RowError(
            place,
            "weight of a row",
            f"weight is {quoted(value)}; a number of at least 0 is expected",
        )
    return weight


def _list_of_turns(place: str, column: str, value: Any) -> list[tuple[str, Any]]:
    """Return the turns of a column, each with the column's name.

    Raises:
        RowError: it holds no list, or an empty one.
    """
    turns = json_value(place, column, value)
    if isinstance(turns, dict) and all(isinstance(values, list) for values in turns.values()):
        # Older versions of the datasets library store a list of turns as lists of their values.
        if len({len(values) for values in turns.values()}) > 1:
            detail = f"{column} has lists of unequal lengths"
            raise RowError(place, f"{column} of unequal lists", detail)
        turns = [
            dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)
        ]
    if not isinstance(turns, list) or not turns:
        raise RowError(
            place,
            f"{column} is no list of turns",
            f"{column} is {quoted(value)}; a list of turns is expected",
        )
    return [(column, turn) for turn in turns]


def _parse_messages(parser: _Parser, place: str, values: dict[str, Any]) -> Row:
    return parser.turns(place, _list_of_turns(place, "messages", values["messages"]))


def _parse_sharegpt(parser: _Parser, place: str, values: dict[str, Any]) -> Row:
    return parser.turns(place, _list_of_turns(place, "conversations", values["conversations"]))


def _parse_prompt_completion(parser: _Parser, place: str, values: dict[str, Any]) -> Row:
    prompt, completion = values["prompt"], values["completion"]
    completion = [completion] if isinstance(completion, dict) else completion
    if isinstance(prompt, list) and isinstance(completion, list):
        if has_value(values["reasoning_content"]):
            raise RowError(
                place,
                "'reasoning_content' beside turns",
                "has reasoning_content beside turns; write it into the turn that it belongs to",
            )
        turns = _list_of_turns(place, "prompt", prompt)
        return parser.turns(place, turns + _list_of_turns(place, "completion", completion))
    return parser.pair(place, values, "prompt", "completion")


def _parse_alpaca(parser: _Parser, place: str, values: dict[str, Any]) -> Row:
    if not parser.account.says_nothing(values["input"]):
        instruction = valid_text(place, "instruction", values["instruction"])
        extra_input = valid_text(place, "input", values["input"])
        values = {**values, "instruction": f"{instruction}\n\n{extra_input}"}
    return parser.pair(place, values, "instruction", "output")


def _parse_multiple_choice(parser: _Parser, place: str, values: dict[str, Any]) -> Row:
    return Row(place, question_with_choices(place, values))


def _parse_text(parser: _Parser, place: str, values: dict[str, Any]) -> Row:
    return Row(place, text=valid_text(place, "text", values["text"]))


PARSERS: dict[str, Callable[[_Parser, str, dict[str, Any]], Row]] = {
    "messages": _parse_messages,
    "sharegpt": _parse_sharegpt,
    "prompt_completion": _parse_prompt_completion,
    "alpaca": _parse_alpaca,
    "multiple_choice": _parse_multiple_choice,
    "text": _parse_text,
}
