"""Owns prepared samples: ids and labels of rows, in files that are read one sample at a time."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

import numpy as np

from halfbyte.data.conversation import Row
from halfbyte.data.encoded import IGNORED, Encoded
from halfbyte.data.prefix_tree import Tokens
from halfbyte.data.row_file import Blob, RowFile, Scratch

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEARNT = np.uint32(1 << 31)  # the bit of a stored token that says that it is a label
TOKEN_BYTES = 4
PENDING_TOKENS = 1 << 18
Item = TypeVar("Item")


@dataclass(frozen=True)
class Example:
    """A sample of a row: its ids and labels.

    Attributes:
        row: the conversation or text; a row's samples share it.
        encoded: ids and labels.
    """

    row: Row
    encoded: Encoded


class SampleFile:
    """Rows and their samples in a folder.

    Args:
        folder: holds ``rows.bin`` and ``tokens.bin``.
        row_starts: as of ``RowFile``, of files that are written already.

    Attributes:
        rows: the rows; some may have no sample.
        row_sources: number of each row's source.
        row_weights: each row's weight.
        row_digests: 64 bits of the hash of what identifies each row's prompt.
        sample_rows: number of each sample's row.
        sizes: number of tokens of each sample.
        num_labels: number of labels of each sample.
        flags: 1 where the template changed the row, plus 2 where it holds special-token text.
    """

    def __init__(self, folder: Path | Scratch, row_starts: bytes | None = None) -> None:
        self._scratch = folder  # it is deleted when nothing holds it
        folder = folder.path if isinstance(folder, Scratch) else folder
        self.rows = RowFile(folder / "rows.bin", row_starts)
        self._tokens = Blob(folder / "tokens.bin", new=row_starts is None)
        self.row_sources, self.row_weights, self.row_digests = array("H"), array("d"), array("Q")
        self.sample_rows, self.sizes, self.num_labels = array("Q"), array("I"), array("I")
        self.flags = array("B")
        self._starts = array("Q", [0])
        self._ids, self._labels = array("I"), array("i")  # of tokens that are not written yet

    def add_row(self, row: Row, source: int, digest: int) -> None:
        """Add a row."""
        self.rows.append(row)
        self.row_sources.append(source)
        self.row_weights.append(row.weight)
        self.row_digests.append(digest)

    def add_sample(self, row: int, encoded: Encoded) -> None:
        """Add a sample of a row."""
        size = len(encoded.ids)
        self._ids.fromlist(encoded.ids)
        self._labels.fromlist(encoded.labels)
        if len(self._ids) > PENDING_TOKENS:
            self._flush()
        self.sample_rows.append(row)
        self.sizes.append(size)
        self.num_labels.append(encoded.num_supervised)
        self.flags.append(encoded.changed + 2 * encoded.escaped)
        self._starts.append(self._starts[-1] + size)

    def _flush(self) -> None:
        """Write the tokens that were added."""
        tokens = np.frombuffer(self._ids, dtype=np.uint32)
        learnt = np.frombuffer(self._labels, dtype=np.int32) != IGNORED
        self._tokens.append((tokens | learnt * LEARNT).tobytes())
        self._ids, self._labels = array("I"), array("i")

    def tokens(self, sample: int) -> Tokens:
        """Return the ids and labels of a sample."""
        if self._ids:
            self._flush()
        start, end = self._starts[sample], self._starts[sample + 1]
        content = self._tokens.read(TOKEN_BYTES * start, TOKEN_BYTES * end)
        stored = np.frombuffer(content, dtype=np.uint32)
        ids = (stored & ~LEARNT).astype(np.int32)
        return ids.tolist(), np.where(stored >= LEARNT, ids, IGNORED).tolist()

    def example(self, sample: int) -> Example:
        """Return a sample with its row."""
        row, flags = self.rows[self.sample_rows[sample]], self.flags[sample]
        changed, escaped = bool(flags & 1), bool(flags & 2)
        return Example(row, Encoded(row.place, *self.tokens(sample), changed, escaped))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return all numbers about rows and samples."""
        return {"row_starts": np.array(self.rows.starts)} | {
            name: np.array(getattr(self, name)) for name in NUMBERS
        }

    def sha256(self) -> dict[str, str]:
        """Return the sha256 of each file."""
        self._flush()
        return {"rows.bin": self.rows.sha256(), "tokens.bin": self._tokens.sha256()}

    @classmethod
    def read(cls, folder: Path, arrays: dict[str, NDArray[Any]]) -> SampleFile:
        """Read what was written to a folder, with what ``arrays`` returned."""
        file = cls(folder, arrays["row_starts"].tobytes())
        for name in NUMBERS:
            getattr(file, name).frombytes(arrays[name].tobytes())
        starts = arrays["sizes"].astype("uint64").cumsum()
        file._starts.frombytes(starts.astype("uint64").tobytes())
        return file


