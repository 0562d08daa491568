"""Owns rows that are left out: counted by reason with their first places, or an error that names them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from halfbyte.config.dataset import Data
from halfbyte.data.fields import RowError
from halfbyte.errors import DataError

MAX_NAMED_ROWS = 10


class Drops:
    """Rows that are left out.

    Attributes:
        counts: rows by reason.
        places: the first places for each reason.
        samples: samples by reason, of rows whose other samples stay.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}
        self.samples: Counter[str] = Counter()

    def add(self, reason: str, place: str) -> None:
        """Count a row."""
        self.counts[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < MAX_NAMED_ROWS:
            places.append(place)

    def malformed(self, errors: Sequence[RowError], data: Data) -> None:
        """Count malformed rows.

        Raises:
            DataError: there are some and ``on_malformed`` is ``error``.
        """
        if errors and data.on_malformed == "error":
            named = "\n".join(map(str, errors[:MAX_NAMED_ROWS]))
            more = len(errors) - MAX_NAMED_ROWS
            raise DataError(
                f"{named}\n"
                + (f"… and {more} more rows\n" if more > 0 else "")
                + "Mend the data, or leave such rows out and count them with data.on_malformed=drop"
            )
        for error in errors:
            self.add(f"malformed: {error.reason}", error.place)
