"""Owns which rows are used: those of a source that are drawn, the shares that are held out, and leaks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from halfbyte.config.dataset import Data, DataSource
from halfbyte.data.conversation import Row
from halfbyte.data.drops import MAX_NAMED_ROWS, Drops
from halfbyte.data.normal import fraction_of
from halfbyte.data.samples import SampleFile
from halfbyte.errors import DataError

TRAIN, VALIDATION, TEST, UNUSED = range(4)
MAX_MISS = 0.5  # of a share: the most that the hashes of few rows may miss it by
Sources = Sequence[tuple[str, DataSource]]


def draw_rows(file: SampleFile, sources: Sources, seed: int, drops: Drops) -> NDArray[np.bool_]:
    """Return which rows are used: of each source with ``rows`` as many as it says, drawn by the seed.

    Raises:
        DataError: a source has fewer.
    """
    of_source = np.array(file.row_sources)
    used = np.ones(len(of_source), dtype=bool)
    for number, (part, source) in enumerate(sources):
        if source.rows is None:
            continue
        rows = np.flatnonzero(of_source == number)
        if len(rows) < source.rows:
            raise DataError(
                f"data.{part}: {source.name} has {len(rows)} usable rows, and rows asks for {source.rows};"
                f" set rows to at most {len(rows)}, or a weight of {source.rows / max(1, len(rows)):.3g}"
            )
        left_out = np.random.default_rng([seed, number]).permutation(rows)[source.rows :]
        used[left_out] = False
        if len(left_out):
            drops.counts[number, "not drawn: rows of its source"] = len(left_out)
    return used


def divide(
    file: SampleFile, sources: Sources, data: Data, used: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """Return the part of each row: test sources are held out, others by the hash of what identifies the row."""
    fractions = fraction_of(np.array(file.row_digests))
    tests = [number for number, (part, _) in enumerate(sources) if part == "test"]
    is_test = np.isin(np.array(file.row_sources), tests)
    distinct = np.unique(fractions[used & ~is_test])
    test_cut, validation_cut = _cuts(distinct, data.test_frac, data.validation_frac)
    parts = np.full(len(fractions), TRAIN, dtype=np.uint8)
    parts[fractions < validation_cut] = VALIDATION
    parts[(fractions < test_cut) | is_test] = TEST
    parts[~used] = UNUSED
    return parts


def _cuts(distinct: NDArray[np.float64], test: float, validation: float) -> tuple[float, float]:
    """Return the hashes below which rows are held out for the test, and for the test or for validation.

    They are the shares themselves, so that a row stays on its side when others come or go. Where that misses a
    share, that of training included, by more than ``MAX_MISS``, as it may with few rows, they are the hashes that meet all.

    Args:
        distinct: the hashes of what identifies rows, ascending, in [0, 1).
        test: the share to be held out for the test.
        validation: the share to be held out for validation.
    """
    shares, num_rows = np.array([test, test + validation, 1.0]), len(distinct)
    wanted = np.diff(shares, prepend=0.0) * num_rows
    found = np.diff(np.searchsorted(distinct, shares), prepend=0)
    if np.any(np.abs(found - wanted) > MAX_MISS * wanted):
        shares = np.append(distinct, 1.0)[np.round(shares * num_rows).astype(int)]
    return float(shares[0]), float(shares[1])


def drop_leaks(file: SampleFile, parts: NDArray[np.uint8], data: Data, drops: Drops) -> None:
    """Mark the training rows that are held out too as unused, and count them.

    Raises:
        DataError: there are such rows and ``on_leak`` is ``error``.
    """
    digests = np.array(file.row_digests)
    held_out = np.flatnonzero((parts == VALIDATION) | (parts == TEST))
    leaks = np.flatnonzero((parts == TRAIN) & np.isin(digests, digests[held_out]))
    if len(leaks) and data.on_leak == "error":
        named = []
        for row in leaks[:MAX_NAMED_ROWS].tolist():
            twin = int(held_out[digests[held_out] == digests[row]][-1])
            named.append(f"{file.rows[row].place} = {file.rows[twin].place}")
        raise DataError(
            f"{len(leaks)} training rows have a prompt that is also held out: {'; '.join(named)}."
            " Remove them, or set data.on_leak=drop to leave them out of training"
        )
    parts[leaks] = UNUSED
    for row in leaks.tolist():
        drops.add("prompt is held out", file.rows[row].place, file.row_sources[row])


def keep_share(file: SampleFile, parts: NDArray[np.uint8], data: Data, drops: Drops) -> None:
    """Mark the training rows beyond ``train_frac`` as unused: those whose hashes are the lowest."""
    if data.train_frac == 1:
        return
    rows = np.flatnonzero(parts == TRAIN)
    order = np.argsort(-fraction_of(np.array(file.row_digests))[rows], kind="stable")
    left_out = rows[order[max(1, round(data.train_frac * len(rows))) :]]
    parts[left_out] = UNUSED
    for row in left_out.tolist():
        drops.add("beyond data.train_frac", file.rows[row].place, file.row_sources[row])


def copies_of_rows(
    file: SampleFile, sources: Sources, parts: NDArray[np.uint8], seed: int, drops: Drops
) -> NDArray[np.int64]:
    """Return how often each row is in an epoch, by the weights of the sources; mark rows that never are."""
    copies = np.ones(len(parts), dtype=np.int64)
    of_source = np.array(file.row_sources)
    for number, (_, source) in enumerate(sources):
        if source.weight == 1:
            continue
        rows = np.flatnonzero((of_source == number) & (parts == TRAIN))
        whole = int(source.weight)
        once_more = round((source.weight - whole) * len(rows))
        order = np.random.default_rng([seed, number, 1]).permutation(rows)
        copies[rows] = whole
        copies[order[:once_more]] += 1
        if not whole:
            parts[order[once_more:]] = UNUSED
            left_out = len(rows) - once_more
            drops.counts[number, "not drawn: weight of its source"] = left_out
    return copies


class RowIdentity:
    """What tells rows apart: their prompt beside the config's system messages, or their answer too.

    Args:
        sources: the sources, whose system messages tell no rows apart.
        by_answer: whether all rows have one prompt.
    """

    def __init__(self, sources: Sources, by_answer: bool = False) -> None:
        self._systems = {source.system for _, source in sources if source.system is not None}
        self.by_answer = by_answer

    @property
    def name(self) -> str:
        """What rows are split by."""
        return "answer" if self.by_answer else "prompt"

    def __call__(self, row: Row) -> str:
        """Return the text that tells a row apart."""
        if self.by_answer:
            return f"{row.prompt}\n{row.answer}"
        return row.prompt_beside(self._systems)


class LazyTexts(Sequence[str]):
    """Texts of rows that are read when they are asked for.

    Args:
        rows: numbers of the rows.
        read: returns the texts of some rows.
    """

    def __init__(self, rows: NDArray[np.int64], read: Callable[[Iterable[int]], list[str]]) -> None:
        self._rows, self._read = rows, read

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._rows)

    def __getitem__(self, index: int | slice) -> str | list[str]:  # type: ignore[override]
        """Return a text, or a list of them."""
        if isinstance(index, slice):
            return self._read(self._rows[index].tolist())
        return self._read([int(self._rows[index])])[0]
