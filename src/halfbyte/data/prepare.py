"""Owns the way from a config to encoded rows: splits, leaks, lengths, and a ledger that adds up.

Rows pass through in batches, and what is known of them is kept in files: memory does not grow with a row's
length, and with the number of rows only by some numbers about each.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from halfbyte.config.dataset import Data
from halfbyte.data import cache
from halfbyte.data.accounting import NearPairs, ledger_of
from halfbyte.data.drops import Drops
from halfbyte.data.encoding import encode_rows
from halfbyte.data.fields import Account, RowError
from halfbyte.data.leaks import near_duplicates
from halfbyte.data.ledger import MAX_PLACES, NEAR_DUPLICATE
from halfbyte.data.normal import digest_of
from halfbyte.data.prepared import Prepared
from halfbyte.data.render import Renderer
from halfbyte.data.row_file import Scratch
from halfbyte.data.rows import ParsedRows
from halfbyte.data.samples import SampleFile, Samples
from halfbyte.data.shares import (
    TEST,
    TRAIN,
    VALIDATION,
    LazyTexts,
    RowIdentity,
    Sources,
    copies_of_rows,
    divide,
    draw_rows,
    drop_leaks,
    keep_share,
)
from halfbyte.data.sources import files_sha256, open_table
from halfbyte.errors import DataError


def prepare(data: Data, renderer: Renderer, seed: int = 0) -> Prepared:
    """Read, parse, split, check and encode the rows of a config, or read them from the cache.

    A hash of the prompt decides which rows are held out: the split does not depend on the order of
    the rows, and equal prompts land on the same side, whichever sources they come from.

    Args:
        data: the section.
        renderer: encodes the rows.
        seed: draws rows of sources that are not used as a whole.

    Raises:
        DataError: rows are malformed, too long (``on_overlength: error``), leak from the held-out
            part into training (``on_leak: error``), or nothing is left to train on.
    """
    try:
        return _prepare(data, renderer, seed)
    except OSError as error:
        raise DataError(f"{error.filename or 'rows'}: {error.strerror or error}") from error


def _prepare(data: Data, renderer: Renderer, seed: int) -> Prepared:
    with _paused_collector():
        sources = data.sources()
        if not data.cache:
            return _prepare_anew(data, sources, renderer, seed, Scratch())
        digests = _digests(sources)
        key = cache.key_of(data, renderer, seed, digests)
        kept = cache.read(key)
        if kept is not None:
            return kept
        scratch = Scratch(cache.folder() if cache.is_writer() else None)
        try:
            prepared = _prepare_anew(data, sources, renderer, seed, scratch)
        except OSError as error:
            scratch.fault = error.strerror or str(error)
            prepared = _prepare_anew(data, sources, renderer, seed, Scratch())
        # If the files have changed in the meantime, the key does not describe these rows.
        if digests == _digests(sources, prepared.ledger.fingerprints):
            cache.write(key, prepared, scratch)
        return prepared


@contextmanager
def _paused_collector() -> Iterator[None]:
    """Pause the garbage collector: a batch is many small objects, and it would scan them often."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _digests(sources: Sources, known: dict[str, str] | None = None) -> list[str]:
    """Return a digest of each source's rows; ``known`` has those of rows that were read, by name."""
    digests = []
    for _, source in sources:
        digest = files_sha256(source.path, source.split or "train")
        if digest is None and known is not None:
            digest = known[source.name or ""]
        elif digest is None:
            table = open_table(source)
            for _ in table:
                pass
            digest = table.fingerprint
        digests.append(digest)
    return digests


def _prepare_anew(
    data: Data, sources: Sources, renderer: Renderer, seed: int, scratch: Scratch
) -> Prepared:
    """Prepare the rows without the cache, in a folder that lasts as long as they do."""
    drops, account = Drops(), Account(data.repair)
    file = SampleFile(scratch)
    parsed = [ParsedRows(open_table(source), source, account) for _, source in sources]
    identity = _read_rows(file, parsed, sources, drops)
    drops.check_malformed(data)
    used = draw_rows(file, sources, seed, drops)
    parts = divide(file, sources, data, used)
    drop_leaks(file, parts, data, drops)
    keep_share(file, parts, data, drops)
    near = _near_duplicates(file, parts, identity)
    copies = copies_of_rows(file, sources, parts, seed, drops)
    encoded = encode_rows(file, parts, data, renderer, drops)
    if not np.any(encoded.parts == TRAIN):
        raise DataError(
            f"{', '.join(source.path for part, source in sources if part == 'train')}: no row is left to train"
            f" on; dropped: {drops.by_reason()}"
        )
    file.rows.release()
    of_sample = np.array(file.sample_rows, dtype=np.int64)
    in_part = encoded.parts[of_sample]
    train = np.flatnonzero(in_part == TRAIN)
    samples = {
        "train": Samples(file, np.repeat(train, copies[of_sample[train]])),
        "validation": Samples(file, np.flatnonzero(in_part == VALIDATION)),
        "test": Samples(file, np.flatnonzero(in_part == TEST)),
    }
    tables = [rows.table for rows in parsed]
    ledger = ledger_of(tables, sources, samples, encoded, drops, account, near, identity.name)
    formats = {
        source.name or "": rows.format for rows, (_, source) in zip(parsed, sources, strict=True)
    }
    return Prepared(**samples, ledger=ledger, formats=formats, full_lengths=encoded.full_lengths)


def _read_rows(
    file: SampleFile, parsed: list[ParsedRows], sources: Sources, drops: Drops
) -> RowIdentity:
    """Write the rows of all sources to the file; return what tells them apart."""
    identity = RowIdentity(sources)
    first: str | None = None
    by_answer = True
    for number, rows in enumerate(parsed):
        for row in rows:
            if isinstance(row, RowError):
                drops.add_malformed(row, number)
            elif row.weight == 0:
                drops.add("weight 0", row.place, number)
            else:
                prompt = identity(row)
                file.add_row(row, number, digest_of(prompt))
                if by_answer:
                    first = prompt if first is None else first
                    by_answer = row.text is None and prompt == first
    if not by_answer or len(file.rows) < 2:
        return identity
    identity = RowIdentity(sources, by_answer=True)
    for number in range(len(file.rows)):
        file.row_digests[number] = digest_of(identity(file.rows[number]))
    return identity


def _near_duplicates(
    file: SampleFile, parts: NDArray[np.uint8], identity: RowIdentity
) -> NearPairs:
    """Return the numbers of training and held-out rows that are nearly alike, with their similarity."""

    def texts(rows: Iterable[int]) -> list[str]:
        return [identity(file.rows[row]) for row in rows]

    train = np.flatnonzero(parts == TRAIN)
    # Test rows come first, as in the ledger.
    held_out = np.concatenate([np.flatnonzero(parts == part) for part in (TEST, VALIDATION)])
    both = LazyTexts(train, texts), LazyTexts(held_out, texts)
    pairs, total = near_duplicates(*both, NEAR_DUPLICATE, MAX_PLACES)
    named = [(int(train[i]), int(held_out[j]), similarity) for i, j, similarity in pairs]
    return NearPairs(named, total)
