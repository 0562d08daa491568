"""Owns rows in JSON files: lines, arrays, objects over many lines, and an object that holds the rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfbyte.data.fields import RowError, quoted, shorten
from halfbyte.data.raw import RawRow
from halfbyte.errors import DataError

MAX_ERROR_CHARS = 120


def read_json(path: Path, text: str, field: str | None) -> tuple[list[RawRow], list[RowError]]:
    """Read the rows of a JSON file, whatever its suffix says of its layout.

    Args:
        path: the file, for places.
        text: its text.
        field: key under which an object holds the rows, None if the rows are the file.

    Returns:
        the rows, and an error for each line that is none.

    Raises:
        DataError: the file holds no rows.
    """
    start = text.lstrip()[:1]
    if field is not None or start == "[":
        return _read_whole(path, text, field)
    rows, errors = _read_lines(path, text)
    if errors and start == "{":
        values = list(_objects(text))
        objects = [value for value in values if value is not None]
        if len(objects) == len(values):
            places = (f"{path} row {number}" for number in range(1, len(objects) + 1))
            rows, errors = [RawRow(p, v) for p, v in zip(places, objects, strict=True)], []
    if len(rows) == 1 and not errors:
        _check_single(path, rows[0].values)
    return rows, errors


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


def _read_lines(path: Path, text: str) -> tuple[list[RawRow], list[RowError]]:
    rows: list[RawRow] = []
    errors: list[RowError] = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if not line:
            continue
        place = f"{path}:{number}"
        try:
            value = json.loads(line.removesuffix(","))
        except (ValueError, RecursionError) as error:
            why = shorten(str(error), MAX_ERROR_CHARS)
            errors.append(RowError(place, "not valid JSON", f"not valid JSON: {why}"))
            continue
        if isinstance(value, dict):
            rows.append(RawRow(place, value))
        else:
            errors.append(_no_object(place, value))
    return rows, errors


def _no_object(place: str, value: Any) -> RowError:
    return RowError(place, "no object", f"holds {quoted(value)}; a row is an object with columns")


def _read_whole(path: Path, text: str, field: str | None) -> tuple[list[RawRow], list[RowError]]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = shorten(str(error), MAX_ERROR_CHARS)
        raise DataError(f"{path}: not valid JSON: {why}") from None
    if field is not None:
        if not isinstance(value, dict) or field not in value:
            keys = ", ".join(list(value)[:10]) if isinstance(value, dict) else type(value).__name__
            raise DataError(f"{path}: has no key {field!r}, which data.field names; found: {keys}")
        value = value[field]
    if not isinstance(value, list):
        raise DataError(f"{path}: holds {type(value).__name__}; a list of rows is expected")
    rows: list[RawRow] = []
    errors: list[RowError] = []
    for number, row in enumerate(value, start=1):
        place = f"{path} row {number}"
        if isinstance(row, dict):
            rows.append(RawRow(place, row))
        else:
            errors.append(_no_object(place, row))
    return rows, errors


def _objects(text: str) -> Iterator[dict[str, Any] | None]:
    """Yield objects that stand one after another, on any number of lines; None at the first fault."""
    decoder = json.JSONDecoder()
    at = 0
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if at == len(text):
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            yield None
            return
        if not isinstance(value, dict):
            yield None
            return
        yield value
