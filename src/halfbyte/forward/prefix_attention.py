"""Owns attention over a prefix tree: exact, without padding, and without a mask where order alone decides.

A token attends to the tokens of its node up to itself and to all tokens of the node's ancestors. Attention
over a union of keys is combined from attention over each part, O₁ and O₂, by the log-sum-exp of the scores,
L₁ and L₂ (FlashAttention, arXiv 2205.14135 §3.1):

    L = log(exp L₁ + exp L₂),    O = exp(L₁ - L)·O₁ + exp(L₂ - L)·O₂

so that the keys of each node are read where they lie and none is copied for each row. In the backward pass
the probabilities of a part are exp(S - L) with its scores S and the L of all parts, and gradients add up over
the parts (the same, appendix B.4).

Shapes: T tokens of the pass, H query heads, G key-value heads (grouped-query attention, arXiv 2305.13245; G
divides H, and neighbouring heads share keys), D head size, i and j queries and keys of a part; in padded
batches B nodes of Q queries and K keys, and N queries that are no padding.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn import functional

from halfbyte.forward.tree_parts import Part, PrefixTree

NAME = "halfbyte"  # of this attention in transformers
# The CPU's backward kernel takes in bf16 five times as long as in fp32 for 70 queries, twice for 300, as long for 1500.
MOST_QUERIES_IN_32_BITS = 1024


class TreeAttention(torch.autograd.Function):
    """Attention over the parts of a tree on a CPU, with PyTorch's flash kernel for each part."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        parts: tuple[list[Part], list[Part]],
        scale: float,
    ) -> torch.Tensor:
        """Compute the attention output (T, H, D).

        Args:
            ctx: autograd's context.
            query: (H, T, D).
            key: (G, T, D).
            value: (G, T, D).
            parts: those of ``PrefixTree.parts``.
            scale: factor of the scores.
        """
        num_heads, num_tokens, head_size = query.shape
        num_groups = key.shape[0]
        q, k, v = _grouped(query, key, value)  # (G, H/G, T, D) each
        out = query.new_empty((num_tokens, num_heads, head_size))  # (T, H, D)
        o = out.view(num_tokens, num_groups, -1, head_size).permute(1, 2, 0, 3)  # (G, H/G, T, D)
        lse = query.new_empty(
            (num_groups, num_heads // num_groups, num_tokens), dtype=torch.float32
        )  # (G, H/G, T)
        within, above = parts
        for part in within:
            i, j = part.queries, part.keys
            o[:, :, i], lse[:, :, i] = flash(
                q[:, :, i], k[:, :, j], v[:, :, j], scale, part.mask, is_causal=part.is_causal
            )
        for part in above:
            i, j = part.queries, part.keys
            o2, lse2 = flash(
                q[:, :, i], k[:, :, j], v[:, :, j], scale, part.mask, is_causal=part.is_causal
            )
            lse1 = lse[:, :, i]  # (G, H/G, i)
            lse12 = torch.logaddexp(lse1, lse2)  # L = log(exp L₁ + exp L₂)
            w1 = (lse1 - lse12).exp_()[..., None]  # (G, H/G, i, 1)
            w2 = (lse2 - lse12).exp_()[..., None]  # (G, H/G, i, 1)
            o[:, :, i] = o[:, :, i] * w1 + o2 * w2  # O = exp(L₁ - L)·O₁ + exp(L₂ - L)·O₂
            lse[:, :, i] = lse12
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        """Compute the gradients of query, key and value; each part's softmax follows from the L of all."""
        query, key, value, out, lse = ctx.saved_tensors
        num_heads, num_tokens, head_size = query.shape
        num_groups = key.shape[0]
        q, k, v = _grouped(query, key, value)  # (G, H/G, T, D) each
        split = (num_tokens, num_groups, -1, head_size)
        o = out.view(split).permute(1, 2, 0, 3)  # (G, H/G, T, D)
        do = gradients[0].reshape(split).permute(1, 2, 0, 3)  # (G, H/G, T, D)
        dq, dk, dv = (
            torch.zeros((num_tokens, n, head_size), dtype=query.dtype)
            for n in (num_heads, num_groups, num_groups)
        )  # (T, H, D), (T, G, D), (T, G, D)
        dq_grouped = dq.view(split).permute(1, 2, 0, 3)  # (G, H/G, T, D)
        dk, dv = dk.transpose(0, 1), dv.transpose(0, 1)  # (G, T, D) each
        for part in (*ctx.parts[0], *ctx.parts[1]):
            i, j = part.queries, part.keys
            inputs = [do[:, :, i], q[:, :, i], k[:, :, j], v[:, :, j], o[:, :, i]]
            if i.stop - i.start <= MOST_QUERIES_IN_32_BITS:
                inputs = [one.float() for one in inputs]
            # Private operator, see flash.
            dq_part, dk_part, dv_part = (
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    *inputs,
                    lse[:, :, i],
                    0.0,
                    part.is_causal,
                    attn_mask=None if part.mask is None else part.mask.to(inputs[0].dtype),
                    scale=ctx.scale,
                )
            )  # (G, H/G, i, D), (G, H/G, j, D), (G, H/G, j, D)
            dq_grouped[:, :, i] += dq_part
            dk[:, j] += dk_part.sum(1)  # (G, j, D)
            dv[:, j] += dv_part.sum(1)  # (G, j, D)
        return dq.transpose(0, 1), dk, dv, None, None  # (H, T, D), (G, T, D), (G, T, D)


