"""Owns the inputs of slots, and the attention of those of several tokens in one call.

Shapes: N tokens of all inputs, K keys that they see, P shared tokens, C cached tokens of a slot, H query heads, G
key-value heads, D head size.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from halfbyte.forward.varlen_attention import VarlenTree


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


@dataclass(frozen=True)
class SlotPaths:
    """All prefill inputs as one varlen attention: the keys of each are what its slot holds then.

    Attributes:
        tree: where the N queries and K keys of each input begin.
        slots: (K,), of each key its slot.
        places: (K,), its place there; 0 for shared tokens.
        positions: (K,), its place among the shared tokens; any for others.
        is_shared: (K, 1, 1), whether it is one of them.
    """

    tree: VarlenTree
    slots: torch.Tensor
    places: torch.Tensor
    positions: torch.Tensor
    is_shared: torch.Tensor

    @classmethod
    def of(cls, inputs: list[SlotInput], num_shared: int, device: torch.device) -> SlotPaths:
        """Lay out inputs of several tokens, in this order."""
        lengths = [[len(one.ids) for one in inputs], [one.end for one in inputs]]
        starts = [list(itertools.accumulate(each, initial=0)) for each in lengths]
        numbers = [[one.slot, at] for one in inputs for at in range(one.end)]
        slots, positions = torch.tensor(numbers, device=device).T
        begins = [torch.tensor(each, dtype=torch.int32, device=device) for each in starts]
        tree = VarlenTree(begins[0], begins[1], (max(lengths[0]), max(lengths[1])), None)
        is_shared = (positions < num_shared)[:, None, None]
        places = (positions - num_shared).clamp(min=0)
        return cls(tree, slots, places, positions.clamp(max=num_shared - 1), is_shared)

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        shared: tuple[torch.Tensor, torch.Tensor] | None,
        window: int | None,
        scale: float,
    ) -> torch.Tensor:
        """Compute the attention output (N, H, D) of queries (N, H, D).

        Args:
            query: in the order of the inputs.
            keys: of all slots, (slots, G, C, D).
            values: the same.
            shared: those of the shared tokens, (G, P, D) each, or None.
            window: a token attends to itself and the ``window - 1`` tokens before it.
            scale: factor of the scores.
        """
        pair = []
        for number, held in enumerate((keys, values)):
            own = held[self.slots, :, self.places]  # (K, G, D)
            if shared is not None:
                first = shared[number].transpose(0, 1)[self.positions]  # (K, G, D)
                own = torch.where(self.is_shared, first, own)
            pair.append(own)
        return self.tree.attend_rows(query, pair[0], pair[1], window, scale)
