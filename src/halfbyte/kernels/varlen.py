"""Owns attention over sequences of unequal lengths, each query with the keys up to its own place.

Sequence n has the queries ``query_starts[n]`` to ``query_starts[n + 1]`` and the keys ``key_starts[n]`` to
``key_starts[n + 1]``, at least as many; its last query is aligned with its last key. A query attends to the
keys up to the one it is aligned with, or to the last ``window`` of these.

On CUDA one operator of PyTorch computes all of it: flash attention (arXiv 2307.08691) or memory-efficient
attention (arXiv 2112.05682), by the card, the dtype and the head size.

Shapes: Q queries and K keys of all sequences, i and j of one; B sequences, H query heads, G key-value heads
(G divides H), D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from halfbyte.kernels.capability import AMPERE, Capability, capability_of

HEAD_STEP = 8  # both kernels take head sizes that are multiples of it
LARGEST_FLASH_HEAD = 256
# Cards whose shared memory is too small for the backward pass of flash attention at some head sizes, as
# PyTorch's own choice of kernels has it (torch 2.13, sdp_utils.cpp).
SMALL_CARDS = ((8, 6), (8, 9), (12, 0), (12, 1))
SMALL_CARDS_LACK = range(193, 225)
CAUSAL_FROM_BOTTOM_RIGHT = 2  # custom_mask_type of memory-efficient attention
Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def uses_flash(capability: Capability | None, dtype: torch.dtype, head_size: int) -> bool:
    """Whether flash attention computes on such a card; else memory-efficient attention does."""
    if capability is None or capability < AMPERE or dtype == torch.float32:
        return False
    is_lacking = capability in SMALL_CARDS and head_size in SMALL_CARDS_LACK
    return head_size <= LARGEST_FLASH_HEAD and not is_lacking


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest: list[int],
    window: int,
    scale: float,
) -> Results:
    """Return the attention output (Q, H, D), the log-sum-exps of scores, and two states of no use here.

    Args:
        query: (Q, H, D).
        key: (K, G, D).
        value: (K, G, D).
        query_starts: (B + 1,), int32.
        key_starts: (B + 1,), int32.
        longest: most queries and most keys of a sequence.
        window: keys that a query attends to; 0 for all.
        scale: factor of the scores.
    """
    output, lse, seed, offset = varlen_shapes(
        query, key, value, query_starts, key_starts, longest, window, scale
    )
    for n, (i, j) in enumerate(_sequences(query_starts, key_starts)):
        scores = _scores(query[i], key[j], window, scale)  # (G, H/G, i, j)
        sums = scores.logsumexp(dim=-1)  # (G, H/G, i)
        o = (scores - sums[..., None]).exp() @ _keys(value[j])  # (G, H/G, i, D)
        output[i] = o.flatten(0, 1).transpose(0, 1).to(output.dtype)
        _lse_of(lse, n, i)[:] = sums.flatten(0, 1)
    return output, lse, seed, offset


def varlen_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    results: list[torch.Tensor],
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest: list[int],
    window: int,
    scale: float,
) -> Gradients:
    """Return the gradients of query (Q, H, D), key and value (K, G, D); see arXiv 2205.14135, appendix B.4."""
    output, lse = results[:2]
    dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    groups = key.shape[1]
    for n, (i, j) in enumerate(_sequences(query_starts, key_starts)):
        do, q = _queries(gradient[i], groups), _queries(query[i], groups)  # (G, H/G, i, D)
        sums = _lse_of(lse, n, i).view(groups, -1, q.shape[2], 1)  # (G, H/G, i, 1)
        p = (_scores(query[i], key[j], window, scale) - sums).exp()  # (G, H/G, i, j)
        rows = (do * _queries(output[i], groups)).sum(-1, keepdim=True)  # (G, H/G, i, 1)
        ds = p * (do @ _keys(value[j]).mT - rows) * scale  # (G, H/G, i, j)
        dq[i] = (ds @ _keys(key[j])).flatten(0, 1).transpose(0, 1).to(dq.dtype)
        dk[j] = (ds.mT @ q).sum(1).transpose(0, 1).to(dk.dtype)
        dv[j] = (p.mT @ do).sum(1).transpose(0, 1).to(dv.dtype)
    return dq, dk, dv


def varlen_shapes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest: list[int],
    window: int,
    scale: float,
) -> Results:
    """Return empty results, as large as those of the kernel that would compute them."""
    num_queries, num_heads, head_size = query.shape
    sums: tuple[int, ...] = (num_heads, num_queries)
    if not uses_flash(capability_of(query.device), query.dtype, head_size):
        sums = (len(query_starts) - 1, num_heads, -(-longest[0] // 32) * 32)
    lse = query.new_empty(sums, dtype=torch.float32)
    state = query.new_empty(0, dtype=torch.int64)
    return torch.empty_like(query), lse, state, state.clone()


def launch_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest: list[int],
    window: int,
    scale: float,
) -> Results:
    """Compute ``varlen`` on CUDA by one operator of PyTorch."""
    # Private operators, tried with torch 2.13, here and in the backward pass: torch.nn.attention.varlen has
    # another signature in each release and may choose cuDNN (pytorch issue 187770). Can go when it is stable.
    most_queries, most_keys = longest
    if uses_flash(capability_of(query.device), query.dtype, query.shape[-1]):
        output, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            query_starts,
            key_starts,
            most_queries,
            most_keys,
            0.0,
            not window,
            False,
            scale=scale,
            window_size_left=window - 1 if window else None,
            window_size_right=0 if window else None,
        )
        return output, lse, seed, offset
    output, lse, seed, offset, _, _ = torch.ops.aten._efficient_attention_forward(
        query[None],
        _expanded(key, query),
        _expanded(value, query),
        None,
        query_starts,
        key_starts,
        most_queries,
        most_keys,
        0.0,
        CAUSAL_FROM_BOTTOM_RIGHT,
        True,
        scale=scale,
        window_size=window or None,
    )
    return output[0], lse, seed, offset


def launch_varlen_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    results: list[torch.Tensor],
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest: list[int],
    window: int,
    scale: float,
) -> Gradients:
    """Compute ``varlen_backward`` on CUDA by one operator of PyTorch."""
    output, lse, seed, offset = results
    most_queries, most_keys = longest
    if uses_flash(capability_of(query.device), query.dtype, query.shape[-1]):
        gradients: Gradients = torch.ops.aten._flash_attention_backward(
            gradient,
            query,
            key,
            value,
            output,
            lse,
            query_starts,
            key_starts,
            most_queries,
            most_keys,
            0.0,
            not window,
            seed,
            offset,
            scale=scale,
            window_size_left=window - 1 if window else None,
            window_size_right=0 if window else None,
        )
        return gradients
    dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
        gradient[None],
        query[None],
        _expanded(key, query),
        _expanded(value, query),
        None,
        output[None],
        query_starts,
        key_starts,
        most_queries,
        most_keys,
        lse,
        0.0,
        seed,
        offset,
        CAUSAL_FROM_BOTTOM_RIGHT,
        False,
        scale=scale,
        window_size=window or None,
    )
    shape = (key.shape[0], key.shape[1], -1, key.shape[2])  # (K, G, H/G, D)
    return dq[0], dk[0].view(shape).sum(2), dv[0].view(shape).sum(2)


def _expanded(keys: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Return keys or values (K, G, D) as (1, K, H, D): this kernel knows no grouped heads."""
    return keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)[None]


