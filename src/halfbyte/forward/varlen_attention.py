"""Owns attention over a prefix tree in one call: the queries are its nodes, the keys of each its path.

A token attends to the tokens of its path up to itself. Where nothing is shared the keys are the pass's own;
where nodes have a parent, their paths are gathered, and the gradients of copies are added up in the order of
the pass, without atomic additions.

Shapes: T tokens of the pass, K keys of all paths, H query heads, G key-value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from halfbyte.forward.packed_layout import PackedLayout
from halfbyte.kernels.operators import operator
from halfbyte.kernels.varlen import HEAD_STEP


@dataclass(frozen=True)
class VarlenTree:
    """A prefix tree on a device, as ``packed_layout.varlen_columns`` describes it.

    Attributes:
        query_starts: (B + 1,), int32.
        key_starts: (B + 1,), int32.
        longest: most queries and most keys of a node.
        copies: ``key_rows`` (K,), ``copy_starts`` (T + 1,) and ``copy_places`` (K,), int32; None where
            nothing is shared.
        windows: sliding windows that attention was computed with; None stands for full attention.
    """

    query_starts: torch.Tensor
    key_starts: torch.Tensor
    longest: tuple[int, int]
    copies: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    windows: set[int | None] = field(default_factory=set)

    @classmethod
    def of(cls, packed: PackedLayout) -> VarlenTree:
        """Return the tree of a packed layout, on its device."""
        copies = None
        if "key_rows" in packed:
            copies = packed["key_rows"], packed["copy_starts"], packed["copy_places"]
        return cls(packed["query_starts"], packed["key_starts"], packed.longest, copies)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
        scale: float,
    ) -> torch.Tensor:
        """Compute the attention output (T, H, D) of queries (H, T, D) over keys and values (G, T, D)."""
        q, k, v = (tensor.transpose(0, 1) for tensor in (query, key, value))
        return self.attend_rows(q, k, v, window, scale)  # (T, H, D), (T, G, D) ×2

    def attend_rows(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
        scale: float,
    ) -> torch.Tensor:
        """Compute the attention output (T, H, D) of queries (T, H, D) over keys and values (T, G, D)."""
        self.windows.add(window)
        head_size = query.shape[-1]
        missing = -head_size % HEAD_STEP
        if missing:  # zeros change neither a score nor an output
            query, key, value = (functional.pad(one, (0, missing)) for one in (query, key, value))
        out: torch.Tensor = VarlenAttention.apply(  # type: ignore[no-untyped-call]
            query, key, value, self, window or 0, scale
        )
        return out[..., :head_size] if missing else out

    def of_paths(self, rows: torch.Tensor) -> torch.Tensor:
        """Return keys or values (K, G, D) of all paths, from those of the pass (T, G, D)."""
        return rows if self.copies is None else rows.index_select(0, self.copies[0])

    def of_pass(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return gradients (T, G, D) of the pass's keys or values, from those of all paths (K, G, D)."""
        if self.copies is None:
            return gradient
        _, starts, places = self.copies
        total: torch.Tensor = operator("sum_copies", gradient.device)(
            gradient.flatten(1), starts, places
        )
        return total.view(-1, *gradient.shape[1:])


class VarlenAttention(torch.autograd.Function):
    """Attention over the tree, and its gradients, by one operator each."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        tree: VarlenTree,
        window: int,
        scale: float,
    ) -> torch.Tensor:
        """Compute the attention output (T, H, D); see ``VarlenTree.attend_rows``."""
        output: torch.Tensor
        output, *rest = operator("varlen", query.device)(
            query,
            tree.of_paths(key),
            tree.of_paths(value),
            tree.query_starts,
            tree.key_starts,
            tree.longest,
            window,
            scale,
        )
        ctx.save_for_backward(query, key, value, output, *rest)
        ctx.tree, ctx.window, ctx.scale = tree, window, scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        """Compute the gradients of query, key and value; the paths' keys are gathered again."""
        query, key, value, *results = ctx.saved_tensors
        tree: VarlenTree = ctx.tree
        dq, dk, dv = operator("varlen_backward", query.device)(
            gradients[0].contiguous(),
            query,
            tree.of_paths(key),
            tree.of_paths(value),
            results,
            tree.query_starts,
            tree.key_starts,
            tree.longest,
            ctx.window,
            ctx.scale,
        )
        return dq, tree.of_pass(dk), tree.of_pass(dv), None, None, None
