"""Owns prepared rows: ids and labels with their ledger, and the few arrays that the cache keeps them as."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

from halfbyte.config.dataset import Data
from halfbyte.data.conversation import Message, Row, message_from_json
from halfbyte.data.encoded import IGNORED, Encoded
from halfbyte.data.ledger import Ledger

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Example:
    """A sample of a row: its ids and labels.

    Attributes:
        row: the conversation or text; a row's samples share it.
        encoded: ids and labels.
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


def empty_shares(prepared: Prepared, data: Data) -> list[str]:
    """Return a line for each share of rows to be held out that holds out none."""
    return [
        f"data.{name}_frac {share:g} of {sum(prepared.ledger.rows_in.values())} rows holds out none; raise"
        " it, or name rows of their own with data.test"
        for name, share in (("validation", data.validation_frac), ("test", data.test_frac))
        if share > 0 and not getattr(prepared, name)
    ]


def tokens_of(examples: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
    """Return the ids and labels of each sample."""
    return [(example.encoded.ids, example.encoded.labels) for example in examples]


def weights_of(examples: Sequence[Example]) -> list[float] | None:
    """Return the weight of each sample's row; None if all are 1."""
    weights = [example.row.weight for example in examples]
    return None if all(weight == 1 for weight in weights) else weights


def rows_of(examples: Sequence[Example]) -> list[Row]:
    """Return the rows of samples, each once."""
    return list({id(example.row): example.row for example in examples}.values())


PARTS = ("train", "validation", "test")


def pack(prepared: Prepared) -> dict[str, NDArray[Any]]:
    """Turn prepared rows into a few arrays, from which ``unpack`` restores equal rows."""
    import numpy as np

    examples = [example for part in PARTS for example in getattr(prepared, part)]
    distinct = rows_of(examples)
    numbers = {id(row): number for number, row in enumerate(distinct)}
    messages: dict[Message, int] = {}
    rows = [
        [row.place, row.text, [messages.setdefault(m, len(messages)) for m in row.messages]]
        + ([row.tools, row.weight] if row.tools or row.weight != 1 else [])
        for row in distinct
    ]
    meta = {
        "counts": [len(getattr(prepared, part)) for part in PARTS],
        "ledger": prepared.ledger.as_json(),
        "formats": prepared.formats,
        "messages": [
            [message.role, message.content]
            if message.is_plain and message.learnt
            else message.as_json()
            for message in messages
        ],
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
        "rows": np.array([numbers[id(e.row)] for e in examples], dtype=np.int64),
        "changed": np.array([e.changed for e in encoded], dtype=np.uint8),
        "escaped": np.array([e.escaped for e in encoded], dtype=np.uint8),
        "full_lengths": np.array(prepared.full_lengths, dtype=np.int64),
    }


def unpack(arrays: dict[str, NDArray[Any]]) -> Prepared:
    """Restore the prepared rows that ``pack`` was given."""
    import numpy as np

    meta = json.loads(arrays["meta"].tobytes())
    messages = [
        Message(*message) if isinstance(message, list) else message_from_json(message)
        for message in meta["messages"]
    ]
    rows = [
        Row(place, tuple([messages[number] for number in numbers]), text, *rest)
        for place, text, numbers, *rest in meta["rows"]
    ]
    learnt = np.unpackbits(arrays["learnt"], count=len(arrays["ids"])).astype(bool)
    # One int object for each id of the vocabulary: Python would make a new one for each id above 256.
    ids = np.arange(int(arrays["ids"].max(initial=0)) + 1).astype(object)[arrays["ids"]]
    labels = np.where(learnt, ids, IGNORED).tolist()
    ids = ids.tolist()
    ends = pairwise([0, *np.cumsum(arrays["lengths"]).tolist()])
    flags = zip(arrays["changed"].astype(bool), arrays["escaped"].astype(bool), strict=True)
    examples = []
    for number, (start, end), (changed, escaped) in zip(
        arrays["rows"].tolist(), ends, flags, strict=True
    ):
        row = rows[number]
        encoded = Encoded(
            row.place, ids[start:end], labels[start:end], bool(changed), bool(escaped)
        )
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
