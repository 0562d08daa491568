"""Owns the numbers of a pass as one tensor, so that one copy takes them to the device.

It is made where rows are collated, pinned by the loader, and copied while the step before computes. Counts
are floats, and stand in it as their bits.

Shapes: T tokens of the pass, N predictions, S sources; B nodes, K keys of all nodes' paths.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from halfbyte.data.prefix_tree import Layout, Node


@dataclass(frozen=True)
class PackedLayout:
    """A layout whose numbers lie in one tensor.

    Attributes:
        layout: what the numbers are of, on the host.
        numbers: int32, all parts one after another.
        parts: where each part begins and ends.
        longest: most queries and most keys of a node.
        num_groups: S, 0 where rows are counted together.
    """

    layout: Layout
    numbers: torch.Tensor
    parts: dict[str, slice]
    longest: tuple[int, int]
    num_groups: int

    @classmethod
    def of(cls, layout: Layout, *, varlen: bool = False, num_groups: int = 0) -> PackedLayout:
        """Pack a layout.

        Args:
            layout: of a tree of rows.
            varlen: with what ``VarlenTree`` needs.
            num_groups: with the counts of each source.
        """
        counts: Any = layout.counts_of_groups(num_groups) if num_groups else layout.counts
        columns: dict[str, Any] = {
            "ids": layout.ids,
            "positions": layout.positions,
            "sources": layout.sources,
            "targets": layout.targets,
            "counts": np.asarray(layout.counts, dtype=np.float32).view(np.int32),
        }
        if num_groups:
            columns["shares"] = np.asarray(counts, dtype=np.float32).ravel().view(np.int32)
        longest = (0, 0)
        if varlen:
            columns |= varlen_columns(layout.nodes)
            longest = longest_of(layout.nodes)
        arrays = [np.asarray(column, dtype=np.int32) for column in columns.values()]
        ends = list(itertools.accumulate(map(len, arrays), initial=0))
        parts = dict(zip(columns, itertools.starmap(slice, itertools.pairwise(ends)), strict=True))
        return cls(layout, torch.from_numpy(np.concatenate(arrays)), parts, longest, num_groups)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a part, (T,), (N,), … in int32; ``counts`` (N,) and ``shares`` (S, N) in fp32."""
        part = self.numbers[self.parts[name]]
        if name == "counts":
            return part.view(torch.float32)
        if name == "shares":
            return part.view(torch.float32).view(self.num_groups, -1)
        return part

    def __contains__(self, name: str) -> bool:
        """Whether there is such a part."""
        return name in self.parts

    def pin_memory(self) -> PackedLayout:
        """Return it in pinned memory, from which copies do not wait; the loader calls this."""
        return replace(self, numbers=self.numbers.pin_memory())

    def to(self, device: Any, *, non_blocking: bool = False, **_: Any) -> PackedLayout:
        """Return it on a device; accelerate calls this."""
        return replace(self, numbers=self.numbers.to(device, non_blocking=non_blocking))


def longest_of(nodes: Sequence[Node]) -> tuple[int, int]:
    """Return the most queries of a node, and the most keys of its path."""
    return (
        max((node.length for node in nodes), default=0),
        max((node.position + node.length for node in nodes), default=0),
    )


def varlen_columns(nodes: Sequence[Node]) -> dict[str, Any]:
    """Return the numbers of attention whose queries are nodes and whose keys are their paths.

    ``query_starts`` and ``key_starts`` (B + 1,); and where a node has a parent, ``key_rows`` (K,): the tokens
    of all paths, ``copy_starts`` (T + 1,) and ``copy_places`` (K,): for each token, where it stands in them.
    """
    query_starts = np.asarray([0, *(node.end for node in nodes)])
    key_lengths = [node.position + node.length for node in nodes]
    key_starts = np.cumsum([0, *key_lengths])
    if all(node.parent < 0 for node in nodes):
        return {"query_starts": query_starts, "key_starts": key_starts}
    paths: list[Any] = []
    for node in nodes:
        own = np.arange(node.start, node.end)
        paths.append(own if node.parent < 0 else np.concatenate([paths[node.parent], own]))
    key_rows = np.concatenate(paths)  # (K,)
    copies = np.bincount(key_rows, minlength=int(query_starts[-1]))  # (T,)
    return {
        "query_starts": query_starts,
        "key_starts": key_starts,
        "key_rows": key_rows,
        "copy_starts": np.cumsum([0, *copies]),
        "copy_places": np.argsort(key_rows, kind="stable"),
    }