def _sequences(
    query_starts: torch.Tensor, key_starts: torch.Tensor
) -> Iterator[tuple[slice, slice]]:
    """Yield the queries and the keys of each sequence."""
    pairs = (itertools.pairwise(starts.tolist()) for starts in (query_starts, key_starts))
    for queries, keys in zip(*pairs, strict=True):
        yield slice(*queries), slice(*keys)


def _queries(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """Return queries (i, H, D) as (G, H/G, i, D), in fp32."""
    heads = rows.float().transpose(0, 1)  # (H, i, D)
    return heads.reshape(groups, -1, *heads.shape[1:])


def _keys(rows: torch.Tensor) -> torch.Tensor:
    """Return keys (j, G, D) as (G, 1, j, D), in fp32."""
    return rows.float().transpose(0, 1)[:, None]


def _scores(query: torch.Tensor, key: torch.Tensor, window: int, scale: float) -> torch.Tensor:
    """Return scores (G, H/G, i, j) of queries (i, H, D) with keys (j, G, D), -inf where none attends."""
    num_queries, num_keys = len(query), len(key)
    place = torch.arange(num_keys - num_queries, num_keys, device=query.device)[:, None]  # (i, 1)
    distance = place - torch.arange(num_keys, device=query.device)  # (i, j)
    hidden = (distance < 0) | (distance >= window) if window else distance < 0
    scores = _queries(query, key.shape[1]) @ _keys(key).mT * scale
    return scores.masked_fill_(hidden, float("-inf"))


def _lse_of(lse: torch.Tensor, sequence: int, queries: slice) -> torch.Tensor:
    """Return the log-sum-exps (H, i) of a sequence, as either kernel keeps them."""
    if lse.dim() == 2:
        return lse[:, queries]
    return lse[sequence, :, : queries.stop - queries.start]
