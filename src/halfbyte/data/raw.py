"""Owns rows as they are stored, before anything is made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from halfbyte.data.fields import RowError
from halfbyte.errors import DataError


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it was stored.

    Attributes:
        place: ``file:line`` or ``source row N`` (1-based).
        values: column name to value.
    """

    place: str
    values: dict[str, Any]


class Table:
    """The rows of one source, read one after another; what they have in common is known at the end.

    Args:
        name: the source.
        read: yields each row, or the error of a row that cannot be read; called once an iteration.

    Attributes:
        name: the source.
        columns: names of all columns that were read, in order of first appearance.
        num_rows: number of rows that were read, those that cannot be read included.
        fingerprint: sha256 of the canonical JSON of the rows that were read.
    """

    def __init__(self, name: str, read: Callable[[], Iterator[RawRow | RowError]]) -> None:
        self.name = name
        self._read = read
        self.columns: list[str] = []
        self.num_rows = 0
        self.fingerprint = ""

    def __iter__(self) -> Iterator[RawRow | RowError]:
        """Yield each row, or its error.

        Raises:
            DataError: the source cannot be read, or holds no row.
        """
        known: set[str] = set()
        last: Any = None
        digest = hashlib.sha256()
        encode = json.JSONEncoder(sort_keys=True, default=str).encode
        first_error: RowError | None = None
        self.columns, self.num_rows = [], 0
        for row in self._read():
            self.num_rows += 1
            if isinstance(row, RawRow):
                if row.values.keys() != last:
                    last = row.values.keys()
                    self.columns += [name for name in last if name not in known]
                    known.update(last)
                digest.update(encode(row.values).encode() + b"\n")
            else:
                first_error = first_error or row
            yield row
        if not self.columns:
            raise first_error or DataError(f"{self.name}: holds no rows")
        self.fingerprint = digest.hexdigest()
