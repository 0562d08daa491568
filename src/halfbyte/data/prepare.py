"""Owns the way from a config to encoded rows: splits, leaks, lengths, and a ledger that adds up."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from halfbyte.config.dataset import Data
from halfbyte.data import cache
from halfbyte.data.accounting import ledger_of
from halfbyte.data.conversation import Row
from halfbyte.data.drops import MAX_NAMED_ROWS, Drops
from halfbyte.data.encoding import encode_parts
from halfbyte.data.fields import Account
from halfbyte.data.leaks import near_duplicates
from halfbyte.data.normal import hash_fraction, normalised
from halfbyte.data.prepared import Prepared, pack, unpack
from halfbyte.data.raw import Table
from halfbyte.data.render import Renderer
from halfbyte.data.rows import detect_format, parse_rows
from halfbyte.data.sources import files_sha256, read_table
from halfbyte.errors import DataError

NEAR_DUPLICATE = 0.9


def prepare(data: Data, renderer: Renderer) -> Prepared:
    """Read, parse, split, check and encode the rows of a config, or read them from the cache.

    A hash of the prompt decides which rows are held out: the split does not depend on the order of
    the rows, and equal prompts land on the same side.

    Raises:
        DataError: rows are malformed, too long (``on_overlength: error``), leak from the held-out
            part into training (``on_leak: error``), or nothing is left to train on.
    """
    with _paused_collector():
        if not data.cache:
            return _prepare_anew(data, renderer, {})
        tables: dict[str, Table] = {}
        digests = _digests(data, tables)
        key = cache.key_of(data, renderer, digests)
        arrays = cache.read(key)
        if arrays is not None:
            return unpack(arrays)
        prepared = _prepare_anew(data, renderer, tables)
        # If the files have changed in the meantime, the key does not describe these rows.
        if digests == _digests(data, tables):
            cache.write(key, pack(prepared))
        return prepared


@contextmanager
def _paused_collector() -> Iterator[None]:
    """Pause the garbage collector: rows are many small objects that stay, and it would scan them often."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _sources(data: Data) -> dict[str, tuple[str, str]]:
    """Return each source by its name, with its split."""
    sources = {"train": (data.train, data.train_split)}
    return sources if data.test is None else {**sources, "test": (data.test, data.test_split)}


def _read(data: Data, source: str, split: str) -> Table:
    return read_table(
        source,
        split=split,
        subset=data.subset,
        revision=data.revision,
        field=data.field,
        encoding=data.encoding,
    )


def _digests(data: Data, tables: dict[str, Table]) -> dict[str, str]:
    """Return a digest of each source's rows; tables that must be read for it are added to ``tables``."""
    digests = {}
    for name, (source, split) in _sources(data).items():
        digest = files_sha256(source, split)
        if digest is None:
            if name not in tables:
                tables[name] = _read(data, source, split)
            digest = tables[name].fingerprint
        digests[name] = digest
    return digests


def _prepare_anew(data: Data, renderer: Renderer, read: dict[str, Table]) -> Prepared:
    """Prepare the rows without the cache; ``read`` holds the tables that are read already."""
    tables = {
        name: read[name] if name in read else _read(data, source, split)
        for name, (source, split) in _sources(data).items()
    }
    formats = {
        name: detect_format(table, data.columns) if data.format == "auto" else data.format
        for name, table in tables.items()
    }
    drops = Drops()
    rows, account = _parse(data, tables, formats, drops)
    identity, split_by = _identity([row for part in rows.values() for row in part], data.system)
    parts: dict[str, list[Row]] = {
        "train": [],
        "validation": [],
        "test": list(rows.get("test", [])),
    }
    for row in rows["train"]:
        parts[_part_of(identity(row), data)].append(row)
    held_out = parts["test"] + parts["validation"]
    parts["train"] = _without_leaks(parts["train"], held_out, identity, data, drops)
    near = near_duplicates(
        [identity(row) for row in parts["train"]],
        [identity(row) for row in held_out],
        NEAR_DUPLICATE,
    )
    encoded = encode_parts(parts, data, renderer, drops)
    if not encoded.examples["train"]:
        raise DataError(f"{data.train}: no row is left to train on; dropped: {dict(drops.counts)}")
    ledger = ledger_of(tables, parts, encoded, drops, account, near, split_by)
    train, validation, test = (encoded.examples[name] for name in ("train", "validation", "test"))
    return Prepared(train, validation, test, ledger, formats, encoded.full_lengths)


def _parse(
    data: Data, tables: dict[str, Table], formats: dict[str, str], drops: Drops
) -> tuple[dict[str, list[Row]], Account]:
    """Return the rows of each source, and what happened to their keys and turns.

    Raises:
        DataError: a row is malformed and ``on_malformed`` is ``error``.
    """
    rows: dict[str, list[Row]] = {}
    total = Account(data.repair)
    errors = []
    for name, table in tables.items():
        parsed = parse_rows(table, formats[name], data.columns, data.system, data.repair)
        rows[name] = [row for row in parsed.rows if row.weight != 0]
        for row in parsed.rows:
            if row.weight == 0:
                drops.add("weight 0", row.place)
        errors += parsed.malformed
        total.ignored.update(parsed.account.ignored)
        total.repaired.update(parsed.account.repaired)
    drops.malformed(errors, data)
    return rows, total


def _identity(rows: list[Row], system: str | None) -> tuple[Callable[[Row], str], str]:
    """Return what tells rows apart, and its name: their prompt, or where all have one, their answer too."""
    if len(rows) > 1 and len({row.prompt for row in rows}) == 1 and rows[0].text is None:
        return lambda row: f"{row.prompt}\n{row.answer}", "answer"
    return lambda row: row.prompt_beside(system), "prompt"


def _part_of(identity: str, data: Data) -> str:
    """Return the name of the part that a row is assigned to by what tells it apart."""
    fraction = hash_fraction(identity)
    if fraction < data.test_frac:
        return "test"
    return "validation" if fraction < data.test_frac + data.validation_frac else "train"


def _without_leaks(
    train: list[Row],
    held_out: list[Row],
    identity: Callable[[Row], str],
    data: Data,
    drops: Drops,
) -> list[Row]:
    """Return the training rows that are not held out too, and count the others as dropped.

    Raises:
        DataError: there are such rows and ``on_leak`` is ``error``.
    """
    places = {normalised(identity(row)): row.place for row in held_out}
    leaks = {id(row): row for row in train if normalised(identity(row)) in places}
    if leaks and data.on_leak == "error":
        named = [
            f"{row.place} = {places[normalised(identity(row))]}"
            for row in list(leaks.values())[:MAX_NAMED_ROWS]
        ]
        raise DataError(
            f"{len(leaks)} training rows have a prompt that is also held out: {'; '.join(named)}."
            " Remove them, or set data.on_leak=drop to leave them out of training"
        )
    for row in leaks.values():
        drops.add("prompt is held out", row.place)
    return [row for row in train if id(row) not in leaks]
