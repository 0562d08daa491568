"""Owns rows in JSON files: lines, arrays, objects over many lines, and an object that holds the rows."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from halfbyte.bounds import shorten
from halfbyte.data.fields import JSON, RepeatedKeyError, RowError, quoted
from halfbyte.data.files import CHUNK_BYTES, MAX_HELD_CHARS, MAX_ROW_CHARS, lines_of
from halfbyte.data.raw import RawRow
from halfbyte.errors import DataError

MAX_ERROR_CHARS = 120
BLANKS = " \t\r\n"
Rows = Iterator[RawRow | RowError]


def read_json(path: Path, chunks: Iterator[str], field: str | None) -> Rows:
    """Yield the rows of a JSON file, whatever its suffix says of its layout, and an error for each that is none.

    Args:
        path: the file, for places.
        chunks: its text in pieces. With ``field`` it is held in memory as a whole, else row by row.
        field: key under which an object holds the rows, None if the rows are the file.

    Raises:
        DataError: the file holds no rows.
    """
    if field is not None:
        yield from _read_field(path, _whole(path, chunks), field)
        return
    chunks = filter(None, chunks)  # a piece may hold less than a character
    head = next((chunk for chunk in chunks if chunk.strip(BLANKS)), "")
    chunks = chain([head], chunks)
    if head.lstrip(BLANKS)[:1] == "[":
        yield from _read_array(path, chunks)
    else:
        yield from _read_lines(path, chunks)


def _whole(path: Path, chunks: Iterator[str]) -> str:
    text: list[str] = []
    for chunk in chunks:
        text.append(chunk)
        if CHUNK_BYTES * len(text) > MAX_HELD_CHARS:
            raise DataError(
                f"{path}: is larger than {MAX_HELD_CHARS:,} bytes, and with data.field it is held as a whole; write"
                " its rows as .jsonl"
            )
    return "".join(text)


class _Lines:
    """Lines that are not blank, with their numbers; lines can be put back."""

    def __init__(self, path: Path, chunks: Iterator[str]) -> None:
        numbered = enumerate(lines_of(path, chunks), start=1)
        stripped = ((number, line.strip()) for number, line in numbered)
        self._lines = filter(lambda numbered: numbered[1], stripped)
        self._returned: deque[tuple[int, str]] = deque()

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return self

    def __next__(self) -> tuple[int, str]:
        return self._returned.popleft() if self._returned else next(self._lines)

    def put_back(self, lines: list[tuple[int, str]]) -> None:
        self._returned.extendleft(reversed(lines))

    def object_from(self, number: int, line: str) -> dict[str, Any] | None:
        """Return the object that begins with a line and ends on a later one, or with others behind it.

        None if there is none; then no line is used.
        """
        taken = [(number, line)]
        while True:
            text = "\n".join(line for _, line in taken)
            try:
                value, end = JSON.raw_decode(text)
            except RecursionError:
                break
            except RepeatedKeyError:
                self.put_back(taken[1:])
                raise
            except ValueError as error:
                more = list(islice(self, len(taken)))
                ends_early = isinstance(error, json.JSONDecodeError) and error.pos >= len(text)
                if not ends_early or not more:
                    self.put_back(more)
                    break
                taken += more
                continue
            at = text.count("\n", 0, end)
            rest = text[end:].partition("\n")[0].strip(f"{BLANKS},")
            self.put_back([(taken[at][0], rest)] * bool(rest) + taken[at + 1 :])
            return dict(value)
        self.put_back(taken[1:])
        return None


def _read_lines(path: Path, chunks: Iterator[str]) -> Rows:
    count, first = 0, None
    lines = _Lines(path, chunks)
    for number, line in lines:
        place = f"{path}:{number}"
        try:
            value = JSON.decode(line.removesuffix(","))
        except (ValueError, RecursionError) as error:
            value, why = None, str(error)
            try:
                if line.startswith("{") and not isinstance(error, RepeatedKeyError):
                    value = lines.object_from(number, line)
            except RepeatedKeyError as repeated:
                why = str(repeated)
            if value is None:
                why = shorten(why, MAX_ERROR_CHARS)
                yield RowError(place, "not valid JSON", f"not valid JSON: {why}")
                continue
        count += 1
        first = value if count == 1 else None
        yield _row(place, value)
    if isinstance(first, dict):
        _check_single(path, first)


def _row(place: str, value: Any) -> RawRow | RowError:
    if isinstance(value, dict):
        return RawRow(place, value)
    return RowError(place, "no object", f"holds {quoted(value)}; a row is an object with columns")


def _check_single(path: Path, value: dict[str, Any]) -> None:
    """Check that the only object of a file is a row, and does not hold the rows.

    Raises:
        DataError: it has no text of its own, but a list of objects that are no turns.
    """
    lists = {key: item[0].keys() for key, item in value.items() if _is_list_of_rows(item)}
    holders = [key for key, keys in lists.items() if not {"role", "from"} & keys]
    has_text = {"prompt", "completion", "instruction", "output", "text"} & value.keys()
    if holders and not has_text and len(holders) == len(lists):  # no list is one of turns
        raise DataError(
            f"{path}: holds one object; rows are expected, one a line or in a list; set"
            f" data.field={holders[0]}, which holds a list of them"
        )


def _is_list_of_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


class _Window:
    """The part of a text that is being read."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self._chunks = chunks
        self._text, self._at = "", 0
        self._decode = JSON.raw_decode

    def peek(self) -> str:
        """Skip blanks; return the character behind them, "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in BLANKS:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            self._text, self._at = next(self._chunks, ""), 0
            if not self._text:
                return ""

    def take(self, allowed: str) -> str:
        """Take the next character that is not blank.

        Raises:
            ValueError: it is none of ``allowed``.
        """
        sign = self.peek()
        if not sign or sign not in allowed:
            raise ValueError(f"{sign!r} where one of {allowed!r} is expected")
        self._at += 1
        return sign

    def value(self) -> Any:
        """Take the value that begins here.

        Raises:
            ValueError: there is none.
        """
        self.peek()
        while True:
            try:
                value, self._at = self._decode(self._text, self._at)
                return value
            except RepeatedKeyError:
                raise
            except ValueError:
                more = next(self._chunks, "")
                if not more:
                    raise
                if len(self._text) - self._at > MAX_ROW_CHARS:
                    raise ValueError(f"more than {MAX_ROW_CHARS:,} characters") from None
                self._text, self._at = self._text[self._at :] + more, 0


def _read_array(path: Path, chunks: Iterator[str]) -> Rows:
    """Yield the rows of a list, of which only what is being read is held in memory."""
    window, number = _Window(chunks), 0
    try:
        window.take("[")
        while window.peek() != "]" or number:
            row = window.value()
            number += 1
            yield _row(f"{path} row {number}", row)
            if window.take(",]") == "]":
                break
        else:
            window.take("]")
        if window.peek():
            raise ValueError("more text behind the list")
    except (ValueError, RecursionError) as error:
        # Its place would be one in the window.
        why = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        why = shorten(why, MAX_ERROR_CHARS)
        raise DataError(f"{path}: not valid JSON behind row {number}: {why}") from None


def _read_field(path: Path, text: str, field: str) -> Rows:
    try:
        value = JSON.decode(text)
    except (ValueError, RecursionError) as error:
        why = shorten(str(error), MAX_ERROR_CHARS)
        raise DataError(f"{path}: not valid JSON: {why}") from None
    if not isinstance(value, dict) or field not in value:
        keys = ", ".join(list(value)[:10]) if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{path}: has no key {field!r}, which data.field names; found: {keys}")
    value = value[field]
    if not isinstance(value, list):
        raise DataError(f"{path}: holds {type(value).__name__}; a list of rows is expected")
    for number, row in enumerate(value, start=1):
        yield _row(f"{path} row {number}", row)
