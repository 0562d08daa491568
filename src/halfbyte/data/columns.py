"""Owns the names of columns: those of a format, what a table calls them, and parts of nested ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from halfbyte.data.raw import Table
from halfbyte.errors import DataError


def is_there(column: str, columns: Sequence[str]) -> bool:
    """Return whether a name is that of a column, or of a part of one such as ``answers.text.0``."""
    return column in columns or column.partition(".")[0] in columns


def flat_columns(values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return columns with parts of nested ones as columns of their own, such as ``answers.text.0``.

    What else those nested columns hold stands under its own path.
    """
    roots = {name.partition(".")[0] for name in names if name not in values and "." in name}
    flat = {key: value for key, value in values.items() if key not in roots}
    pending = [(root, values[root]) for root in roots if root in values]
    while pending:
        path, value = pending.pop()
        if not any(name.startswith(f"{path}.") for name in names):
            flat[path] = value
        elif isinstance(value, dict):
            pending += [(f"{path}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list):
            pending += [(f"{path}.{number}", inner) for number, inner in enumerate(value)]
        else:
            flat[path] = value
    return flat


def renamed_columns(table: Table, columns: dict[str, str]) -> list[str]:
    """Return the table's column names after renaming them to the format's names."""
    renamed = [name for name, source in columns.items() if is_there(source, table.columns)]
    return renamed + [name for name in table.columns if name not in columns.values()]


def check_columns(
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
    wanted = [*(columns.get(name, name) for name in needed), *columns.values()]
    missing = [name for name in wanted if not is_there(name, present)]
    if missing:
        raise DataError(
            f"{table.name}: the column {missing[0]!r} is missing; found: {', '.join(present)}. The format"
            f" {format_name} needs {', '.join(needed)}; name yours with data.columns,"
            " such as {" + f"{needed[0]}: {present[0]}" + "}"
        )
