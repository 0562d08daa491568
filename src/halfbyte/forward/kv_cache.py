"""Owns the keys and values of slots.

Shapes: C cached tokens of a slot, P shared tokens, T new tokens, G key-value heads, D head size.
"""

from __future__ import annotations

import torch

GROWTH = 256  # tokens by which the cache grows


class KVCache:
    """Keys and values (slots, G, C, D) of each layer; the storage grows as it is needed.

    Args:
        num_slots: number of slots.
        dtype: of keys and values.
        device: where they lie.
        growth: number of tokens by which each slot grows.

    Attributes:
        shared: keys and values (G, P, D) of each layer, of the tokens that all slots begin with and none
            holds.
        num_shared: P. A slot holds the tokens from position P on.
        version: changes whenever storage is allocated or freed.
    """

    def __init__(
        self, num_slots: int, dtype: torch.dtype, device: torch.device, growth: int
    ) -> None:
        self.num_slots, self.dtype, self.device = num_slots, dtype, device
        self.growth = growth
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.shared: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.num_shared = 0
        self.version = 0

    def share(self, beginning: KVCache, length: int, *, apart: bool) -> None:
        """Let all slots, which are empty, begin with the ``length`` tokens of the only slot of another cache.

        ``apart``: keep them once, beside the slots; else each slot gets a copy.
        """
        self.num_shared = length if apart else 0
        for layer, pair in beginning.layers.items():
            keys, values = (one[0, :, :length] for one in pair)  # (G, P, D) each
            if apart:
                self.shared[layer] = (keys, values)
                continue
            for kept, first in zip(self.storage(layer, *pair, length), (keys, values), strict=True):
                kept[:, :, :length] = first

    @property
    def capacity(self) -> int:
        """C, 0 before anything is kept."""
        return min((pair[0].shape[2] for pair in self.layers.values()), default=0)

    @property
    def num_bytes(self) -> int:
        """Bytes of the storage now."""
        return sum(tensor.nbytes for pair in self.layers.values() for tensor in pair)

    def storage(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values (slots, G, C, D) of a layer, with room for ``length`` tokens.

        Args:
            layer: number of the layer.
            key: new keys (1, G, T, D), whose shape counts.
            value: new values, likewise.
            length: smallest C.
        """
        current = self.layers.get(layer)
        if current is not None and current[0].shape[2] >= length:
            return current
        capacity = -(-length // self.growth) * self.growth
        pair = []
        for number, tensor in enumerate((key, value)):
            shape = (self.num_slots, tensor.shape[1], capacity, tensor.shape[3])
            grown = torch.zeros(shape, dtype=self.dtype, device=self.device)  # (slots, G, C, D)
            if current is not None:
                grown[:, :, : current[number].shape[2]] = current[number]
            pair.append(grown)
        self.layers[layer] = (pair[0], pair[1])
        self.version += 1
        return self.layers[layer]

    def put(
        self,
        layer: int,
        slots: torch.Tensor,
        places: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> None:
        """Keep new keys and values (G, T, D) of a layer that has room, at (T,) places of (T,) slots."""
        for held, new in zip(self.layers[layer], (key, value), strict=True):
            held[slots, :, places] = new.transpose(0, 1).to(held.dtype)  # (T, G, D)

    def clear(self) -> None:
        """Free what the slots hold."""
        self.layers.clear()
        self.version += 1

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of one slot to another."""
        for tensors in self.layers.values():
            for tensor in tensors:
                tensor[target, :, :length] = tensor[source, :, :length]
