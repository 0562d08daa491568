"""Owns attention over a prefix tree: exact, without padding, without a mask where order is enough.

A token sees its own node up to itself, and all of the nodes above it. Attention over a union of keys is
put together from attention over each part by the logarithm of its softmax sum (FlashAttention, arXiv
2205.14135 §3.1), so that each node's keys are read where they lie and no key is copied for each row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from halfbyte.data.prefix_tree import Node

NAME = "halfbyte"  # of this attention in transformers
# Nodes of one call on an accelerator are padded to the longest; the shortest is at least this share of it.
MIN_FILL_FRAC = 0.8


@dataclass(frozen=True)
class Part:
    """Queries and keys that meet: half-open ranges of the pass, and where needed who sees whom."""

    queries: slice
    keys: slice
    is_causal: bool
    mask: torch.Tensor | None = None


class PrefixTree:
    """The nodes of one pass on a device, and what attention over them needs, made once for a pass.

    ``gathered``: keys are copied together for each node, as accelerators want it.
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
        """Sliding windows that were asked for."""
        return {*self._parts, *self._batches}

    def parts(self, window: int | None) -> tuple[list[Part], list[Part]]:
        """Queries with their own node, each query once, and those of descendants with nodes above.

        ``window``: a token sees itself and the ``window - 1`` tokens before it in its row.
        """
        if window not in self._parts:
            own = [part for node in self.nodes for part in self._own(node, window)]
            above = [part for node in self.nodes for part in self._descendants(node, window)]
            self._parts[window] = own, above
        return self._parts[window]

    def _own(self, node: Node, window: int | None) -> list[Part]:
        first = slice(node.start, min(node.end, node.start + (window or node.length)))
        parts = [Part(first, first, is_causal=True)]
        for start in range(first.stop, node.end, window or node.length):
            assert window is not None
            end, ahead = min(start + window, node.end), window - 1
            mask = self._mask(window, ahead + window, ahead, window)
            mask = mask[: end - start, : ahead + end - start]
            parts.append(Part(slice(start, end), slice(start - ahead, end), False, mask))
        return parts

    def _descendants(self, node: Node, window: int | None) -> list[Part]:
        if node.below == node.end:
            return []
        keys = slice(node.start, node.end)
        inside = [n for n in self.nodes if node.end <= n.start < node.below]
        farthest = max(n.position + n.length for n in inside) - node.position
        if window is None or farthest <= window:
            return [Part(slice(node.end, node.below), keys, is_causal=False)]
        parts = []
        for other in inside:
            ahead = other.position - node.position
            seen = node.length - 1 + window - ahead  # so many tokens from there on see its last one
            if seen <= 0:
                continue
            hidden = max(0, ahead - window + 1)  # what even the first of them does not see
            mask = self._mask(seen, node.length - hidden, ahead - hidden, window)
            queries = slice(other.start, min(other.start + seen, other.end))
            keys = slice(node.start + hidden, node.end)
            mask = mask[: queries.stop - queries.start]
            parts.append(Part(queries, keys, is_causal=False, mask=mask))
        return parts

    def _mask(self, queries: int, keys: int, ahead: int, window: int) -> torch.Tensor:
        """Who is seen; ``ahead``: position of the first query less that of the first key."""
        known = (queries, keys, ahead, window)
        if known not in self._masks:
            far = torch.arange(queries, device=self.device)[:, None] + ahead
            far = far - torch.arange(keys, device=self.device)
            mask = torch.zeros(far.shape, device=self.device)
            self._masks[known] = mask.masked_fill_((far < 0) | (far >= window), float("-inf"))
        return self._masks[known]

    def batches(self, window: int | None) -> tuple[list[NodeBatch], torch.Tensor]:
        """Nodes of similar length as padded batches, each with the keys of its path.

        And for each token of the pass its place among all queries of the batches.
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
            made = [self._batch(group, window) for group in groups]
            places = torch.cat([batch.places for batch in made])
            inverse = torch.empty_like(places)
            inverse[places] = torch.arange(len(places), device=self.device)
            self._batches[window] = made, inverse
        return self._batches[window]

    def _path_length(self, number: int) -> int:
        node = self.nodes[number]
        return node.position + node.length

    def _path(self, number: int) -> list[int]:
        """Places of a node's tokens and of all above it, in reading order."""
        if number < 0:
            return []
        node = self.nodes[number]
        return self._path(node.parent) + list(range(node.start, node.end))

    def _batch(self, group: list[int], window: int | None) -> NodeBatch:
        nodes = [self.nodes[number] for number in group]
        paths = [self._path(number) for number in group]
        num_queries, num_keys = max(n.length for n in nodes), max(map(len, paths))
        queries: list[list[int]] = []
        keys: list[list[int]] = []
        places: list[int] = []
        picked: list[int] = []
        for i, (node, path) in enumerate(zip(nodes, paths, strict=True)):
            own = range(node.start, node.end)
            queries.append([*own, *[0] * (num_queries - node.length)])
            keys.append(path + [0] * (num_keys - len(path)))
            places += own
            picked += range(i * num_queries, i * num_queries + node.length)
        # Padding stands on the right, where no real query looks.
        is_causal = all(n.parent < 0 for n in nodes) and (window is None or num_keys <= window)
        mask = None
        if not is_causal:
            first, length = self._tensor([[n.position, n.length] for n in nodes])[
                ..., None, None
            ].unbind(1)
            query = torch.arange(num_queries, device=self.device)[:, None]
            far = first + query - torch.arange(num_keys, device=self.device)
            seen = far >= 0 if window is None else (far >= 0) & (far < window)
            # A padded query may have left the window of all keys; what it sees does not matter.
            mask = (seen | (query >= length))[:, None]
        made = [self._tensor(numbers) for numbers in (queries, keys, places, picked)]
        return NodeBatch(made[0], made[1], made[2], made[3], mask)

    def _tensor(self, numbers: Any) -> torch.Tensor:
        return torch.tensor(numbers, device=self.device)


