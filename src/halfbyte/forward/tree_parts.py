"""Owns which tokens of a prefix tree attend to which: parts of the pass, or padded batches of its nodes.

A token attends to the tokens of its node up to itself and to all tokens of the node's ancestors, or to the
last ``window`` of these with itself.

Shapes: T tokens of the pass; in padded batches B nodes of Q queries and K keys, and N queries that are no
padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.data.prefix_tree import Node

# Nodes of one call on an accelerator are padded to the longest; the shortest is at least this share of it.
MIN_FILL_FRAC = 0.8


@dataclass(frozen=True)
class Part:
    """Queries and the keys they attend to, as ranges of the pass.

    Attributes:
        queries: of the pass.
        keys: of the pass.
        is_causal: whether query number n attends to keys 0 … n; else each query attends to all keys.
        mask: additive (queries, keys), where neither holds.
    """

    queries: slice
    keys: slice
    is_causal: bool
    mask: torch.Tensor | None = None


class PrefixTree:
    """The nodes of one pass on a device, and what attention over them needs, built once for all layers.

    Args:
        nodes: the tree, each node before its descendants.
        device: where the pass is computed.
        gathered: copy the keys of each node's path together, as accelerators want it; default: not on a CPU.
    """

    def __init__(
        self, nodes: tuple[Node, ...], device: torch.device, *, gathered: bool | None = None
    ) -> None:
        self.nodes, self.device = nodes, device
        self.gathered = device.type != "cpu" if gathered is None else gathered
        self._masks: dict[tuple[int, ...], torch.Tensor] = {}
        self._parts: dict[int | None, tuple[list[Part], list[Part]]] = {}
        self._batches: dict[int | None, tuple[list[NodeBatch], torch.Tensor]] = {}

    @property
    def windows(self) -> set[int | None]:
        """Sliding windows that attention was computed with; None stands for full attention."""
        return {*self._parts, *self._batches}

    def parts(self, window: int | None) -> tuple[list[Part], list[Part]]:
        """Return the parts within nodes, each query once, and those of descendants with their ancestors.

        Args:
            window: a token attends to itself and the ``window - 1`` tokens before it in its row.
        """
        if window not in self._parts:
            within = [part for node in self.nodes for part in self._within_node(node, window)]
            above = [part for node in self.nodes for part in self._from_descendants(node, window)]
            self._parts[window] = within, above
        return self._parts[window]

    def _within_node(self, node: Node, window: int | None) -> list[Part]:
        """Return the parts of a node's tokens with each other, in blocks of the window."""
        first = slice(node.start, min(node.end, node.start + (window or node.length)))
        parts = [Part(first, first, is_causal=True)]
        for start in range(first.stop, node.end, window or node.length):
            assert window is not None
            end, ahead = min(start + window, node.end), window - 1
            mask = self._mask(window, ahead + window, ahead, window)
            mask = mask[: end - start, : ahead + end - start]
            parts.append(Part(slice(start, end), slice(start - ahead, end), False, mask))
        return parts

    def _from_descendants(self, node: Node, window: int | None) -> list[Part]:
        """Return the parts of the queries of a node's descendants with the keys of the node."""
        if node.subtree_end == node.end:
            return []
        keys = slice(node.start, node.end)
        descendants = [n for n in self.nodes if node.end <= n.start < node.subtree_end]
        farthest = max(n.position + n.length for n in descendants) - node.position
        if window is None or farthest <= window:
            return [Part(slice(node.end, node.subtree_end), keys, is_causal=False)]
        parts = []
        for other in descendants:
            ahead = other.position - node.position
            # The first queries of the other node, as many as still attend to the last key of this one.
            num_queries = node.length - 1 + window - ahead
            if num_queries <= 0:
                continue
            # The first keys of this node, to which not even the first query attends.
            num_hidden = max(0, ahead - window + 1)
            mask = self._mask(num_queries, node.length - num_hidden, ahead - num_hidden, window)
            queries = slice(other.start, min(other.start + num_queries, other.end))
            keys = slice(node.start + num_hidden, node.end)
            mask = mask[: queries.stop - queries.start]
            parts.append(Part(queries, keys, is_causal=False, mask=mask))
        return parts

    def _mask(self, num_queries: int, num_keys: int, ahead: int, window: int) -> torch.Tensor:
        """Return an additive mask (queries, keys), 0 or -inf.

        Args:
            num_queries: its rows.
            num_keys: its columns.
            ahead: position of the first query minus that of the first key.
            window: of the attention.
        """
        key = (num_queries, num_keys, ahead, window)
        if key not in self._masks:
            positions = torch.arange(num_queries, device=self.device) + ahead  # (queries,)
            key_positions = torch.arange(num_keys, device=self.device)  # (keys,)
            distance = positions[:, None] - key_positions  # (queries, keys)
            mask = torch.zeros(distance.shape, device=self.device)
            is_hidden = (distance < 0) | (distance >= window)
            self._masks[key] = mask.masked_fill_(is_hidden, float("-inf"))
        return self._masks[key]

    def batches(self, window: int | None) -> tuple[list[NodeBatch], torch.Tensor]:
        """Return nodes of similar length as padded batches, each node with the keys of its path.

        And the inverse permutation (T,): for each token of the pass its index among the queries of all
        batches that are no padding.
        """
        if window not in self._batches:
            groups: list[list[int]] = []
            order = sorted(range(len(self.nodes)), key=lambda n: (self._path_length(n), n))
            for number in order:
                if groups:
                    shortest = self.nodes[groups[-1][0]].length
                    length = self.nodes[number].length
                    if min(shortest, length) >= MIN_FILL_FRAC * max(shortest, length):
                        groups[-1].append(number)
                        continue
                groups.append([number])
            batches = [self._batch(group, window) for group in groups]
            tokens = torch.cat([batch.tokens for batch in batches])  # (T,)
            inverse = torch.empty_like(tokens)
            inverse[tokens] = torch.arange(len(tokens), device=self.device)
            self._batches[window] = batches, inverse
        return self._batches[window]

    def _path_length(self, number: int) -> int:
        """Return the number of tokens of a node and of all its ancestors."""
        node = self.nodes[number]
        return node.position + node.length

    def _path(self, number: int) -> list[int]:
        """Return the indices of the tokens of a node and of all its ancestors, in reading order."""
        if number < 0:
            return []
        node = self.nodes[number]
        return self._path(node.parent) + list(range(node.start, node.end))

    def _batch(self, group: list[int], window: int | None) -> NodeBatch:
        """Return the nodes of a group as a batch. Padding stands on the right, where no real query looks."""
        nodes = [self.nodes[number] for number in group]
        paths = [self._path(number) for number in group]
        num_queries, num_keys = max(n.length for n in nodes), max(map(len, paths))
        queries: list[list[int]] = []
        keys: list[list[int]] = []
        tokens: list[int] = []
        rows: list[int] = []
        for i, (node, path) in enumerate(zip(nodes, paths, strict=True)):
            node_tokens = range(node.start, node.end)
            queries.append([*node_tokens, *[0] * (num_queries - node.length)])
            keys.append(path + [0] * (num_keys - len(path)))
            tokens += node_tokens
            rows += range(i * num_queries, i * num_queries + node.length)
        is_causal = all(n.parent < 0 for n in nodes) and (window is None or num_keys <= window)
        mask = None
        if not is_causal:
            pairs = self._tensor([[n.position, n.length] for n in nodes])  # (B, 2)
            position, length = pairs[..., None, None].unbind(1)  # (B, 1, 1) each
            query = torch.arange(num_queries, device=self.device)[:, None]  # (Q, 1)
            key = torch.arange(num_keys, device=self.device)  # (K,)
            distance = position + query - key  # (B, Q, K)
            seen = distance >= 0
            if window is not None:
                seen = seen & (distance < window)
            # A padded query may have left the window of all keys; what it attends to does not matter.
            mask = (seen | (query >= length))[:, None]  # (B, 1, Q, K)
        return NodeBatch(
            self._tensor(queries),
            self._tensor(keys),
            self._tensor(tokens),
            self._tensor(rows),
            mask,
        )

    def _tensor(self, numbers: Any) -> torch.Tensor:
        return torch.tensor(numbers, device=self.device)


@dataclass(frozen=True)
class NodeBatch:
    """B nodes, padded to Q queries and K keys.

    Attributes:
        queries: (B, Q), indices of the queries in the pass.
        keys: (B, K), indices of the keys in the pass.
        tokens: (N,), indices in the pass of the queries that are no padding.
        rows: (N,), indices of the same among the B·Q queries.
        mask: (B, 1, Q, K), True where a query attends to a key; None where each query attends to the keys up
            to its own index.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    tokens: torch.Tensor
    rows: torch.Tensor
    mask: torch.Tensor | None