NUMBERS = (
    "row_sources",
    "row_weights",
    "row_digests",
    "sample_rows",
    "sizes",
    "num_labels",
    "flags",
)


class _View(Sequence[Item]):
    """Some samples of a file, in an order; nothing of them is held in memory.

    Args:
        file: the samples.
        numbers: which of them.
    """

    def __init__(self, file: SampleFile, numbers: NDArray[np.int64]) -> None:
        self.file, self.numbers = file, numbers

    def _read(self, number: int) -> Item:
        raise NotImplementedError

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> Self: ...

    def __getitem__(self, index: int | slice) -> Item | Self:
        """Return what is read of a sample, or a view of some of them."""
        if isinstance(index, slice):
            return type(self)(self.file, self.numbers[index])
        return self._read(int(self.numbers[index]))

    def __iter__(self) -> Iterator[Item]:
        """Yield what is read of each sample."""
        return map(self._read, self.numbers.tolist())

    @property
    def sizes(self) -> NDArray[np.uint32]:
        """The number of tokens of each sample."""
        return self._of_samples(self.file.sizes)

    def _of_samples(self, values: array[Any]) -> NDArray[Any]:
        found: NDArray[Any] = np.frombuffer(values, dtype=values.typecode)[self.numbers]
        return found


class TokenRows(_View[Tokens]):
    """The ids and labels of some samples."""

    def _read(self, number: int) -> Tokens:
        return self.file.tokens(number)


class Samples(_View[Example]):
    """Some samples with their rows."""

    def _read(self, number: int) -> Example:
        return self.file.example(number)

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Samples:
        """Write samples to a temporary folder."""
        file = SampleFile(Scratch())
        numbers: dict[int, int] = {}
        kept = list(examples)
        for example in kept:
            if id(example.row) not in numbers:
                numbers[id(example.row)] = len(numbers)
                file.add_row(example.row, 0, 0)
            file.add_sample(numbers[id(example.row)], example.encoded)
        return cls(file, np.arange(len(kept)))

    def __eq__(self, other: object) -> bool:
        """Return whether the other has equal samples in the same order."""
        return isinstance(other, Samples) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def tokens(self) -> TokenRows:
        """The ids and labels of each sample."""
        return TokenRows(self.file, self.numbers)

    @property
    def num_labels(self) -> NDArray[np.uint32]:
        """The number of labels of each sample."""
        return self._of_samples(self.file.num_labels)

    @property
    def flags(self) -> NDArray[np.uint8]:
        """The flags of each sample, as in ``SampleFile``."""
        return self._of_samples(self.file.flags)

    @property
    def row_numbers(self) -> NDArray[np.uint64]:
        """The number of each sample's row."""
        return self._of_samples(self.file.sample_rows)

    @property
    def sources(self) -> NDArray[np.uint16]:
        """The number of each sample's source."""
        return self._of_rows(self.file.row_sources)

    @property
    def weights(self) -> list[float] | None:
        """The weight of each sample's row; None if all are 1."""
        weights = self._of_rows(self.file.row_weights)
        return None if bool((weights == 1).all()) else weights.tolist()

    @property
    def distinct_rows(self) -> NDArray[np.uint64]:
        """The number of each row that has a sample here, once, in their order in the file."""
        return np.unique(self.row_numbers)

    def rows(self) -> Iterator[Row]:
        """Yield each row that has a sample here, once, in their order in the file."""
        return (self.file.rows[number] for number in self.distinct_rows.tolist())

    def rows_by_digest(self, num_rows: int) -> list[Row]:
        """Return as many of the rows, in the order of what identifies their prompts."""
        rows = self.distinct_rows
        order = np.argsort(np.array(self.file.row_digests)[rows], kind="stable")
        return [self.file.rows[number] for number in rows[order[:num_rows]].tolist()]

    def _of_rows(self, values: array[Any]) -> NDArray[Any]:
        found: NDArray[Any] = np.frombuffer(values, dtype=values.typecode)[self.row_numbers]
        return found
