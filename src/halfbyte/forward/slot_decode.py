"""Owns the attention of inputs of one token: neighbouring slots of the cache in one product.

Shapes: M decode inputs, S neighbouring slots that hold them, P shared tokens, C cached tokens of a slot, H query
heads, G key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from halfbyte.forward.kv_cache import KVCache
from halfbyte.forward.prefix_attention import flash, join_parts

# On a CPU, where a call costs little beside reading keys, so many slots have a common length.
SLOTS_PER_BLOCK = 128


@dataclass(frozen=True)
class Block:
    """Inputs of one token whose slots are neighbours, which are read where they lie.

    Attributes:
        slots: the S slots; those in between that decode nothing are computed and dropped.
        offsets: of each input (M,), its slot among the S.
        tokens: of each input (M,), its place in the pass.
        positions: of each input (M,), its position in its request.
        length: P + C of the longest of them.
    """

    slots: slice
    offsets: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    length: int
    _masks: dict[tuple[int | None, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def attend(
        self,
        query: torch.Tensor,
        cached: tuple[torch.Tensor, torch.Tensor],
        shared: tuple[torch.Tensor, torch.Tensor] | None,
        window: int | None,
        scale: float,
    ) -> torch.Tensor:
        """Compute the attention output (M, H, D) of queries (M, H, D).

        Args:
            query: of each input.
            cached: keys and values of all slots, (slots, G, C, D) each.
            shared: keys and values before those of each slot, (G, P, D) each.
            window: a token attends to itself and the ``window - 1`` tokens before it.
            scale: factor of the scores.
        """
        num_shared = 0 if shared is None else shared[0].shape[1]
        keys, values = (one[self.slots, :, : self.length - num_shared] for one in cached)
        q = query.new_zeros((keys.shape[0], *query.shape[1:]))  # (S, H, D)
        q[self.offsets] = query
        # Heads that share keys stand where queries do, so that no key is copied for them.
        q = q.view(q.shape[0], keys.shape[1], -1, q.shape[2]).to(keys.dtype)  # (S, G, H/G, D)
        if shared is None:
            mask = self._mask(window, keys.dtype)
            out = functional.scaled_dot_product_attention(
                q, keys, values, attn_mask=mask, scale=scale
            )
        elif query.device.type == "cpu" and (window is None or self.length <= window):
            mask = self._mask(window, keys.dtype)
            out = _attend_in_parts(q, keys, values, shared, mask, scale)
        else:
            mask = self._mask(window, torch.float32)
            out = _attend_at_once(q, keys, values, shared, mask, scale)
        return out.flatten(1, 2)[self.offsets].to(query.dtype)  # (S, G, H/G, D) → (M, H, D)

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Return an additive mask (S, 1, 1, P + C), the same for all layers."""
        if (window, dtype) not in self._masks:
            device = self.positions.device
            key_positions = torch.arange(self.length, device=device)  # (P + C,)
            positions = self.positions[:, None]  # (M, 1)
            seen = key_positions <= positions  # (M, P + C)
            if window is not None:
                seen &= key_positions > positions - window
            mask = torch.zeros((self.slots.stop - self.slots.start, self.length), device=device)
            mask[self.offsets] = mask[self.offsets].masked_fill_(~seen, float("-inf"))
            self._masks[window, dtype] = mask[:, None, None].to(dtype)
        return self._masks[window, dtype]


