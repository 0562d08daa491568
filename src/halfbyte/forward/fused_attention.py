"""Owns an attention layer's forward over a tree: projections, one launch for norms and rotation, one attention.

Queries, keys and values keep the order in which the projections leave them, so that nothing is transposed or
copied between.

Shapes: T tokens of the pass, E hidden size, H query heads, G key-value heads, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfbyte.forward.fused_layers import recipe_of
from halfbyte.forward.fused_lora import LayerGroup, group_of
from halfbyte.forward.varlen_attention import VarlenTree
from halfbyte.kernels.operators import operator

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
PROBE_TOKENS = 6
TOLERANCE = 1e-4


class NormRope(torch.autograd.Function):
    """Norms and rotary embedding of queries and keys, by one operator each way."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        norms: HeadNorms,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the rotated queries (T, H, D) and keys (T, G, D)."""
        ctx.save_for_backward(query, key, cos, sin)
        ctx.norms = norms
        pair: tuple[torch.Tensor, torch.Tensor] = operator("norm_rope", query.device)(
            query, key, cos, sin, norms.query, norms.key, norms.eps
        )
        return pair

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        """Compute the gradients of queries and keys."""
        query, key, cos, sin = ctx.saved_tensors
        norms: HeadNorms = ctx.norms
        dq, dk = operator("norm_rope_backward", query.device)(
            *gradients, query, key, cos, sin, norms.query, norms.key, norms.eps
        )
        return dq, dk, None, None, None


@dataclass(frozen=True)
class HeadNorms:
    """The norms of heads: weights (D,) in fp32, or None where heads are not normed."""

    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    eps: float = 0.0


@dataclass(frozen=True)
class AttentionCall:
    """What an attention layer passes to its attention.

    Attributes:
        query: (T, H, D), normed and rotated.
        key: (T, G, D), the same.
        value: (T, G, D).
        window: of the attention.
        scale: factor of the scores.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    window: int | None
    scale: float

    def is_like(self, other: AttentionCall) -> bool:
        """Whether another call would compute the same."""
        pairs = ((self.query, other.query), (self.key, other.key), (self.value, other.value))
        return (self.window, self.scale) == (other.window, other.scale) and all(
            a.shape == b.shape
            and torch.allclose(a.float(), b.float(), rtol=TOLERANCE, atol=TOLERANCE)
            for a, b in pairs
        )


class Recorder:
    """Takes the place of a tree, and keeps what an attention layer passes to it."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
        scale: float,
    ) -> torch.Tensor:
        """Return values that depend on nothing but the shape (T, H, D) of queries (H, T, D)."""
        q, k, v = (tensor.transpose(0, 1) for tensor in (query, key, value))
        return self.attend_rows(q, k, v, window, scale)

    def attend_rows(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
        scale: float,
    ) -> torch.Tensor:
        """Do the same for queries (T, H, D)."""
        self.calls.append(AttentionCall(query, key, value, window, scale))
        return torch.ones_like(query, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class FusedAttention:
    """An attention layer's forward over a tree.

    Attributes:
        module: the layer.
        projections: those of queries, keys and values.
        norms: of its heads.
        window: as the layer passes it to its attention.
        scale: the same.
    """

    module: Any
    projections: LayerGroup
    norms: HeadNorms
    window: int | None
    scale: float

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        tree: VarlenTree | Recorder | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """Compute the layer (1, T, E); calls without a tree take the layer's own forward."""
        is_ours = isinstance(tree, VarlenTree | Recorder) and past_key_values is None
        if not is_ours or position_embeddings is None or not self.projections.adds_lora():
            return type(self.module).forward(  # type: ignore[no-any-return]
                self.module,
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                tree=tree,
                **options,
            )
        size = self.module.head_dim
        query, key, value = (
            rows.view(rows.shape[1], -1, size) for rows in self.projections.compute(hidden_states)
        )  # (T, H, D), (T, G, D) ×2
        cos, sin = (table[0] for table in position_embeddings)  # (T, D) each
        query, key = NormRope.apply(query, key, cos, sin, self.norms)  # type: ignore[no-untyped-call]
        assert tree is not None
        out = tree.attend_rows(query, key, value, self.window, self.scale)  # (T, H, D)
        projected: torch.Tensor = self.module.o_proj(out.flatten(1)[None])
        return projected, None


def fuse_attention(model: nn.Module, *, probe: bool) -> int:
    """Replace the forward of attention layers by that of ``FusedAttention``, in place.

    Args:
        model: with the attention of ``prefix_attention``, with ``FusedLora`` and ``RMSNorm``.
        probe: replace a layer only if it passes the same queries, keys, values, window and scale to its
            attention; a model without data has none to compare.

    Returns:
        how many layers were replaced.
    """
    number = 0
    module: Any
    for module in model.modules():
        candidate = _candidate(module)
        if candidate is not None and (not probe or (candidate := _proven(candidate)) is not None):
            module.forward = functools.partial(FusedAttention.forward, candidate)
            number += 1
    return number


def _candidate(module: Any) -> FusedAttention | None:
    """Return the fused form of a layer by its attributes, or None if it has not got them."""
    names = (*PROJECTIONS, "o_proj", "head_dim", "scaling")
    if not all(hasattr(module, name) for name in names):
        return None
    group = group_of([getattr(module, name) for name in PROJECTIONS])
    if group is None:
        return None
    norms = HeadNorms()
    if hasattr(module, "q_norm") or hasattr(module, "k_norm"):
        query, key = (recipe_of(getattr(module, name, None)) for name in ("q_norm", "k_norm"))
        if query is None or key is None or query.eps != key.eps:
            return None
        if query.weight.shape != (module.head_dim,) or key.weight.shape != query.weight.shape:
            return None
        norms = HeadNorms(query.weight, key.weight, query.eps)
    window = getattr(module, "sliding_window", None)
    return FusedAttention(module, group, norms, window, float(module.scaling))


@torch.no_grad()
def _proven(candidate: FusedAttention) -> FusedAttention | None:
    """Return the fused form with the window and scale of its layer, None if the layer does something else."""
    module, group = candidate.module, candidate.projections
    hidden_size = group.parameters[0].shape[1]
    probed = both_forwards(module, candidate.forward, hidden_size, module.head_dim)
    if probed is None or len(probed[1]) != 2:
        return None
    outs, calls = [out for out, _ in probed[0]], probed[1]
    theirs = calls[0]
    proven = FusedAttention(module, group, candidate.norms, theirs.window, theirs.scale)
    ours = AttentionCall(calls[1].query, calls[1].key, calls[1].value, theirs.window, theirs.scale)
    is_same = ours.is_like(theirs) and torch.allclose(
        outs[0], outs[1], rtol=TOLERANCE, atol=TOLERANCE
    )
    return proven if is_same else None


@torch.no_grad()
def both_forwards(
    module: Any, fused: Callable[..., Any], hidden_size: int, head_size: int
) -> tuple[list[Any], list[AttentionCall]] | None:
    """Return what a layer's own and its fused forward give for the same drawn states, and their attention calls.

    None if one of them cannot compute it.
    """
    device = next(module.parameters()).device
    hidden = torch.randn((1, PROBE_TOKENS, hidden_size), device=device)
    tables = torch.randn((2, 1, PROBE_TOKENS, head_size), device=device)
    recorder = Recorder()
    outs: list[Any] = []
    for forward in (functools.partial(type(module).forward, module), fused):
        try:
            out = forward(
                hidden_states=hidden,
                position_embeddings=(tables[0], tables[1]),
                attention_mask=None,
                tree=recorder,
            )
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            return None
        outs.append(out)
    return outs, recorder.calls
