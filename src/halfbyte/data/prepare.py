"""Owns the way from a config to encoded rows: splits, leaks, lengths, and a ledger that adds up."""

from __future__ import annotations

import gc
import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from halfbyte.config.schema import Data
from halfbyte.data import cache
from halfbyte.data.leaks import near_duplicates
from halfbyte.data.ledger import Ledger, NearDuplicate, PartTokens
from halfbyte.data.prepared import Example, Prepared, pack, unpack
from halfbyte.data.render import Encoded, Renderer
from halfbyte.data.rows import Row, detect_format, parse_rows
from halfbyte.data.sources import Table, files_sha256, read_table
from halfbyte.errors import DataError

if TYPE_CHECKING:
    pass

NEAR_DUPLICATE = 0.9
MAX_NAMED_ROWS = 10


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
        arrays = cache.read(key) if key is not None else None
        if arrays is not None:
            return unpack(arrays)
        prepared = _prepare_anew(data, renderer, tables)
        # If the files have changed in the meantime, the key does not describe these rows.
        if key is not None and digests == _digests(data, tables):
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
    return read_table(source, split=split, subset=data.subset, revision=data.revision)


def _digests(data: Data, tables: dict[str, Table]) -> dict[str, str]:
    """Return a digest of each source's rows; tables that must be read for it are added to ``tables``."""
    digests = {}
    for name, (source, split) in _sources(data).items():
        digest = files_sha256(source)
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
    rows = {
        name: parse_rows(table, formats[name], data.columns, data.system)
        for name, table in tables.items()
    }
    parts: dict[str, list[Row]] = {
        "train": [],
        "validation": [],
        "test": list(rows.get("test", [])),
    }
    for row in rows["train"]:
        parts[_part_of(row, data)].append(row)

    dropped: Counter[str] = Counter()
    held_out = parts["test"] + parts["validation"]
    parts["train"] = _without_leaks(parts["train"], held_out, data, dropped)
    near = near_duplicates(
        [row.prompt for row in parts["train"]], [row.prompt for row in held_out], NEAR_DUPLICATE
    )
    encoded, truncated, full_lengths = _encode_all(parts, data, renderer, dropped)
    if not encoded["train"]:
        raise DataError(f"{data.train}: no row is left to train on; dropped: {dict(dropped)}")
    ledger = _ledger(tables, parts, encoded, dropped, near)
    ledger = ledger.model_copy(update={"truncated": truncated})
    return Prepared(
        encoded["train"], encoded["validation"], encoded["test"], ledger, formats, full_lengths
    )


def normalised(prompt: str) -> str:
    """Return the prompt without regard to case, spaces and closing punctuation.

    Two prompts count as the same if their normalised forms are equal.
    """
    text = " ".join(prompt.casefold().split())
    end = len(text)
    while end and unicodedata.category(text[end - 1])[0] in "PZ":
        end -= 1
    return text[:end] or text or prompt


