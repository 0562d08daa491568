"""Owns the attention of slots: the new tokens of many requests in one row, each on its own KV cache.

Inputs are laid end to end without padding (continuous batching, Orca, OSDI 2022 §3.2), and the tokens of each
attend to the cache of its own slot. An input of one token is decoded, an input of several is prefilled.

A beginning that all slots share is kept and read once (Hydragen, arXiv 2402.05099 §3), so that a slot holds
what comes after it.

Shapes: T tokens of the pass, t of one prefill input, B of which are alike, N tokens of all prefill inputs, M decode
inputs, P shared tokens, C cached tokens of a slot, H query heads, G key-value heads (grouped-query attention, arXiv
2305.13245), D head size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from halfbyte.errors import ModelError
from halfbyte.forward.kv_cache import KVCache
from halfbyte.forward.prefix_attention import flash, join_parts
from halfbyte.forward.slot_decode import DecodeBatch, blocks_of
from halfbyte.forward.slot_paths import SlotInput, SlotPaths
from halfbyte.kernels.operators import uses_operators

NAME = "halfbyte-slots"  # of this attention in transformers


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
        decode = [n for n, slot_input in enumerate(inputs) if len(slot_input.ids) == 1]
        slots = [inputs[number].slot for number in decode]
        places = [self.ranges[number].start for number in decode]
        positions = [inputs[number].start for number in decode]
        self._blocks = blocks_of(slots, places, positions, device)
        # Of each token of the pass (T,): its slot, and its place there.
        self._slots, self._own = (
            torch.tensor(numbers, device=device)
            for numbers in (
                [one.slot for one in inputs for _ in one.ids],
                [at - self.num_shared for one in inputs for at in range(one.start, one.end)],
            )
        )
        alike: dict[tuple[int, int], list[int]] = {}
        for number, one in enumerate(inputs):
            if len(one.ids) > 1:
                alike.setdefault((one.start, one.end), []).append(number)
        self._prefilled = [inputs[n] for numbers in alike.values() for n in numbers]
        self._prefills = [self._prefill(*span, numbers) for span, numbers in alike.items()]
        if self._prefills:
            self._prefill_tokens = torch.cat([prefill.tokens for prefill in self._prefills])  # (N,)
        self._prefill_masks: dict[tuple[int, int, int | None], torch.Tensor | None] = {}

    def _prefill(self, start: int, end: int, numbers: list[int]) -> Prefill:
        """Put inputs together that begin and end at the same positions."""
        slots = [self.inputs[number].slot for number in numbers]
        tokens = [range(self.ranges[n].start, self.ranges[n].stop) for n in numbers]
        one = slice(slots[0], slots[0] + 1)
        return Prefill(
            one if len(slots) == 1 else torch.tensor(slots, device=self.device),
            torch.tensor([token for part in tokens for token in part], device=self.device),
            start,
            end,
        )

    @functools.cached_property
    def _paths(self) -> SlotPaths:
        """The inputs of several tokens, in the order of ``_prefill_tokens``."""
        return SlotPaths.of(self._prefilled, self.num_shared, self.device)

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
        self.cache.put(layer, self._slots, self._own, key, value)
        shared = self.cache.shared.get(layer)
        for block in self._blocks:
            q = query[:, block.tokens].transpose(0, 1)  # (H, M, D) → (M, H, D)
            out[block.tokens] = block.attend(q, (keys, values), shared, window, factor)
        if not self._prefills:
            return out
        if uses_operators(self.device):
            q = query[:, self._prefill_tokens].transpose(0, 1).to(keys.dtype)  # (N, H, D)
            rows = self._paths.attend(q, keys, values, shared, window, factor)
            out[self._prefill_tokens] = rows.to(query.dtype)
            return out
        end = max(prefill.end for prefill in self._prefills)
        if shared is not None and query.device.type == "cpu" and (window is None or end <= window):
            q = query[:, self._prefill_tokens]  # (H, N, D)
            out[self._prefill_tokens] = self._attend_in_parts(q, keys, values, shared, factor)
            return out
        for prefill in self._prefills:
            o = self._attend_alike(prefill, query, (keys, values), shared, window, factor)
            out[prefill.tokens] = o.to(query.dtype)
        return out

    def _attend_alike(
        self,
        prefill: Prefill,
        query: torch.Tensor,
        cached: tuple[torch.Tensor, torch.Tensor],
        shared: tuple[torch.Tensor, torch.Tensor] | None,
        window: int | None,
        scale: float,
    ) -> torch.Tensor:
        """Compute the attention output (B·t, H, D) of inputs that begin and end at the same positions."""
        q, k, v = _rows(query[:, prefill.tokens], *cached, prefill, self.num_shared)
        if shared is not None:
            first = (one.repeat(len(q) // len(one), 1, 1)[:, None] for one in shared)
            k, v = (
                torch.cat([one.expand(-1, q.shape[1], -1, -1), then], dim=2)
                for one, then in zip(first, (k, v), strict=True)
            )  # (B·G, H/G, P + C, D) each
        mask = self._mask(prefill, window)  # (t, P + C)
        o = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if mask is None else mask.to(k.dtype),
            is_causal=mask is None,
            scale=scale,
        )  # (B·G, H/G, t, D)
        # (B·G, H/G, t, D) → (B, H, t, D) → (B·t, H, D)
        return o.view(-1, query.shape[0], *o.shape[2:]).transpose(1, 2).flatten(0, 1)

    def _attend_in_parts(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        shared: tuple[torch.Tensor, torch.Tensor],
        scale: float,
    ) -> torch.Tensor:
        """Compute the attention output (N, H, D) of the N tokens of all prefills (H, N, D).

        All see all shared tokens, so one call reads these for all; the parts are weighed as in
        ``prefix_attention``.
        """
        groups = keys.shape[1]
        q = query.to(keys.dtype).view(groups, -1, *query.shape[1:])  # (G, H/G, N, D)
        seen, seen_sum = flash(q.flatten(1, 2)[None], shared[0][None], shared[1][None], scale)
        parts, sums = [], []
        start = 0
        for prefill in self._prefills:
            tokens = slice(start, start + len(prefill.tokens))
            start = tokens.stop
            rows, k, v = _rows(query[:, tokens], keys, values, prefill, self.num_shared)
            is_causal = prefill.start == self.num_shared
            mask = None if is_causal else self._mask(prefill, None)
            own_mask = None if mask is None else mask[:, self.num_shared :]  # (t, C)
            o, o_sum = flash(rows, k, v, scale, own_mask, is_causal=is_causal)
            split = (-1, groups, *o.shape[1:])
            parts.append(o.view(split).permute(1, 2, 0, 3, 4).flatten(2, 3))  # (G, H/G, B·t, D)
            sums.append(o_sum.view(split[:-1]).permute(1, 2, 0, 3).flatten(2))  # (G, H/G, B·t)
        own, own_sum = torch.cat(parts, dim=2), torch.cat(sums, dim=2)
        seen, seen_sum = seen.view_as(own), seen_sum.view_as(own_sum)
        out = join_parts(own, own_sum, seen, seen_sum)  # (G, H/G, N, D)
        return out.flatten(0, 1).transpose(0, 1).to(query.dtype)  # (N, H, D)

    def _mask(self, prefill: Prefill, window: int | None) -> torch.Tensor | None:
        """Return an additive mask (t, P + C), or None where order within the input alone decides."""
        start, end = prefill.start, prefill.end
        if start == 0 and (window is None or end <= window):
            return None
        if (start, end, window) not in self._prefill_masks:
            key_positions = torch.arange(end, device=self.device)  # (P + C,)
            positions = torch.arange(start, end, device=self.device)  # (t,)
            hidden = key_positions > positions[:, None]  # (t, P + C)
            if window is not None:
                hidden |= key_positions <= positions[:, None] - window
            mask = torch.zeros(hidden.shape, device=self.device)  # (t, P + C)
            self._prefill_masks[start, end, window] = mask.masked_fill_(hidden, float("-inf"))
        return self._prefill_masks[start, end, window]


@dataclass(frozen=True)
class Prefill:
    """B inputs of several tokens that begin and end at the same positions of their slots.

    Attributes:
        slots: their slots.
        tokens: (B·t,), their tokens in the pass.
        start: position of the first token of each.
        end: position after the last one.
    """

    slots: torch.Tensor | slice
    tokens: torch.Tensor
    start: int
    end: int


def _rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    prefill: Prefill,
    num_shared: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries (B·G, H/G, t, D) from (H, B·t, D), and what their slots hold, (B·G, H/G, C, D) each."""
    own = [one[prefill.slots, :, : prefill.end - num_shared] for one in (keys, values)]
    batch, groups = own[0].shape[:2]
    q = query.reshape(query.shape[0], batch, -1, query.shape[2])  # (H, B, t, D)
    q = q.transpose(0, 1).to(keys.dtype)  # (B, H, t, D)
    q = q.reshape(batch * groups, -1, *q.shape[2:])  # (B·G, H/G, t, D)
    k, v = (one.flatten(0, 1)[:, None].expand(-1, q.shape[1], -1, -1) for one in own)
    return q, k, v


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    slot_batch: SlotBatch | DecodeBatch | None = None,
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
