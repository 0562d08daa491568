"""Owns the way from a config to encoded rows: splits, leaks, lengths, and the ledger that adds up."""

from __future__ import annotations

import gc
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

from halfbyte.config.schema import Data
from halfbyte.data import cache
from halfbyte.data.leaks import near_duplicates
from halfbyte.data.render import IGNORED, Encoded, Renderer
from halfbyte.data.rows import Message, Row, detect_format, parse_rows
from halfbyte.data.sources import Table, files_sha256, read_table
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
    """Read, parse, split, check and encode the rows of a config, or find them in the cache.

    The held-out split goes by a hash of the prompt: it does not depend on the order of the rows,
    and equal prompts fall on the same side.

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
        found = cache.read(key) if key is not None else None
        if found is not None:
            return unpack(found)
        prepared = _prepare_anew(data, renderer, tables)
        # Files that were written to meanwhile are not the ones that the key speaks of.
        if key is not None and digests == _digests(data, tables):
            cache.write(key, pack(prepared))
        return prepared


@contextmanager
def _paused_collector() -> Iterator[None]:
    """Rows are many small objects that stay; Python would look through them time and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _sources(data: Data) -> dict[str, tuple[str, str]]:
    """Each source and its split."""
    sources = {"train": (data.train, data.train_split)}
    return sources if data.test is None else {**sources, "test": (data.test, data.test_split)}


def _read(data: Data, source: str, split: str) -> Table:
    return read_table(source, split=split, subset=data.subset, revision=data.revision)


def _digests(data: Data, tables: dict[str, Table]) -> dict[str, str]:
    """A digest of the rows of each source; ``tables`` gains those that had to be read for it."""
    digests = {}
    for name, (source, split) in _sources(data).items():
        digest = files_sha256(source)
        if digest is None:
            if name not in tables:
                tables[name] = _read(data, source, split)
            digest = tables[name].fingerprint
        digests[name] = digest
    return digests


def _prepare_anew(data: Data, renderer: Renderer, known: dict[str, Table]) -> Prepared:
    tables = {
        name: known[name] if name in known else _read(data, source, split)
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

    # One list, so that texts are tokenised in as few batches as there can be.
    every = [(name, row) for name, rows in parts.items() for row in rows]
    examples: dict[str, list[Example]] = {name: [] for name in parts}
    for (name, row), encoded in zip(every, renderer.try_rows([r for _, r in every]), strict=True):
        if isinstance(encoded, DataError):
            faults.append(str(encoded))
            continue
        if name == "train":
            full_lengths.append(len(encoded.ids))
        fitted = fit(row, encoded)
        if fitted is not None:
            examples[name].append(Example(row, fitted))
    _refuse(faults, overlong, data)
    if overlong:
        dropped["longer than max_length"] += len(overlong)
    return examples, truncated, full_lengths


def _refuse(faults: list[str], overlong: list[tuple[Row, int]], data: Data) -> None:
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


# --- the form in the cache ---

PARTS = ("train", "validation", "test")


def pack(prepared: Prepared) -> dict[str, NDArray[Any]]:
    """Prepared rows as a few arrays; ``unpack`` gives equal ones back."""
    import numpy as np

    examples = [example for part in PARTS for example in getattr(prepared, part)]
    messages: dict[Message, int] = {}
    rows = [
        [e.row.place, e.row.text, [messages.setdefault(m, len(messages)) for m in e.row.messages]]
        for e in examples
    ]
    meta = {
        "counts": [len(getattr(prepared, part)) for part in PARTS],
        "ledger": prepared.ledger,
        "formats": prepared.formats,
        "messages": [[message.role, message.content] for message in messages],
        "rows": rows,
    }
    encoded = [example.encoded for example in examples]
    ids = np.array(list(chain.from_iterable(e.ids for e in encoded)), dtype=np.uint32)
    labels = np.array(list(chain.from_iterable(e.labels for e in encoded)), dtype=np.int64)
    assert np.array_equal(np.where(labels == IGNORED, ids, labels), ids)
    return {
        "meta": np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8),
        "ids": ids.astype(np.uint16) if ids.max(initial=0) < 1 << 16 else ids,
        "learnt": np.packbits(labels != IGNORED),
        "lengths": np.array([len(e.ids) for e in encoded], dtype=np.int64),
        "changed": np.array([e.changed for e in encoded], dtype=np.uint8),
        "escaped": np.array([e.escaped for e in encoded], dtype=np.uint8),
        "full_lengths": np.array(prepared.full_lengths, dtype=np.int64),
    }


def unpack(arrays: dict[str, NDArray[Any]]) -> Prepared:
    """The prepared rows that ``pack`` was given."""
    import numpy as np

    meta = json.loads(arrays["meta"].tobytes())
    messages = [Message(role, content) for role, content in meta["messages"]]
    learnt = np.unpackbits(arrays["learnt"], count=len(arrays["ids"])).astype(bool)
    # One object for each token of the vocabulary, as numbers beyond 256 would else be one each.
    ids = np.arange(int(arrays["ids"].max(initial=0)) + 1).astype(object)[arrays["ids"]]
    labels = np.where(learnt, ids, IGNORED).tolist()
    ids = ids.tolist()
    ends = pairwise([0, *np.cumsum(arrays["lengths"]).tolist()])
    flags = zip(arrays["changed"].astype(bool), arrays["escaped"].astype(bool), strict=True)
    examples = []
    for (place, text, numbers), (start, end), (changed, escaped) in zip(
        meta["rows"], ends, flags, strict=True
    ):
        row = Row(place, tuple([messages[number] for number in numbers]), text)
        encoded = Encoded(place, ids[start:end], labels[start:end], bool(changed), bool(escaped))
        examples.append(Example(row, encoded))
    first, second, _ = np.cumsum(meta["counts"]).tolist()
    return Prepared(
        examples[:first],
        examples[first:second],
        examples[second:],
        meta["ledger"],
        meta["formats"],
        arrays["full_lengths"].tolist(),
    )
