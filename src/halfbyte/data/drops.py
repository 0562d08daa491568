"""Owns rows that are left out: counted by reason with their first places, or an error that names them."""

from __future__ import annotations

from collections import Counter

from halfbyte.config.dataset import Data
from halfbyte.data.fields import RowError
from halfbyte.errors import DataError

MAX_NAMED_ROWS = 10


class Drops:
    """Rows that are left out.

    Attributes:
        counts: rows by the number of their source and the reason.
        places: the first places for each reason.
        samples: samples by reason, of rows whose other samples stay.
    """

    def __init__(self) -> None:
        self.counts: Counter[tuple[int, str]] = Counter()
        self.places: dict[str, list[str]] = {}
        self.samples: Counter[str] = Counter()
        self._errors: list[str] = []
        self._num_errors = 0

    def add(self, reason: str, place: str, source: int) -> None:
        """Count a row."""
        self.counts[source, reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < MAX_NAMED_ROWS:
            places.append(place)

    def add_malformed(self, error: RowError, source: int) -> None:
        """Count a row that cannot be read or rendered."""
        self._num_errors += 1
        if len(self._errors) < MAX_NAMED_ROWS:
            self._errors.append(str(error))
        self.add(f"malformed: {error.reason}", error.place, source)

    def check_malformed(self, data: Data) -> None:
        """Check that no row is malformed, unless such rows are to be left out.

        Raises:
            DataError: there are some and ``on_malformed`` is ``error``.
        """
        if self._num_errors and data.on_malformed == "error":
            named = "\n".join(self._errors)
            more = self._num_errors - len(self._errors)
            raise DataError(
                f"{named}\n"
                + (f"… and {more} more rows\n" if more > 0 else "")
                + "Mend the data, or leave such rows out and count them with data.on_malformed=drop"
            )

    def by_reason(self, source: int | None = None) -> dict[str, int]:
        """Return the counts by reason, of one source or of all."""
        found: Counter[str] = Counter()
        for (number, reason), count in self.counts.items():
            if source in (None, number):
                found[reason] += count
        return dict(found)
