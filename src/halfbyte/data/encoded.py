"""Owns ids and labels: a row as a model reads it, and its segments before they are tokenised."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from halfbyte.data.fields import RowError

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """One row as token ids; ``labels[t]`` is ``ids[t]`` where it is learnt and -100 elsewhere.

    Attributes:
        place: where the row comes from, such as ``file:line``.
        ids: token ids.
        labels: label of each token.
        changed: whether the template altered a message (such as by trimming its ends).
        escaped: whether a message held special-token text, which is plain text now.
    """

    place: str
    ids: list[int]
    labels: list[int]
    changed: bool = False
    escaped: bool = False

    @property
    def num_supervised(self) -> int:
        """Number of labelled tokens."""
        return len(self.labels) - self.labels.count(IGNORED)

    def fault(self, bos_id: int | None, stop_ids: list[int]) -> RowError | None:
        """Return what is wrong with the ids and labels, if anything is.

        Args:
            bos_id: the token with which every row begins, or None.
            stop_ids: tokens that end answers.
        """
        # Where BOS ends answers too, as GPT-2's does, later ones are right.
        if bos_id is not None and (
            self.ids[0] != bos_id
            or self.ids[1:2] == [bos_id]
            or (self.ids.count(bos_id) > 1 and bos_id not in stop_ids)
        ):
            return RowError(
                self.place,
                "BOS tokens",
                f"has {self.ids.count(bos_id)} BOS tokens; it needs exactly one, at the start",
            )
        if self.num_supervised == 0:
            return RowError(
                self.place, "nothing to learn", "no token has a label, so there is nothing to learn"
            )
        return None


@dataclass(frozen=True)
class SegmentedRow:
    """A sample of a row, split into numbered segments.

    Attributes:
        place: where the row comes from.
        parts: the segments' numbers in stretches, and whether each stretch is supervised.
        changed: as in ``Encoded``.
        escaped: as in ``Encoded``.
    """

    place: str
    parts: list[tuple[list[int], bool]]
    changed: bool = False
    escaped: bool = False

    def encode(self, segment_ids: list[list[int]], *, labels_all: bool) -> Encoded:
        """Return ids and labels, with the ids of each segment by its number.

        Args:
            segment_ids: ids of each segment.
            labels_all: whether every token has a label.
        """
        ids: list[int] = []
        labels: list[int] = []
        for numbers, supervised in self.parts:
            new = list(chain.from_iterable([segment_ids[number] for number in numbers]))
            ids += new
            labels += new if supervised or labels_all else [IGNORED] * len(new)
        labels[:1] = [IGNORED]
        return Encoded(self.place, ids, labels, changed=self.changed, escaped=self.escaped)
