"""Owns the encoding of every part's rows, and what becomes of rows that are too long."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from halfbyte.config.dataset import Data
from halfbyte.data.drops import MAX_NAMED_ROWS, Drops
from halfbyte.data.encoded import Encoded
from halfbyte.data.fields import RowError
from halfbyte.data.ledger import MAX_PLACES
from halfbyte.data.render import Renderer
from halfbyte.data.samples import SampleFile
from halfbyte.data.shares import TRAIN, UNUSED
from halfbyte.errors import DataError

TOO_LONG = "longer than max_length"
NOTHING_LEFT = "no labelled token within max_length"


class EncodedRows:
    """What became of the rows of each part.

    Attributes:
        parts: the part of each row, ``UNUSED`` where none of its samples can be used.
        truncated: the first places of rows that were cut.
        num_truncated: number of samples that were cut.
    """

    def __init__(self, parts: NDArray[np.uint8], data: Data, drops: Drops) -> None:
        self.parts = parts.copy()
        self.truncated: list[str] = []
        self.num_truncated = 0
        self._data, self._drops = data, drops
        self._full_lengths = array("I")
        self._overlong: list[str] = []
        self._num_overlong = self._longest = 0

    @property
    def full_lengths(self) -> NDArray[np.int64]:
        """Tokens of each training sample before any is dropped or cut for its length."""
        return np.array(self._full_lengths, dtype=np.int64)

    def add(self, file: SampleFile, row: int, samples: list[Encoded]) -> None:
        """Add those samples of a row that fit, and count the row or the samples that do not."""
        faults: list[str] = []
        fitting = 0
        for sample in samples:
            if self.parts[row] == TRAIN:
                self._full_lengths.append(len(sample.ids))
            fitted = self._fit(sample, faults.append)
            if fitted is not None:
                file.add_sample(row, fitted)
                fitting += 1
        if faults and not fitting:
            self.parts[row] = UNUSED
            self._drops.add(faults[0], samples[0].place, file.row_sources[row])
        else:
            self._drops.samples.update(faults)

    def _fit(self, sample: Encoded, count: Callable[[str], None]) -> Encoded | None:
        """Return a sample as it fits into ``max_length``, or None if it does not."""
        limit, size = self._data.max_length, len(sample.ids)
        if size <= limit:
            return sample
        if self._data.on_overlength != "truncate":
            self._num_overlong += 1
            self._longest = max(self._longest, size)
            if len(self._overlong) < MAX_NAMED_ROWS:
                self._overlong.append(f"{sample.place} ({size})")
            count(TOO_LONG)
            return None
        cut = replace(sample, ids=sample.ids[:limit], labels=sample.labels[:limit])
        if cut.num_supervised:
            self.num_truncated += 1
            if len(self.truncated) < MAX_PLACES:
                self.truncated.append(sample.place)
            return cut
        count(NOTHING_LEFT)
        return None

    def check_lengths(self) -> None:
        """Check that no row is too long, unless such rows are to be left out.

        Raises:
            DataError: there are some and ``on_overlength`` is ``error``.
        """
        if self._num_overlong and self._data.on_overlength == "error":
            raise DataError(
                f"{self._num_overlong} rows are longer than data.max_length {self._data.max_length}:"
                f" {', '.join(self._overlong)}. Set data.max_length={self._longest}, or data.on_overlength to"
                " drop or truncate"
            )


def encode_rows(
    file: SampleFile, parts: NDArray[np.uint8], data: Data, renderer: Renderer, drops: Drops
) -> EncodedRows:
    """Encode the rows of every part and apply the policies for those that cannot be used.

    Args:
        file: the rows; their samples are added to it.
        parts: the part of each row.
        data: the policies.
        renderer: encodes the rows.
        drops: counts the rows that are left out.

    Raises:
        DataError: rows cannot be rendered and ``on_malformed`` is ``error``, or are too long and
            ``on_overlength`` is ``error``.
    """
    encoded = EncodedRows(parts, data, drops)
    numbers = np.flatnonzero(parts != UNUSED).tolist()
    results = renderer.try_rows(file.rows[number] for number in numbers)
    for number, samples in zip(numbers, results, strict=True):
        if isinstance(samples, RowError):
            encoded.parts[number] = UNUSED
            drops.add_malformed(samples, file.row_sources[number])
        elif isinstance(samples, DataError):
            raise samples
        else:
            encoded.add(file, number, samples)
    drops.check_malformed(data)
    encoded.check_lengths()
    return encoded
