"""Owns the shape of a micro-batch: how long its rows are, what they share, how many tokens are labelled."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from halfbyte.data.prefix_tree import Layout, Node, Tokens, common_prefix, one_stem, read_part

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class StepShape:
    """One micro-batch of rows with ``lengths`` tokens, the longest first.

    ``shared``: tokens that all of them begin with and that are computed once. ``num_labels``: labelled
    tokens of all. ``checkpointing``: activations are recomputed, those of all layers or of the first
    ``recompute``. ``accumulates``: gradients of an earlier micro-batch are there already. ``nodes``: how
    real rows lie, which may share more than their common beginning.
    """

    lengths: tuple[int, ...]
    shared: int
    num_labels: int
    checkpointing: bool
    accumulates: bool
    nodes: tuple[Node, ...] | None = None
    recompute: int | None = None

    def of(self, layout: Layout) -> StepShape:
        """The same with real rows in it."""
        nodes = None if layout.padded else layout.nodes
        return replace(self, num_labels=len(layout.targets), nodes=nodes)

    def alone(self) -> StepShape:
        """The same micro-batch as the only one of its step."""
        return replace(self, accumulates=False)


@dataclass(frozen=True)
class Lengths:
    """The longest rows: tokens and labelled tokens of each, the longest first.

    A micro-batch never takes more than that of the longest rows together. ``shared``: tokens that all
    rows begin with.
    """

    rows: tuple[tuple[int, int], ...]
    shared: int = 0

    @classmethod
    def of(cls, rows: Sequence[Tokens]) -> Lengths:
        """Those of real rows."""
        sizes = [(len(ids), sum(label >= 0 for label in labels[1:])) for ids, labels in rows]
        return cls(
            tuple(sorted(sizes, reverse=True)), common_prefix([read_part(row) for row in rows])
        )

    @classmethod
    def all_of(cls, length: int, num_rows: int) -> Lengths:
        """As long as allowed and labelled throughout: where the data is not known."""
        return cls(tuple((length, length - 1) for _ in range(num_rows)))

    @classmethod
    def up_to(cls, length: int, num_rows: int, config: PretrainedConfig) -> Lengths:
        """As ``all_of``, within the positions that the model has; says so where that cuts."""
        longest = getattr(config.get_text_config(), "max_position_embeddings", None) or length
        if length > longest:
            print(
                f"warning: data.max_length is {length}, but the model has {longest} positions;"
                f" planned with {longest}",
                file=sys.stderr,
            )
        return cls.all_of(min(length, longest), num_rows)

    def tokens(self, num_rows: int, *, share: bool) -> int:
        """Tokens that a pass over so many of the longest rows computes."""
        nodes = one_stem(
            [tokens for tokens, _ in self.rows[:num_rows]], self.shared if share else 0
        )
        return nodes[-1].end

    def at_most(self, length: int) -> Lengths:
        """The same rows, none of them longer than this."""
        rows = tuple((min(tokens, length), min(n, length - 1)) for tokens, n in self.rows)
        return Lengths(rows, min(self.shared, length))

    def shape(
        self, num_rows: int, *, checkpointing: bool, accumulates: bool, share: bool
    ) -> StepShape:
        """The largest micro-batch of so many rows."""
        rows = self.rows[:num_rows]  # fewer than a micro-batch has: then one never has more
        return StepShape(
            tuple(tokens for tokens, _ in rows),
            self.shared if share else 0,
            max(1, sum(n for _, n in rows)),
            checkpointing,
            accumulates,
        )
