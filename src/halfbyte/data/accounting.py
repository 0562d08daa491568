"""Owns how the ledger is filled in: every row that was read appears in it once."""

from __future__ import annotations

from collections import Counter

from halfbyte.data.conversation import Row
from halfbyte.data.drops import Drops
from halfbyte.data.encoding import EncodedParts
from halfbyte.data.fields import Account
from halfbyte.data.ledger import Ledger, NearDuplicate, PartTokens
from halfbyte.data.normal import normalised
from halfbyte.data.prepared import Example, rows_of
from halfbyte.data.raw import Table


def ledger_of(
    tables: dict[str, Table],
    parts: dict[str, list[Row]],
    encoded: EncodedParts,
    drops: Drops,
    account: Account,
    near: list[tuple[int, int, float]],
    split_by: str,
) -> Ledger:
    """Account for every row that was read.

    Args:
        tables: the sources.
        parts: the rows of each part, before they were encoded.
        encoded: the samples of each part.
        drops: the rows that were left out.
        account: what happened to keys and turns.
        near: pairs of a training and a held-out row that are alike, with their similarity.
        split_by: as in ``Ledger``.
    """
    held_out = parts["test"] + parts["validation"]
    rows = {name: rows_of(examples) for name, examples in encoded.examples.items()}
    samples = {name: len(examples) for name, examples in encoded.examples.items()}
    ledger = Ledger(
        rows_in={name: table.num_rows for name, table in tables.items()},
        trained=len(rows["train"]),
        held_out={name: len(rows[name]) for name in ("validation", "test")},
        dropped=dict(drops.counts),
        fingerprints={name: table.fingerprint for name, table in tables.items()},
        truncated=encoded.truncated,
        changed_by_template=_places(encoded.examples["train"], "changed"),
        control_tokens_as_text=[
            place
            for examples in encoded.examples.values()
            for place in _places(examples, "escaped")
        ],
        duplicate_prompts_in_training=_count_duplicates(rows["train"]),
        near_duplicates=[
            NearDuplicate(
                train=parts["train"][i].place,
                held_out=held_out[j].place,
                jaccard=round(similarity, 3),
            )
            for i, j, similarity in near
        ],
        tokens={name: _tokens(examples) for name, examples in encoded.examples.items()},
        dropped_places=drops.places,
        ignored=dict(account.ignored),
        repaired={name: count for name, count in account.repaired.items() if count},
        samples={name: count for name, count in samples.items() if count != len(rows[name])},
        dropped_samples=dict(drops.samples),
        weighted=sum(row.weight != 1 for row in rows["train"]),
        split_by=split_by,
    )
    assert ledger.adds_up, ledger
    return ledger


def _tokens(examples: list[Example]) -> PartTokens:
    return PartTokens(
        total=sum(len(e.encoded.ids) for e in examples),
        supervised=sum(e.encoded.num_supervised for e in examples),
    )


def _places(examples: list[Example], flag: str) -> list[str]:
    """Return the places of the rows with a sample of which ``flag`` is set, each once."""
    return list(dict.fromkeys(e.row.place for e in examples if getattr(e.encoded, flag)))


def _count_duplicates(rows: list[Row]) -> int:
    """Return how many rows repeat the prompt of an earlier one."""
    counts = Counter(normalised(row.prompt) for row in rows)
    return sum(count - 1 for count in counts.values())
