"""Owns prepared rows: ids and labels with their ledger, and the few arrays that the cache keeps them as."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

from halfbyte.data.ledger import Ledger
from halfbyte.data.render import IGNORED, Encoded
from halfbyte.data.rows import Message, Row

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Example:
    """A row with its ids and labels.

    Attributes:
        row: the conversation or text.
        encoded: its ids and labels.
    """

    row: Row
    encoded: Encoded


@dataclass
class Prepared:
    """Everything that a run is trained and measured on.

    Attributes:
        train: rows to train on.
        validation: rows held out for the loss during training.
        test: rows held out for the comparison.
        ledger: what happened to every row that was read; see ``Ledger``.
        formats: the format of each source.
        full_lengths: tokens of each training row before any row is dropped for its length or truncated.
    """

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    ledger: Ledger
    formats: dict[str, str] = field(default_factory=dict)
    full_lengths: list[int] = field(default_factory=list)


def tokens_of(examples: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
    """Return the ids and labels of each row."""
    return [(example.encoded.ids, example.encoded.labels) for example in examples]


PARTS = ("train", "validation", "test")


def pack(prepared: Prepared) -> dict[str, NDArray[Any]]:
    """Turn prepared rows into a few arrays, from which ``unpack`` restores equal rows."""
    import numpy as np

    examples = [example for part in PARTS for example in getattr(prepared, part)]
    messages: dict[Message, int] = {}
    rows = [
        [e.row.place, e.row.text, [messages.setdefault(m, len(messages)) for m in e.row.messages]]
        for e in examples
    ]
    meta = {
        "counts": [len(getattr(prepared, part)) for part in PARTS],
        "ledger": prepared.ledger.as_json(),
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
    """Restore the prepared rows that ``pack`` was given."""
    import numpy as np

    meta = json.loads(arrays["meta"].tobytes())
    messages = [Message(role, content) for role, content in meta["messages"]]
    learnt = np.unpackbits(arrays["learnt"], count=len(arrays["ids"])).astype(bool)
    # One int object for each id of the vocabulary: Python would make a new one for each id above 256.
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
        Ledger.model_validate(meta["ledger"]),
        meta["formats"],
        arrays["full_lengths"].tolist(),
    )
