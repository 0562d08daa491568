"""Owns the way from a config to encoded rows: splits, leaks, lengths, and the ledger that adds up."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from halfbyte.config.schema import Data
from halfbyte.data.leaks import near_duplicates
from halfbyte.data.render import IGNORED, Encoded, Renderer
from halfbyte.data.rows import Row, detect_format, parse_rows
from halfbyte.data.sources import Table, read_table
from halfbyte.errors import DataError

NEAR_DUPLICATE = 0.9
MAX_NAMED_ROWS = 10


@dataclass(frozen=True)
class Example:
    """A row with its ids and labels."""

    row: Row
    encoded: Encoded


@dataclass
class Prepared:
    """Everything that a run learns from and is measured on.

    ``ledger`` says what became of every row that came in; see ``_close_ledger``.
    """

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    ledger: dict[str, Any]
    formats: dict[str, str] = field(default_factory=dict)
    # Tokens of each training row before any is dropped for its length or cut.
    full_lengths: list[int] = field(default_factory=list)


def prepare(data: Data, renderer: Renderer) -> Prepared:
    """Read, parse, split, check and encode the rows of a config.

    The held-out split goes by a hash of the prompt: it does not depend on the order of the rows,
    and equal prompts fall on the same side.

    Raises:
        DataError: rows are malformed, too long (``on_overlength: error``), leak from the held-out
            part into training (``on_leak: error``), or nothing is left to train on.
    """
    main = _read(data, data.train, data.train_split)
    tables = {"train": main}
    if data.test is not None:
        tables["test"] = _read(data, data.test, data.test_split)
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
    ledger = _close_ledger(tables, encoded, dropped)
    ledger |= {
        "truncated": truncated,
        "changed_by_template": [e.row.place for e in encoded["train"] if e.encoded.changed],
        "control_tokens_as_text": [
            e.row.place for part in encoded.values() for e in part if e.encoded.escaped
        ],
        "duplicate_prompts_in_training": _count_duplicates(encoded["train"]),
        "near_duplicates": [
            {
                "train": parts["train"][i].place,
                "held_out": held_out[j].place,
                "jaccard": round(similarity, 3),
            }
            for i, j, similarity in near
        ],
        "tokens": {
            name: {
                "total": sum(len(e.encoded.ids) for e in part),
                "supervised": sum(e.encoded.num_supervised for e in part),
            }
            for name, part in encoded.items()
        },
        "fingerprints": {name: table.fingerprint for name, table in tables.items()},
    }
    return Prepared(
        encoded["train"], encoded["validation"], encoded["test"], ledger, formats, full_lengths
    )


def normalised(prompt: str) -> str:
    """The form in which two prompts count as the same: case, spaces and closing punctuation aside."""
    text = " ".join(prompt.casefold().split())
    end = len(text)
    while end and unicodedata.category(text[end - 1])[0] in "PZ":
        end -= 1
    return text[:end] or text or prompt


def hash_fraction(prompt: str) -> float:
    """A number in [0, 1) that depends on the normalised prompt alone."""
    digest = hashlib.sha256(normalised(prompt).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _read(data: Data, source: str, split: str) -> Table:
    return read_table(source, split=split, subset=data.subset, revision=data.revision)


def _part_of(row: Row, data: Data) -> str:
    point = hash_fraction(row.prompt)
    if point < data.test_frac:
        return "test"
    return "validation" if point < data.test_frac + data.validation_frac else "train"


def _without_leaks(
    train: list[Row], held_out: list[Row], data: Data, dropped: Counter[str]
) -> list[Row]:
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
    gone = {row.place for row in leaks}
    return [row for row in train if row.place not in gone]


def _encode_all(
    parts: dict[str, list[Row]], data: Data, renderer: Renderer, dropped: Counter[str]
) -> tuple[dict[str, list[Example]], list[str], list[int]]:
    full_lengths: list[int] = []
    overlong: list[tuple[Row, int]] = []
    truncated: list[str] = []
    faults: list[str] = []
    in_training = set(parts["train"])

    def fit(row: Row) -> Encoded | None:
        try:
            encoded = renderer.encode_row(row)
        except DataError as error:
            faults.append(str(error))
            return None
        if row in in_training:
            full_lengths.append(len(encoded.ids))
        if len(encoded.ids) <= data.max_length:
            return encoded
        if data.on_overlength == "truncate":
            cut = replace(
                encoded,
                ids=encoded.ids[: data.max_length],
                labels=encoded.labels[: data.max_length],
            )
            if any(label != IGNORED for label in cut.labels):
                truncated.append(row.place)
                return cut
            dropped["no labelled token within max_length"] += 1
            return None
        overlong.append((row, len(encoded.ids)))
        return None

    encoded = {name: _examples(rows, fit) for name, rows in parts.items()}
    if faults:
        more = f"\n… and {len(faults) - MAX_NAMED_ROWS} more rows"
        raise DataError(
            "\n".join(faults[:MAX_NAMED_ROWS]) + (more if len(faults) > MAX_NAMED_ROWS else "")
        )
    if overlong and data.on_overlength == "error":
        named = ", ".join(f"{row.place} ({size})" for row, size in overlong[:MAX_NAMED_ROWS])
        longest = max(size for _, size in overlong)
        raise DataError(
            f"{len(overlong)} rows are longer than data.max_length {data.max_length}: {named}. Set"
            f" data.max_length={longest}, or data.on_overlength to drop or truncate"
        )
    if overlong:
        dropped["longer than max_length"] += len(overlong)
    return encoded, truncated, full_lengths


def _examples(rows: list[Row], fit: Callable[[Row], Encoded | None]) -> list[Example]:
    fitted = ((row, fit(row)) for row in rows)
    return [Example(row, encoded) for row, encoded in fitted if encoded is not None]


def _close_ledger(
    tables: dict[str, Table], encoded: dict[str, list[Example]], dropped: Counter[str]
) -> dict[str, Any]:
    """Rows in = trained + held out + dropped, or it is our own bug."""
    ledger = {
        "rows_in": {name: len(table.rows) for name, table in tables.items()},
        "trained": len(encoded["train"]),
        "held_out": {name: len(encoded[name]) for name in ("validation", "test")},
        "dropped": dict(dropped),
    }
    rows_in = sum(len(table.rows) for table in tables.values())
    rows_out = sum(len(part) for part in encoded.values()) + sum(dropped.values())
    assert rows_in == rows_out, ledger
    return ledger


def _count_duplicates(examples: list[Example]) -> int:
    counts = Counter(normalised(example.row.prompt) for example in examples)
    return sum(count - 1 for count in counts.values())
