"""Owns the forward pass that many requests share: their new tokens in one row, each on its own cache.

A lane is what one request adds in a pass: a piece of its prompt, or the token it generated last. Lanes
are laid end to end without padding (continuous batching, Orca, OSDI 2022 §3.2), each attends to its own
slot of the cache, and each is changed by its own adapter, so that one quantised base serves all of them
and is dequantised once for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from halfbyte.errors import ModelError
from halfbyte.forward.multi_lora import UNSERVED, MixedLinear
from halfbyte.forward.slot_attention import GROWTH, NAME, KVCache, SlotBatch, SlotInput, register

# Kinds of layers whose only state is keys and values.
ATTENDS = {"full_attention", "sliding_attention"}


class Backend(Protocol):
    """What computes: a model with a number of slots.

    Attributes:
        device: where the cache lies.
        unused_bytes: what it may yet take there.
    """

    num_slots: int
    max_context: int
    vocab_size: int
    can_copy: bool
    device: torch.device

    @property
    def unused_bytes(self) -> int:
        """See the class."""

    def run(self, lanes: Sequence[SlotInput]) -> torch.Tensor:
        """Logits (len(lanes), V), fp32, after the last token of each lane."""

    def keep(self, slot: int, length: int) -> int:
        """Drop what a slot holds from token ``length`` on; returns how many could be kept."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a slot begin as another one does; where ``can_copy``."""

    def forget(self) -> None:
        """Give back what the cache holds; all slots are empty afterwards."""


class SlotModel:
    """A transformers model with adapters, as a backend.

    Args:
        model: a causal language model; lanes with an adapter need ``mix_adapters`` first.
        num_slots: requests at once.
        max_context: tokens of a prompt and its answer, at most.
        dtype: of keys and values.
        cache_bytes: what they may take, which was found to be there.
        growth: tokens of each slot by which the cache grows.

    Raises:
        ModelError: its attention does not take part.
    """

    can_copy = True

    def __init__(
        self,
        model: Any,
        *,
        num_slots: int,
        max_context: int,
        dtype: torch.dtype,
        cache_bytes: int = 0,
        growth: int = GROWTH,
    ) -> None:
        register()
        self.model = model
        self.num_slots, self.max_context = num_slots, max_context
        self._cache_bytes = cache_bytes
        self.device = next(model.parameters()).device
        self.dtype = dtype
        text = model.config.get_text_config()
        self.vocab_size = int(text.vocab_size)
        self.num_layers = int(text.num_hidden_layers)
        others = set(getattr(text, "layer_types", None) or ATTENDS) - ATTENDS
        if others:
            raise ModelError(
                f"{type(model).__name__}: layers of the kind {', '.join(sorted(others))}, which requests"
                f" cannot share a pass in. {UNSERVED} by --engine vllm, or as GGUF by llama.cpp"
            )
        self.mixed = [module for module in model.modules() if isinstance(module, MixedLinear)]
        self.adapters = {name for layer in self.mixed for name in layer.lora}
        self._cache = KVCache(num_slots, dtype, self.device, growth)
        model.set_attn_implementation(NAME)
        model.eval()

    @property
    def unused_bytes(self) -> int:
        """As ``Backend.unused_bytes``."""
        return max(0, self._cache_bytes - self._cache.num_bytes)

    @torch.inference_mode()
    def run(self, lanes: Sequence[SlotInput]) -> torch.Tensor:
        """As ``Backend.run``."""
        logits, rows = self.logits(lanes)
        last = torch.tensor([own[-1] for own in rows], device=self.device)
        return logits[last].float().to("cpu")

    @torch.inference_mode()
    def logits(self, lanes: Sequence[SlotInput]) -> tuple[torch.Tensor, list[range]]:
        """Logits (N, V) after the last ``num_logits`` tokens of each lane, and which of them are whose."""
        order = sorted(range(len(lanes)), key=lambda n: (lanes[n].adapter or "", len(lanes[n].ids)))
        flat = [lanes[number] for number in order]
        unknown = {lane.adapter for lane in lanes} - self.adapters - {None}
        if unknown:
            raise ModelError(f"no layer has the adapter {', '.join(map(str, unknown))}")
        step = SlotBatch(flat, self._cache, self.device)
        ids = [token for lane in flat for token in lane.ids]
        positions = [at for lane in flat for at in range(lane.start, lane.end)]
        for layer in self.mixed:
            layer.ranges = step.ranges
        out = self.model(
            input_ids=torch.tensor([ids], device=self.device),
            position_ids=torch.tensor([positions], device=self.device),
            use_cache=False,
            logits_to_keep=step.told,
            lanes=step,
        )
        if len(step.layers) != self.num_layers:
            raise ModelError(
                f"{type(self.model).__name__}: {len(step.layers)} of its {self.num_layers} layers attend by"
                " way of transformers' interface, so requests cannot share a pass. Use --engine vllm or"
                " llama.cpp"
            )
        rows, start = [range(0)] * len(lanes), 0
        for number in order:
            rows[number] = range(start, start + lanes[number].num_logits)
            start = rows[number].stop
        return out.logits[0], rows

    def keep(self, slot: int, length: int) -> int:
        """As ``Backend.keep``; what comes later is written over."""
        return length

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        """As ``Backend.copy``."""
        self._cache.copy(source, target, length)

    def forget(self) -> None:
        """As ``Backend.forget``."""
        self._cache.layers.clear()


def token_bytes(text: Any, dtype: torch.dtype) -> int:
    """What keys and values of a token take in all layers, from a model's text configuration."""
    heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    return 2 * int(text.num_hidden_layers) * heads * width * dtype.itemsize
