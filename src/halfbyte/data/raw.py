"""Owns rows as they are stored, before anything is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.data.fields import RowError


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it was stored.

    Attributes:
        place: ``file:line`` or ``source row N`` (1-based).
        values: column name to value.
    """

    place: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Every row of one source.

    Attributes:
        name: the source.
        rows: its rows.
        fingerprint: sha256 of the rows' canonical JSON.
        malformed: an error for each row that cannot be read.
    """

    name: str
    rows: list[RawRow]
    fingerprint: str
    malformed: Sequence[RowError] = ()

    @property
    def num_rows(self) -> int:
        """Number of rows, those that cannot be read included."""
        return len(self.rows) + len(self.malformed)

    @property
    def columns(self) -> list[str]:
        """Names of all columns, in order of first appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row.values))