@dataclass(frozen=True)
class NodeBatch:
    """B nodes, padded to Q queries and K keys.

    Attributes:
        queries: (B, Q), their places in the pass.
        keys: (B, K), those of the keys.
        places: (N,), the places of all that are no padding.
        picked: (N,), their numbers among the B·Q queries.
        mask: (B, 1, Q, K), who is seen; None where each query sees the keys up to its own number.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    places: torch.Tensor
    picked: torch.Tensor
    mask: torch.Tensor | None


class TreeAttention(torch.autograd.Function):
    """Attention over the parts of a tree on the CPU, with PyTorch's own flash kernel for each part."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        parts: tuple[list[Part], list[Part]],
        scale: float,
    ) -> torch.Tensor:
        """Attended values (T, H, D).

        Args:
            ctx: autograd's context.
            query: (H, T, D).
            key: (G, T, D), H a multiple of G; neighbouring heads share keys.
            value: (G, T, D).
            parts: of ``PrefixTree.parts``.
            scale: factor of the scores.
        """
        heads, tokens, size = query.shape
        groups = key.shape[0]
        q, k, v = _grouped(query, key, value)
        out = query.new_empty((tokens, heads, size))
        attended = out.view(tokens, groups, -1, size).permute(1, 2, 0, 3)
        sums = query.new_empty((groups, heads // groups, tokens), dtype=torch.float32)
        for part in parts[0]:
            rows, cols = part.queries, part.keys
            attended[:, :, rows], sums[:, :, rows] = _flash(
                q[:, :, rows], k[:, :, cols], v[:, :, cols], part, scale
            )
        for part in parts[1]:
            rows, cols = part.queries, part.keys
            found, logsum = _flash(q[:, :, rows], k[:, :, cols], v[:, :, cols], part, scale)
            before = sums[:, :, rows]
            both = torch.logaddexp(before, logsum)
            old, new = (before - both).exp_()[..., None], (logsum - both).exp_()[..., None]
            attended[:, :, rows] = attended[:, :, rows] * old + found * new
            sums[:, :, rows] = both
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        """Gradients of query, key and value; each part's softmax is taken from the sums over all."""
        query, key, value, out, sums = ctx.saved_tensors
        heads, tokens, size = query.shape
        groups = key.shape[0]
        q, k, v = _grouped(query, key, value)
        split = (tokens, groups, -1, size)
        attended = out.view(split).permute(1, 2, 0, 3)
        gradient = gradients[0].reshape(split).permute(1, 2, 0, 3)
        made = [torch.zeros((tokens, n, size), dtype=query.dtype) for n in (heads, groups, groups)]
        dq = made[0].view(split).permute(1, 2, 0, 3)
        dk, dv = (tensor.permute(1, 0, 2) for tensor in made[1:])
        for part in (*ctx.parts[0], *ctx.parts[1]):
            rows, cols = part.queries, part.keys
            for_q, for_k, for_v = (
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    gradient[:, :, rows],
                    q[:, :, rows],
                    k[:, :, cols],
                    v[:, :, cols],
                    attended[:, :, rows],
                    sums[:, :, rows],
                    0.0,
                    part.is_causal,
                    attn_mask=None if part.mask is None else part.mask.to(q.dtype),
                    scale=ctx.scale,
                )
            )
            dq[:, :, rows] += for_q
            dk[:, cols] += for_k.sum(1)
            dv[:, cols] += for_v.sum(1)
        return made[0].transpose(0, 1), dk, dv, None, None


def _grouped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (G, H/G, T, D), keys and values expanded to them without a copy."""
    q = query.view(key.shape[0], -1, *query.shape[1:])
    shape = (-1, q.shape[1], -1, -1)
    return q, key[:, None].expand(shape), value[:, None].expand(shape)


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, part: Part, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    found: tuple[torch.Tensor, torch.Tensor] = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query,
            key,
            value,
            0.0,
            part.is_causal,
            attn_mask=None if part.mask is None else part.mask.to(query.dtype),
            scale=scale,
        )
    )
    return found


def gathered_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tree: PrefixTree,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """As ``TreeAttention``, from padded batches of PyTorch's attention; for any device.

    Keys and values are copied to each node that sees them, and to each head: grouped heads would go
    to plain mathematics where no kernel takes them (transformers issue 48633).
    """
    batches, inverse = tree.batches(window)
    repeats = query.shape[0] // key.shape[0]
    q, k, v = (tensor.transpose(0, 1) for tensor in (query, key, value))
    found = []
    for batch in batches:
        keys, values = (
            tensor[batch.keys].repeat_interleave(repeats, dim=2).transpose(1, 2)
            for tensor in (k, v)
        )
        attended = functional.scaled_dot_product_attention(
            q[batch.queries].transpose(1, 2),
            keys,
            values,
            attn_mask=batch.mask,
            is_causal=batch.mask is None,
            scale=scale,
        )
        found.append(attended.transpose(1, 2).flatten(0, 1).index_select(0, batch.picked))
    return torch.cat(found)[inverse]


def tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tree: PrefixTree,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """Attended values (T, H, D) of queries (H, T, D) over keys and values (G, T, D)."""
    # Rotated in fp32 where the residual stream is.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if tree.gathered:
        return gathered_attention(query, key, value, tree, window, scale)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    out: torch.Tensor = TreeAttention.apply(query, key, value, tree.parts(window), factor)  # type: ignore[no-untyped-call]
    return out


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    tree: PrefixTree | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' call of an attention: SDPA, and over a ``tree`` ours."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if tree is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
    window = options.get("sliding_window")
    return tree_attention(query[0], key[0], value[0], tree, window, scaling)[None], None


def register() -> None:
    """Teach transformers the attention ``halfbyte``."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
