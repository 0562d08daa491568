"""Owns the shape of a micro-batch: the lengths of its rows, their shared prefix, its labelled tokens."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from halfbyte.data.prefix_tree import (
    Layout,
    Node,
    Tokens,
    common_prefix,
    ids_before_last_label,
    shared_prefix_nodes,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class StepShape:
    """Describes a micro-batch of rows.

    Attributes:
        lengths: tokens of each row, the longest first.
        shared: tokens of the prefix of all rows, which is computed once.
        num_labels: labelled tokens of all rows together.
        checkpointing: whether activations are recomputed.
        accumulates: whether gradients of an earlier micro-batch already exist.
        nodes: the prefix tree of real rows, which may share more than their common prefix.
        recompute: with ``checkpointing``, the number of first layers to recompute; None: all.
    """

    lengths: tuple[int, ...]
    shared: int
    num_labels: int
    checkpointing: bool
    accumulates: bool
    nodes: tuple[Node, ...] | None = None
    recompute: int | None = None

    def with_layout(self, layout: Layout) -> StepShape:
        """Return this shape with real rows in it."""
        nodes = None if layout.padded else layout.nodes
        return replace(self, num_labels=len(layout.targets), nodes=nodes)

    def alone(self) -> StepShape:
        """Return this micro-batch as the only one of its step."""
        return replace(self, accumulates=False)


@dataclass(frozen=True)
class Lengths:
    """Holds the lengths of the longest rows.

    No micro-batch takes more memory than that of the longest rows together.

    Attributes:
        rows: tokens and labelled tokens of each row, the longest first.
        shared: tokens of the prefix of all rows.
    """

    rows: tuple[tuple[int, int], ...]
    shared: int = 0

    @classmethod
    def of(cls, rows: Sequence[Tokens]) -> Lengths:
        """Measure real rows."""
        sizes = [(len(ids), sum(label >= 0 for label in labels[1:])) for ids, labels in rows]
        return cls(
            tuple(sorted(sizes, reverse=True)),
            common_prefix(map(ids_before_last_label, rows)),
        )

    @classmethod
    def all_of(cls, length: int, num_rows: int) -> Lengths:
        """Assume rows of the full length, labelled throughout, where the data is not known."""
        return cls(tuple((length, length - 1) for _ in range(num_rows)))

    @classmethod
    def up_to(cls, length: int, num_rows: int, config: PretrainedConfig) -> Lengths:
        """Do as ``all_of``, but limit the length to the model's positions, with a warning."""
        longest = getattr(config.get_text_config(), "max_position_embeddings", None) or length
        if length > longest:
            print(
                f"warning: data.max_length is {length}, but the model has {longest} positions;"
                f" planning with {longest}",
                file=sys.stderr,
            )
        return cls.all_of(min(length, longest), num_rows)

    def tokens(self, num_rows: int, *, share: bool) -> int:
        """Count the tokens that a pass over this many of the longest rows computes."""
        nodes = shared_prefix_nodes(
            [tokens for tokens, _ in self.rows[:num_rows]], self.shared if share else 0
        )
        return nodes[-1].end

    def at_most(self, length: int) -> Lengths:
        """Return the same rows, cut to at most this length."""
        rows = tuple((min(tokens, length), min(n, length - 1)) for tokens, n in self.rows)
        return Lengths(rows, min(self.shared, length))

    def shape(
        self, num_rows: int, *, checkpointing: bool, accumulates: bool, share: bool
    ) -> StepShape:
        """Return the shape of the largest micro-batch with this many rows."""
        rows = self.rows[:num_rows]  # may be fewer than a micro-batch allows
        return StepShape(
            tuple(tokens for tokens, _ in rows),
            self.shared if share else 0,
            max(1, sum(n for _, n in rows)),
            checkpointing,
            accumulates,
        )