def _grouped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries (G, H/G, T, D), and keys and values expanded to that shape without a copy."""
    q = query.view(key.shape[0], -1, *query.shape[1:])  # (G, H/G, T, D)
    shape = (-1, q.shape[1], -1, -1)
    return q, key[:, None].expand(shape), value[:, None].expand(shape)  # (G, H/G, T, D) each


def flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention (B, H, i, D) on a CPU, and the log-sum-exp (B, H, i) of its scores.

    Args:
        q: queries, (B, H, i, D).
        k: keys, (B, H, j, D).
        v: values, (B, H, j, D).
        scale: factor of the scores.
        mask: additive, broadcast to (B, H, i, j).
        is_causal: a query attends to the keys up to its own number.
    """
    # Private operator, tried with torch 2.13: scaled_dot_product_attention calls it on a CPU, and does not
    # return the log-sum-exp, without which parts cannot be combined; flex_attention returns it, and has no
    # backward pass on a CPU. Can go, with its backward, when a public function of torch has both.
    output: tuple[torch.Tensor, torch.Tensor] = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q,
            k,
            v,
            0.0,
            is_causal,
            attn_mask=None if mask is None else mask.to(q.dtype),
            scale=scale,
        )
    )
    return output


def join_parts(
    one: torch.Tensor, one_lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> torch.Tensor:
    """Return the attention output (…, D), fp32, over the keys of two parts.

    exp(L₁ - L) = sigmoid(L₁ - L₂) with L, L₁ and L₂ as above.

    Args:
        one: O₁, (…, D).
        one_lse: L₁, (…).
        other: O₂, (…, D).
        other_lse: L₂, (…).
    """
    weight = (other_lse - one_lse).sigmoid()[..., None]  # (…, 1)
    return one.float().lerp(other.float(), weight)


def gathered_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tree: PrefixTree,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """Compute what ``TreeAttention`` does from padded batches of PyTorch's attention, on any device.

    Keys and values are copied to each node that attends to them, and to each head: grouped heads would be
    computed without a fused kernel where no kernel takes them (transformers issue 48633).
    """
    batches, inverse = tree.batches(window)
    repeats = query.shape[0] // key.shape[0]
    q, k, v = (tensor.transpose(0, 1) for tensor in (query, key, value))  # (T, H, D), (T, G, D) ×2
    outputs = []
    for batch in batches:
        keys, values = (
            tensor[batch.keys].repeat_interleave(repeats, dim=2).transpose(1, 2)
            for tensor in (k, v)
        )  # (B, K, G, D) → (B, K, H, D) → (B, H, K, D) each
        o = functional.scaled_dot_product_attention(
            q[batch.queries].transpose(1, 2),  # (B, Q, H, D) → (B, H, Q, D)
            keys,
            values,
            attn_mask=batch.mask,
            is_causal=batch.mask is None,
            scale=scale,
        )  # (B, H, Q, D)
        # (B, H, Q, D) → (B, Q, H, D) → (B·Q, H, D) → (N, H, D)
        outputs.append(o.transpose(1, 2).flatten(0, 1).index_select(0, batch.rows))
    return torch.cat(outputs)[inverse]  # (T, H, D)


class Tree(Protocol):
    """What computes attention over the nodes of a pass by itself."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
        scale: float,
    ) -> torch.Tensor:
        """Compute the attention output (T, H, D) of queries (H, T, D) over keys and values (G, T, D)."""
        ...


def tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tree: PrefixTree | Tree,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """Compute the attention output (T, H, D) of queries (H, T, D) over keys and values (G, T, D)."""
    # Rotary embeddings leave queries and keys in fp32 where the residual stream is.
    query, key = query.to(value.dtype), key.to(value.dtype)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if not isinstance(tree, PrefixTree):
        return tree.attend(query, key, value, window, factor)
    if tree.gathered:
        return gathered_attention(query, key, value, tree, window, factor)
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
    tree: PrefixTree | Tree | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention as transformers calls it: SDPA, or ours over a ``tree``.

    Queries are (1, H, T, D), keys and values (1, G, T, D) over a tree; the output is (1, T, H, D).
    """
    # Internal to transformers, tried with 5.23, here and in register: its own SDPA attention and mask, so
    # that calls without a tree compute what they would without us. Can go when an attention can be
    # registered that falls back to SDPA.
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if tree is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
    window = options.get("sliding_window")
    out = tree_attention(query[0], key[0], value[0], tree, window, scaling)  # (T, H, D)
    return out[None], None  # (1, T, H, D)


def register() -> None:
    """Register this attention with transformers, by its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
