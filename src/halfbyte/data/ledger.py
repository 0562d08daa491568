"""Owns the ledger: what became of every row that came in."""

from __future__ import annotations

from halfbyte.record import Field, Record, RecordPart

MAX_PLACES = 1000  # that a list names
NEAR_DUPLICATE = 0.9  # Jaccard similarity of prompts from which they are nearly alike


class NearDuplicate(RecordPart):
    """A training row whose prompt is nearly that of a held-out row.

    Attributes:
        train: place of the training row.
        held_out: place of the held-out row.
        jaccard: share of 5-character shingles that both have.
    """

    train: str
    held_out: str
    jaccard: float


class PartTokens(RecordPart):
    """Tokens of the rows of a part."""

    total: int
    supervised: int


class SourceLedger(RecordPart):
    """What became of the rows of one of several sources.

    Attributes:
        path: the source.
        rows_in: rows that were read.
        trained: rows that are trained on.
        held_out: rows of each part.
        dropped: rows by reason.
        weight: how often each of its rows is in an epoch.
        samples: its samples in an epoch.
        tokens: tokens of each part.
    """

    path: str
    rows_in: int
    trained: int
    held_out: dict[str, int]
    dropped: dict[str, int]
    weight: float
    samples: int
    tokens: dict[str, PartTokens]


class Ledger(Record):
    """``ledger.json``: rows in = trained + held out + dropped.

    Attributes:
        rows_in: of each source.
        held_out: rows of each part.
        dropped: rows by reason.
        fingerprints: of each source's rows; a resumed run must find the same.
        truncated: the first places of rows that were cut at ``max_length``.
        changed_by_template: the first places of rows whose text the template altered.
        special_token_text: the first places of rows whose text reads like a special token.
        near_duplicates: the most similar pairs.
        totals: for each of these lists, how many there are.
        dropped_places: the first places of the rows dropped for each reason.
        ignored: keys of rows and turns that are not used, with how often they occur.
        repaired: names of repairs, with how many rows they changed.
        samples: samples of each part, where a row became several: one for each answer whose context has
            no thoughts of earlier ones.
        dropped_samples: samples by reason, of rows whose other samples stay.
        weighted: number of training rows with a weight other than 1.
        split_by: what decides which rows are held out: the hash of their ``prompt``, or, where all have
            one prompt, of their prompt and ``answer``.
        sources: what became of the rows of each source, where there are several.
        files_sha256: digest of each file of held-out rows and examples, by name.
    """

    NEWEST = 2
    SEALED = True
    rows_in: dict[str, int]
    trained: int
    held_out: dict[str, int]
    dropped: dict[str, int]
    fingerprints: dict[str, str] = Field(default_factory=dict)
    truncated: list[str] = Field(default_factory=list)
    changed_by_template: list[str] = Field(default_factory=list)
    special_token_text: list[str] = Field(default_factory=list, alias="control_tokens_as_text")
    duplicate_prompts_in_training: int = 0
    duplicate_prompts_held_out: int = 0
    near_duplicates: list[NearDuplicate] = Field(default_factory=list)
    tokens: dict[str, PartTokens] = Field(default_factory=dict)
    dropped_places: dict[str, list[str]] = Field(default_factory=dict)
    ignored: dict[str, int] = Field(default_factory=dict)
    repaired: dict[str, int] = Field(default_factory=dict)
    samples: dict[str, int] = Field(default_factory=dict)
    dropped_samples: dict[str, int] = Field(default_factory=dict)
    weighted: int = 0
    split_by: str = "prompt"
    totals: dict[str, int] = Field(default_factory=dict)
    sources: dict[str, SourceLedger] = Field(default_factory=dict)
    files_sha256: dict[str, str] = Field(default_factory=dict)

    def total(self, name: str) -> int:
        """Return how many there are of what a list of places names the first of."""
        return self.totals.get(name, len(getattr(self, name)))

    @property
    def adds_up(self) -> bool:
        """Whether rows in = trained + held out + dropped; else halfbyte has a bug."""
        return _adds_up(sum(self.rows_in.values()), self) and all(
            _adds_up(source.rows_in, source) for source in self.sources.values()
        )


def _adds_up(rows_in: int, part: Ledger | SourceLedger) -> bool:
    return rows_in == part.trained + sum(part.held_out.values()) + sum(part.dropped.values())
