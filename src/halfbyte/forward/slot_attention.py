"""Owns the attention of slots: the new tokens of many requests in one row, each on its own KV cache.

Inputs are laid end to end without padding (continuous batching, Orca, OSDI 2022 §3.2), and the tokens of each
attend to the cache of its own slot. An input of one token is decoded, an input of several is prefilled.

A beginning that all slots share is kept and read once (Hydragen, arXiv 2402.05099 §3), so that a slot holds
what comes after it.

Shapes: T tokens of the pass, t of one prefill input, M decode inputs, P shared tokens, C cached tokens of a slot,
H query heads, G key-value heads (grouped-query attention, arXiv 2305.13245), D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from halfbyte.errors import ModelError
from halfbyte.forward.kv_cache import KVCache
from halfbyte.forward.prefix_attention import flash
from halfbyte.forward.slot_decode import blocks_of

NAME = "halfbyte-slots"  # of this attention in transformers


@dataclass(frozen=True)
class SlotInput:
    """New tokens of one slot.

    Attributes:
        slot: number of the slot that holds their keys and values.
        adapter: name of the adapter to use, or None for the base.
        ids: the new tokens, which follow the first ``start`` tokens of the slot.
        start: number of tokens of the slot that are kept.
        num_logits: number of the last tokens whose logits are computed.
    """

    slot: int
    adapter: str | None
    ids: list[int]
    start: int
    num_logits: int = 1

    @property
    def end(self) -> int:
        """Number of tokens in the slot after the pass."""
        return self.start + len(self.ids)


class SlotBatch:
    """The inputs of one pass, where each stands in it and what it attends to, built once for all layers.

    Args:
        inputs: those of one adapter next to each other.
        cache: keys and values of the slots.
        device: where the pass is computed.

    Attributes:
        adapter_ranges: names of adapters, each with the range of its tokens in the pass.
        ranges: range of each input's tokens in the pass.
        logit_indices: indices in the pass of the tokens whose logits are computed.
        decode: numbers of the inputs of one token.
        prefill: numbers of the inputs of several tokens.
        attended_layers: numbers of the layers that were attended so far.
    """

    def __init__(self, inputs: list[SlotInput], cache: KVCache, device: torch.device) -> None:
        self.inputs, self.cache, self.device = inputs, cache, device
        self.attended_layers: set[int] = set()
        self.adapter_ranges: list[tuple[str, slice]] = []
        self.ranges: list[slice] = []
        start = 0
        for slot_input in inputs:
            tokens = slice(start, start + len(slot_input.ids))
            self.ranges.append(tokens)
            start = tokens.stop
            if slot_input.adapter is None:
                continue
            if self.adapter_ranges and self.adapter_ranges[-1][0] == slot_input.adapter:
                first = self.adapter_ranges[-1][1].start
                self.adapter_ranges[-1] = (slot_input.adapter, slice(first, tokens.stop))
            else:
                self.adapter_ranges.append((slot_input.adapter, tokens))
        logit_indices = [
            index
            for slot_input, tokens in zip(inputs, self.ranges, strict=True)
            for index in range(tokens.stop - slot_input.num_logits, tokens.stop)
        ]
        self.logit_indices = torch.tensor(logit_indices, device=device)
        self.num_shared = cache.num_shared
        self.longest = max(slot_input.end for slot_input in inputs) - self.num_shared
        self.decode = [n for n, slot_input in enumerate(inputs) if len(slot_input.ids) == 1]
        self.prefill = [n for n, slot_input in enumerate(inputs) if len(slot_input.ids) > 1]
        slots = [inputs[number].slot for number in self.decode]
        places = [self.ranges[number].start for number in self.decode]
        positions = [inputs[number].start for number in self.decode]
        self._blocks = blocks_of(slots, places, positions, device)
        # Of each decode input (M,): its slot, its token in the pass, its place in the slot.
        self._slots = torch.tensor(slots, device=device)
        self._tokens = torch.tensor(places, device=device)
        self._own = torch.tensor(positions, device=device) - self.num_shared
        self._prefill_tokens = torch.tensor(
            [token for n in self.prefill for token in range(start)[self.ranges[n]]], device=device
        )
        self._prefill_masks: dict[tuple[int, int | None], torch.Tensor | None] = {}

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
        scale: float | None,
    ) -> torch.Tensor:
        """Keep the keys and values of the pass, and compute the attention output (T, H, D).

        Args:
            layer: number of the layer.
            query: (H, T, D).
            key: (G, T, D).
            value: (G, T, D).
            window: a token attends to itself and the ``window - 1`` tokens before it.
            scale: factor of the scores.
        """
        self.attended_layers.add(layer)
        keys, values = self.cache.storage(
            layer, key[None], value[None], self.longest
        )  # (slots, G, C, D) each
        out = query.new_empty((query.shape[1], query.shape[0], value.shape[2]))  # (T, H, D)
        factor = query.shape[2] ** -0.5 if scale is None else scale
        if self.decode:
            keys[self._slots, :, self._own] = (
                key[:, self._tokens].transpose(0, 1).to(keys.dtype)  # (G, M, D) → (M, G, D)
            )
            values[self._slots, :, self._own] = (
                value[:, self._tokens].transpose(0, 1).to(keys.dtype)  # (G, M, D) → (M, G, D)
            )
            for block in self._blocks:
                q = query[:, block.tokens].transpose(0, 1)  # (H, M, D) → (M, H, D)
                shared = self.cache.shared.get(layer)
                out[block.tokens] = block.attend(q, (keys, values), shared, window, factor)
        ends = [self.inputs[number].end for number in self.prefill]
        in_window = window is None or max(ends, default=0) <= window
        in_parts = bool(ends) and bool(self.num_shared) and in_window and query.device.type == "cpu"
        for number in self.prefill:
            slot_input, tokens = self.inputs[number], self.ranges[number]
            new = slice(slot_input.start - self.num_shared, slot_input.end - self.num_shared)
            keys[slot_input.slot, :, new] = key[:, tokens].to(keys.dtype)  # (G, t, D)
            values[slot_input.slot, :, new] = value[:, tokens].to(keys.dtype)  # (G, t, D)
            if not in_parts:
                out[tokens] = self._attend_prefill(
                    layer, number, query[:, tokens], keys, values, window, factor
                )  # (t, H, D)
        if in_parts:
            out[self._prefill_tokens] = self._attend_in_parts(layer, query, keys, values, factor)
        return out

    def _attend_in_parts(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Compute the attention output (N, H, D) of all prefill inputs' N tokens: shared ones, and each slot's.

        All see all shared tokens, so one call reads these for all.
        """
        q = query[:, self._prefill_tokens].to(keys.dtype)  # (H, N, D)
        groups = keys.shape[1]
        q = q.view(groups, -1, *q.shape[1:])  # (G, H/G, N, D)
        shared_keys, shared_values = self.cache.shared[layer]  # (G, P, D) each
        rows = q.flatten(1, 2)[None]  # (1, G, H/G·N, D)
        seen, seen_sum = flash(rows, shared_keys[None], shared_values[None], scale)
        own, own_sum = torch.empty_like(q), torch.empty(q.shape[:3])  # (G, H/G, N, D), (G, H/G, N)
        start = 0
        for number in self.prefill:
            slot_input = self.inputs[number]
            tokens = slice(start, start + len(slot_input.ids))
            start = tokens.stop
            k, v = (
                one[slot_input.slot, :, None, : slot_input.end - self.num_shared].expand(
                    -1, q.shape[1], -1, -1
                )
                for one in (keys, values)
            )  # (G, H/G, C, D) each
            is_causal = slot_input.start == self.num_shared
            mask = None if is_causal else self._prefill_mask(number, None)
            own_mask = None if mask is None else mask[:, self.num_shared :]  # (t, C)
            own[:, :, tokens], own_sum[:, :, tokens] = flash(
                q[:, :, tokens], k, v, scale, own_mask, is_causal=is_causal
            )
        weight = (seen_sum.view_as(own_sum) - own_sum).sigmoid()[..., None]  # (G, H/G, N, 1)
        o = own.float().lerp(seen.view_as(own).float(), weight)  # (G, H/G, N, D)
        return o.flatten(0, 1).transpose(0, 1).to(query.dtype)  # (N, H, D)

    def _attend_prefill(
        self,
        layer: int,
        number: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        window: int | None,
        scale: float | None,
    ) -> torch.Tensor:
        """Compute the attention output (t, H, D) of one input's queries (H, t, D)."""
        slot_input = self.inputs[number]
        groups = keys.shape[1]
        mask = self._prefill_mask(number, window)  # (t, P + C)
        q = query.view(groups, -1, *query.shape[1:])  # (G, H/G, t, D)
        pair = [
            tensor[slot_input.slot, :, : slot_input.end - self.num_shared]
            for tensor in (keys, values)
        ]  # (G, C, D) each
        if self.num_shared:
            shared = self.cache.shared[layer]  # (G, P, D) each
            pair = [
                torch.cat([first, then], dim=1) for first, then in zip(shared, pair, strict=True)
            ]
        k, v = (tensor[:, None].expand(-1, q.shape[1], -1, -1) for tensor in pair)
        o = functional.scaled_dot_product_attention(
            q.to(keys.dtype),
            k,
            v,
            attn_mask=None if mask is None else mask.to(keys.dtype),
            is_causal=mask is None,
            scale=scale,
        )  # (G, H/G, t, D)
        # (G, H/G, t, D) → (H, t, D) → (t, H, D)
        return o.flatten(0, 1).transpose(0, 1).to(query.dtype)

    def _prefill_mask(self, number: int, window: int | None) -> torch.Tensor | None:
        """Return an additive mask (t, P + C), or None where order within the input alone decides."""
        slot_input = self.inputs[number]
        if slot_input.start == 0 and (window is None or slot_input.end <= window):
            return None
        if (number, window) not in self._prefill_masks:
            key_positions = torch.arange(slot_input.end, device=self.device)  # (P + C,)
            positions = torch.arange(slot_input.start, slot_input.end, device=self.device)  # (t,)
            hidden = key_positions > positions[:, None]  # (t, C)
            if window is not None:
                hidden |= key_positions <= positions[:, None] - window
            mask = torch.zeros(hidden.shape, device=self.device)  # (t, P + C)
            self._prefill_masks[number, window] = mask.masked_fill_(hidden, float("-inf"))
        return self._prefill_masks[number, window]


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    slot_batch: SlotBatch | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute the attention of a pass over slots as transformers calls it.

    Queries are (1, H, T, D), keys and values (1, G, T, D); the output is (1, T, H, D).

    Raises:
        ModelError: the attention caps its scores or has sinks.
    """
    if slot_batch is None or options.get("softcap") or options.get("s_aux") is not None:
        raise ModelError(
            f"{type(module).__name__}: capped scores or sinks, which this attention does not support. Use"
            " --engine vllm or llama.cpp"
        )
    window = options.get("sliding_window")
    out = slot_batch.attend(
        module.layer_idx, query[0], key[0], value[0], window, scaling
    )  # (T, H, D)
    return out[None], None  # (1, T, H, D)


def register() -> None:
    """Register this attention with transformers, by its name; without a mask function, as it needs no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
