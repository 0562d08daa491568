"""Owns the attention of slots: the new tokens of many requests in one row, each on its own KV cache.

Lanes are laid end to end without padding (continuous batching, Orca, OSDI 2022 §3.2), and each attends to
its own slot of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from halfbyte.errors import ModelError

NAME = "halfbyte-slots"  # of this attention in transformers
GROWTH = 256  # tokens by which the cache grows


@dataclass(frozen=True)
class SlotInput:
    """New tokens of one slot.

    Attributes:
        slot: where its keys and values lie.
        adapter: name of the adapter that changes it, or None for the base.
        ids: the tokens, which follow on ``start`` tokens of the slot.
        start: tokens of the slot that are kept.
        num_logits: how many of the last tokens get logits.
    """

    slot: int
    adapter: str | None
    ids: list[int]
    start: int
    num_logits: int = 1

    @property
    def end(self) -> int:
        """Tokens of the slot after the pass."""
        return self.start + len(self.ids)


class KVCache:
    """Keys and values (slots, groups, tokens, D) of each layer; grown as it is needed."""

    def __init__(
        self, num_slots: int, dtype: torch.dtype, device: torch.device, growth: int
    ) -> None:
        self.num_slots, self.dtype, self.device = num_slots, dtype, device
        self.growth = growth
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def num_bytes(self) -> int:
        """What it takes now."""
        return sum(tensor.nbytes for pair in self.layers.values() for tensor in pair)

    def of(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's storage with room for ``length`` tokens; shapes are those of new keys and values."""
        held = self.layers.get(layer)
        if held is not None and held[0].shape[2] >= length:
            return held
        room = -(-length // self.growth) * self.growth
        made = []
        for number, tensor in enumerate((key, value)):
            shape = (self.num_slots, tensor.shape[1], room, tensor.shape[3])
            grown = torch.zeros(shape, dtype=self.dtype, device=self.device)
            if held is not None:
                grown[:, :, : held[number].shape[2]] = held[number]
            made.append(grown)
        self.layers[layer] = (made[0], made[1])
        return self.layers[layer]

    def copy(self, source: int, target: int, length: int) -> None:
        """The first tokens of one slot to another."""
        for tensors in self.layers.values():
            for tensor in tensors:
                tensor[target, :, :length] = tensor[source, :, :length]


class SlotBatch:
    """One pass: where each lane stands in it, and who sees what, made once for all layers.

    Attributes:
        ranges: for each adapter its tokens, which stand together.
        told: places of the tokens that get logits.
        layers: numbers of the layers that were attended so far.
    """

    def __init__(self, lanes: list[SlotInput], cache: KVCache, device: torch.device) -> None:
        self.lanes, self.cache, self.device = lanes, cache, device
        self.layers: set[int] = set()
        self.ranges: list[tuple[str, slice]] = []
        self.places: list[slice] = []
        start = 0
        for lane in lanes:
            place = slice(start, start + len(lane.ids))
            self.places.append(place)
            start = place.stop
            if lane.adapter is None:
                continue
            if self.ranges and self.ranges[-1][0] == lane.adapter:
                self.ranges[-1] = (lane.adapter, slice(self.ranges[-1][1].start, place.stop))
            else:
                self.ranges.append((lane.adapter, place))
        ends = zip(lanes, self.places, strict=True)
        told = [at for lane, own in ends for at in range(own.stop - lane.num_logits, own.stop)]
        self.told = torch.tensor(told, device=device)
        self.longest = max(lane.end for lane in lanes)
        self.single = [n for n, lane in enumerate(lanes) if len(lane.ids) == 1]
        self.long = [n for n, lane in enumerate(lanes) if len(lane.ids) > 1]
        slots = [lanes[number].slot for number in self.single]
        # Slots side by side, read where they lie; those between that have no lane cost little.
        self.first, self.stop = (min(slots), max(slots) + 1) if slots else (0, 0)
        self._offsets = torch.tensor([slot - self.first for slot in slots], device=device)
        self._tokens = torch.tensor([self.places[n].start for n in self.single], device=device)
        self._rows = torch.tensor(slots, device=device)
        self._ends = torch.tensor([lanes[n].start for n in self.single], device=device)
        self._single_masks: dict[int | None, tuple[torch.Tensor, int]] = {}
        self._long_masks: dict[tuple[int, int | None], torch.Tensor | None] = {}

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
        scale: float | None,
    ) -> torch.Tensor:
        """Attended values (T, H, D) of the pass's queries (H, T, D); keys and values are kept."""
        self.layers.add(layer)
        keys, values = self.cache.of(layer, key[None], value[None], self.longest)
        out = query.new_empty((query.shape[1], query.shape[0], value.shape[2]))
        if self.single:
            keys[self._rows, :, self._ends] = key[:, self._tokens].transpose(0, 1).to(keys.dtype)
            values[self._rows, :, self._ends] = (
                value[:, self._tokens].transpose(0, 1).to(keys.dtype)
            )
            mask, length = self._single_mask(window)
            groups = key.shape[0]
            asked = query[:, self._tokens].transpose(0, 1)
            spread = query.new_zeros((self.stop - self.first, *asked.shape[1:]))
            spread[self._offsets] = asked
            # Heads that share keys stand where queries do: no key is copied for them.
            found = functional.scaled_dot_product_attention(
                spread.view(spread.shape[0], groups, -1, spread.shape[2]).to(keys.dtype),
                keys[self.first : self.stop, :, :length],
                values[self.first : self.stop, :, :length],
                attn_mask=mask.to(keys.dtype),
                scale=scale,
            )
            out[self._tokens] = found.flatten(1, 2)[self._offsets].to(out.dtype)
        for number in self.long:
            lane, place = self.lanes[number], self.places[number]
            keys[lane.slot, :, lane.start : lane.end] = key[:, place].to(keys.dtype)
            values[lane.slot, :, lane.start : lane.end] = value[:, place].to(keys.dtype)
            out[place] = self._long(number, query[:, place], keys, values, window, scale)
        return out

    def _long(
        self,
        number: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        window: int | None,
        scale: float | None,
    ) -> torch.Tensor:
        """Attended values (t, H, D) of a lane of several tokens."""
        lane = self.lanes[number]
        groups = keys.shape[1]
        mask = self._long_mask(number, window)
        asked = query.view(groups, -1, *query.shape[1:])
        seen_keys, seen_values = (
            tensor[lane.slot, :, None, : lane.end].expand(-1, asked.shape[1], -1, -1)
            for tensor in (keys, values)
        )
        found = functional.scaled_dot_product_attention(
            asked.to(keys.dtype),
            seen_keys,
            seen_values,
            attn_mask=None if mask is None else mask.to(keys.dtype),
            is_causal=mask is None,
            scale=scale,
        )
        return found.flatten(0, 1).transpose(0, 1).to(query.dtype)

    def _single_mask(self, window: int | None) -> tuple[torch.Tensor, int]:
        """Additive mask (slots, 1, 1, tokens) of lanes of one token, and the tokens that matter."""
        if window not in self._single_masks:
            length = max(self.lanes[number].end for number in self.single)
            at = torch.arange(length, device=self.device)
            ends = self._ends[:, None]
            seen = at <= ends
            if window is not None:
                seen &= at > ends - window
            mask = torch.zeros((self.stop - self.first, length), device=self.device)
            mask[self._offsets] = mask[self._offsets].masked_fill_(~seen, float("-inf"))
            self._single_masks[window] = mask[:, None, None], length
        return self._single_masks[window]

    def _long_mask(self, number: int, window: int | None) -> torch.Tensor | None:
        """Additive mask (t, tokens), or None where order within the lane says it all."""
        lane = self.lanes[number]
        if lane.start == 0 and (window is None or lane.end <= window):
            return None
        if (number, window) not in self._long_masks:
            at = torch.arange(lane.end, device=self.device)
            queries = torch.arange(lane.start, lane.end, device=self.device)[:, None]
            hidden = at > queries
            if window is not None:
                hidden |= at <= queries - window
            mask = torch.zeros(hidden.shape, device=self.device)
            self._long_masks[number, window] = mask.masked_fill_(hidden, float("-inf"))
        return self._long_masks[number, window]


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    lanes: SlotBatch | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' call of an attention, over the lanes of a pass."""
    if lanes is None or options.get("softcap") or options.get("s_aux") is not None:
        raise ModelError(
            f"{type(module).__name__}: capped scores or sinks, which this attention does not have. Use"
            " --engine vllm or llama.cpp"
        )
    window = options.get("sliding_window")
    found = lanes.attend(module.layer_idx, query[0], key[0], value[0], window, scaling)
    return found[None], None


def register() -> None:
    """Teach transformers the attention; it has no mask, as none is made for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