class DecodeBatch:
    """One new token of each of M inputs, whose numbers lie on the device: a pass that can be recorded.

    It has no shape that depends on how long requests are: each token attends to all that its slot has room for,
    behind a mask.

    Args:
        numbers: (4, M), of each input its token, the token's position, its slot, and its place there.
        num_slots: so many of the first slots hold them.
        cache: keys and values of the slots, with room for all tokens.
        adapter_ranges: names of adapters, each with the range of its tokens in the pass.

    Attributes:
        attended_layers: numbers of the layers that were attended so far.
    """

    def __init__(
        self,
        numbers: torch.Tensor,
        num_slots: int,
        cache: KVCache,
        adapter_ranges: list[tuple[str, slice]],
    ) -> None:
        self.num_slots, self.cache, self.adapter_ranges = num_slots, cache, adapter_ranges
        self.attended_layers: set[int] = set()
        self.ids, self.positions, self.slots, self.places = numbers
        self.indices = torch.arange(numbers.shape[1], device=numbers.device)
        self.begin()

    def begin(self) -> None:
        """Begin a pass: masks are made anew from the numbers that stand there then."""
        length = self.cache.num_shared + self.cache.capacity
        held = slice(0, self.num_slots)
        self.block = Block(held, self.slots, self.indices, self.positions, length)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
        scale: float | None,
    ) -> torch.Tensor:
        """Do what ``SlotBatch.attend`` does."""
        self.attended_layers.add(layer)
        self.cache.put(layer, self.slots, self.places, key, value)
        factor = query.shape[2] ** -0.5 if scale is None else scale
        shared = self.cache.shared.get(layer)
        return self.block.attend(
            query.transpose(0, 1), self.cache.layers[layer], shared, window, factor
        )


def blocks_of(
    slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int], device: torch.device
) -> list[Block]:
    """Return the inputs of one token in blocks of neighbouring slots.

    Args:
        slots: of each input, its slot.
        tokens: of each input, its place in the pass.
        positions: of each input, its position in its request.
        device: where they are computed.
    """
    size = SLOTS_PER_BLOCK if device.type == "cpu" else max(slots, default=0) + 1
    numbers: dict[int, list[int]] = {}
    for number, slot in enumerate(slots):
        numbers.setdefault(slot // size, []).append(number)
    blocks = []
    for inputs in numbers.values():
        own = [slots[number] for number in inputs]
        blocks.append(
            Block(
                slice(min(own), max(own) + 1),
                torch.tensor([slot - min(own) for slot in own], device=device),
                torch.tensor([tokens[number] for number in inputs], device=device),
                torch.tensor([positions[number] for number in inputs], device=device),
                max(positions[number] for number in inputs) + 1,
            )
        )
    return blocks


def _attend_in_parts(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    shared: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attend to the shared tokens, all of which are seen, and to the others; weigh both outputs by their sums.

    The fused attention of the CPU, which also returns the logarithms of these sums (FlashAttention, arXiv
    2205.14135 §3.1). Shapes as in ``_attend_at_once``.
    """
    slots, groups, heads, size = query.shape
    num_shared = shared[0].shape[1]
    own, own_sum = flash(query, keys, values, scale, mask[..., num_shared:])
    rows = query.transpose(0, 1).reshape(1, groups, slots * heads, size)
    seen, seen_sum = flash(rows, shared[0][None], shared[1][None], scale)
    seen = seen.view(groups, slots, heads, size).transpose(0, 1)
    seen_sum = seen_sum.view(groups, slots, heads).transpose(0, 1)
    return join_parts(own, own_sum, seen, seen_sum)


def _attend_at_once(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    shared: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Compute the attention output (S, G, H/G, D) of queries to the shared tokens and those of each slot.

    Args:
        query: (S, G, H/G, D).
        keys: (S, G, C, D).
        values: (S, G, C, D).
        shared: keys and values (G, P, D).
        mask: additive, (S, 1, 1, P + C).
        scale: factor of the scores.
    """
    shared_keys, shared_values = shared
    slots, groups, heads, size = query.shape
    query = query * scale
    # One product for all slots: (G, S·H/G, D) by (G, D, P).
    before = query.transpose(0, 1).flatten(1, 2) @ shared_keys.transpose(1, 2)
    before = before.view(groups, slots, heads, -1).transpose(0, 1)  # (S, G, H/G, P)
    scores = torch.cat([before, query @ keys.transpose(2, 3)], dim=3)
    weights = (scores.float() + mask).softmax(dim=3).to(keys.dtype)  # (S, G, H/G, P + C)
    num_shared = shared_keys.shape[1]
    rows = weights[..., :num_shared].transpose(0, 1).flatten(1, 2)  # (G, S·H/G, P)
    seen = (rows @ shared_values).view(groups, slots, heads, size)
    out: torch.Tensor = seen.transpose(0, 1) + weights[..., num_shared:] @ values
    return out
