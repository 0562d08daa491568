"""Owns how the ledger is filled in: every row that was read appears in it once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from halfbyte.data.drops import Drops
from halfbyte.data.encoding import EncodedRows
from halfbyte.data.fields import Account
from halfbyte.data.ledger import MAX_PLACES, Ledger, NearDuplicate, PartTokens, SourceLedger
from halfbyte.data.raw import Table
from halfbyte.data.samples import Samples
from halfbyte.data.shares import Sources

HELD_OUT = ("validation", "test")


@dataclass(frozen=True)
class NearPairs:
    """Training and held-out rows that are nearly alike.

    Attributes:
        pairs: the most similar ones: numbers of a training and a held-out row, and their similarity.
        total: how many there are.
    """

    pairs: list[tuple[int, int, float]]
    total: int


def ledger_of(
    tables: list[Table],
    sources: Sources,
    samples: dict[str, Samples],
    encoded: EncodedRows,
    drops: Drops,
    account: Account,
    near: NearPairs,
    split_by: str,
) -> Ledger:
    """Account for every row that was read.

    Args:
        tables: what was read of each source.
        sources: the sources.
        samples: the samples of each part.
        encoded: what became of the rows.
        drops: the rows that were left out.
        account: what happened to keys and turns.
        near: training and held-out rows that are alike.
        split_by: as in ``Ledger``.
    """
    names = [source.name or "" for _, source in sources]
    by_source = {
        name: _source_ledger(number, table, samples, drops, source.weight)
        for number, (name, table, (_, source)) in enumerate(
            zip(names, tables, sources, strict=True)
        )
    }
    train = samples["train"].distinct_rows
    weights = np.array(samples["train"].file.row_weights)[train]
    held_out = {name: len(samples[name].distinct_rows) for name in HELD_OUT}
    num_rows = held_out | {"train": len(train)}
    ledger = Ledger(
        rows_in={name: table.num_rows for name, table in zip(names, tables, strict=True)},
        trained=len(train),
        held_out=held_out,
        dropped=drops.by_reason(),
        fingerprints={name: table.fingerprint for name, table in zip(names, tables, strict=True)},
        duplicate_prompts_in_training=_repeated(samples["train"], split_by),
        duplicate_prompts_held_out=sum(_repeated(samples[name], split_by) for name in HELD_OUT),
        tokens={name: _tokens(part) for name, part in samples.items()},
        dropped_places=drops.places,
        ignored=dict(account.ignored),
        repaired={name: count for name, count in account.repaired.items() if count},
        samples={name: len(part) for name, part in samples.items() if len(part) != num_rows[name]},
        dropped_samples=dict(drops.samples),
        weighted=int(np.count_nonzero(weights != 1)),
        split_by=split_by,
        sources=by_source if len(by_source) > len({part for part, _ in sources}) else {},
        **_places(samples, encoded, near),
    )
    assert ledger.adds_up, ledger
    return ledger


def _repeated(part: Samples, split_by: str) -> int:
    """Return how many rows of a part have the prompt of another of its rows."""
    prompts = np.array(part.file.row_digests)[part.distinct_rows]
    num_distinct = min(1, len(prompts)) if split_by == "answer" else len(np.unique(prompts))
    return len(prompts) - num_distinct


def _places(samples: dict[str, Samples], encoded: EncodedRows, near: NearPairs) -> dict[str, Any]:
    """Return the lists of the ledger that name the first rows of a kind, and how many there are."""
    rows = samples["train"].file.rows
    escaped = np.concatenate([_flagged(part, 2) for part in samples.values()])
    changed = _flagged(samples["train"], 1)
    return {
        "truncated": encoded.truncated,
        "changed_by_template": [rows[n].place for n in changed[:MAX_PLACES].tolist()],
        "special_token_text": [rows[n].place for n in escaped[:MAX_PLACES].tolist()],
        "near_duplicates": [
            NearDuplicate(train=rows[i].place, held_out=rows[j].place, jaccard=round(similarity, 3))
            for i, j, similarity in near.pairs
        ],
        "totals": {
            "truncated": encoded.num_truncated,
            "changed_by_template": len(changed),
            "special_token_text": len(escaped),
            "near_duplicates": near.total,
        },
    }


def _source_ledger(
    number: int, table: Table, samples: dict[str, Samples], drops: Drops, weight: float
) -> SourceLedger:
    own = {
        name: Samples(part.file, part.numbers[part.sources == number])
        for name, part in samples.items()
    }
    return SourceLedger(
        path=table.name,
        rows_in=table.num_rows,
        trained=len(own["train"].distinct_rows),
        held_out={name: len(own[name].distinct_rows) for name in HELD_OUT},
        dropped=drops.by_reason(number),
        weight=weight,
        samples=len(own["train"]),
        tokens={name: _tokens(part) for name, part in own.items()},
    )


def _tokens(samples: Samples) -> PartTokens:
    return PartTokens(
        total=int(samples.sizes.sum(dtype=np.int64)),
        supervised=int(samples.num_labels.sum(dtype=np.int64)),
    )


def _flagged(samples: Samples, flag: int) -> Any:
    """Return the numbers of the rows with a sample that has a flag, each once."""
    return np.unique(samples.row_numbers[(samples.flags & flag) > 0])