def hash_fraction(prompt: str) -> float:
    """Return a number in [0, 1) that depends on the normalised prompt alone."""
    digest = hashlib.sha256(normalised(prompt).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _part_of(row: Row, data: Data) -> str:
    """Return the name of the part that the row's prompt is assigned to."""
    fraction = hash_fraction(row.prompt)
    if fraction < data.test_frac:
        return "test"
    return "validation" if fraction < data.test_frac + data.validation_frac else "train"


def _without_leaks(
    train: list[Row], held_out: list[Row], data: Data, dropped: Counter[str]
) -> list[Row]:
    """Return the training rows whose prompts are not held out, and count the others as dropped.

    Raises:
        DataError: there are such rows and ``on_leak`` is ``error``.
    """
    places = {normalised(row.prompt): row.place for row in held_out}
    leaks = [row for row in train if normalised(row.prompt) in places]
    if leaks and data.on_leak == "error":
        named = [
            f"{row.place} = {places[normalised(row.prompt)]}" for row in leaks[:MAX_NAMED_ROWS]
        ]
        raise DataError(
            f"{len(leaks)} training rows have a prompt that is also held out: {'; '.join(named)}."
            " Remove them, or set data.on_leak=drop to leave them out of training"
        )
    if leaks:
        dropped["prompt is held out"] += len(leaks)
    leaking = {row.place for row in leaks}
    return [row for row in train if row.place not in leaking]


def _encode_all(
    parts: dict[str, list[Row]], data: Data, renderer: Renderer, dropped: Counter[str]
) -> tuple[dict[str, list[Example]], list[str], list[int]]:
    """Encode the rows of every part and apply the policy for rows that are too long.

    Returns:
        The examples of each part, the places of truncated rows, and the full lengths of training rows.

    Raises:
        DataError: rows cannot be rendered, or are too long and ``on_overlength`` is ``error``.
    """
    full_lengths: list[int] = []
    overlong: list[tuple[Row, int]] = []
    truncated: list[str] = []
    errors: list[str] = []

    def fit(row: Row, encoded: Encoded) -> Encoded | None:
        if len(encoded.ids) <= data.max_length:
            return encoded
        if data.on_overlength == "truncate":
            cut = replace(
                encoded,
                ids=encoded.ids[: data.max_length],
                labels=encoded.labels[: data.max_length],
            )
            if cut.num_supervised:
                truncated.append(row.place)
                return cut
            dropped["no labelled token within max_length"] += 1
            return None
        overlong.append((row, len(encoded.ids)))
        return None

    # One list, so that texts are tokenised in as few batches as possible.
    all_rows = [(name, row) for name, rows in parts.items() for row in rows]
    results = renderer.try_rows([row for _, row in all_rows])
    examples: dict[str, list[Example]] = {name: [] for name in parts}
    for (name, row), encoded in zip(all_rows, results, strict=True):
        if isinstance(encoded, DataError):
            errors.append(str(encoded))
            continue
        if name == "train":
            full_lengths.append(len(encoded.ids))
        fitted = fit(row, encoded)
        if fitted is not None:
            examples[name].append(Example(row, fitted))
    _raise_errors(errors, overlong, data)
    if overlong:
        dropped["longer than max_length"] += len(overlong)
    return examples, truncated, full_lengths


def _raise_errors(errors: list[str], overlong: list[tuple[Row, int]], data: Data) -> None:
    """Raise what is wrong with rows, if anything is.

    Args:
        errors: messages about rows that cannot be rendered.
        overlong: rows longer than ``max_length``, with their lengths.
        data: the config's section.

    Raises:
        DataError: rows cannot be rendered, or are too long and ``on_overlength`` is ``error``.
    """
    if errors:
        more = f"\n… and {len(errors) - MAX_NAMED_ROWS} more rows"
        raise DataError(
            "\n".join(errors[:MAX_NAMED_ROWS]) + (more if len(errors) > MAX_NAMED_ROWS else "")
        )
    if overlong and data.on_overlength == "error":
        named = ", ".join(f"{row.place} ({size})" for row, size in overlong[:MAX_NAMED_ROWS])
        longest = max(size for _, size in overlong)
        raise DataError(
            f"{len(overlong)} rows are longer than data.max_length {data.max_length}: {named}. Set"
            f" data.max_length={longest}, or data.on_overlength to drop or truncate"
        )


def _ledger(
    tables: dict[str, Table],
    parts: dict[str, list[Row]],
    encoded: dict[str, list[Example]],
    dropped: Counter[str],
    near: list[tuple[int, int, float]],
) -> Ledger:
    """Account for every row that was read; ``near`` has pairs of training and held-out rows."""
    held_out = parts["test"] + parts["validation"]
    ledger = Ledger(
        rows_in={name: len(table.rows) for name, table in tables.items()},
        trained=len(encoded["train"]),
        held_out={name: len(encoded[name]) for name in ("validation", "test")},
        dropped=dict(dropped),
        fingerprints={name: table.fingerprint for name, table in tables.items()},
        changed_by_template=[e.row.place for e in encoded["train"] if e.encoded.changed],
        control_tokens_as_text=[
            e.row.place for part in encoded.values() for e in part if e.encoded.escaped
        ],
        duplicate_prompts_in_training=_count_duplicates(encoded["train"]),
        near_duplicates=[
            NearDuplicate(
                train=parts["train"][i].place,
                held_out=held_out[j].place,
                jaccard=round(similarity, 3),
            )
            for i, j, similarity in near
        ],
        tokens={
            name: PartTokens(
                total=sum(len(e.encoded.ids) for e in part),
                supervised=sum(e.encoded.num_supervised for e in part),
            )
            for name, part in encoded.items()
        },
    )
    assert ledger.adds_up, ledger
    return ledger


def _count_duplicates(examples: list[Example]) -> int:
    """Return how many examples repeat the prompt of an earlier one."""
    counts = Counter(normalised(example.row.prompt) for example in examples)
    return sum(count - 1 for count in counts.values())
