"""Owns the forward pass that many requests share: their new tokens in one row, each on its own KV cache.

The input of a request is what it adds in a pass: a piece of its prompt, or the token that it generated last.
Inputs are laid end to end without padding (continuous batching, Orca, OSDI 2022 §3.2), each attends to its
own slot of the cache, and each is changed by its own adapter. So one quantised base serves all requests, and
is dequantised once for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from halfbyte.errors import ModelError
from halfbyte.forward.kv_cache import GROWTH, KVCache
from halfbyte.forward.multi_lora import MERGE_ADVICE, MixedLinear
from halfbyte.forward.slot_attention import NAME, SlotBatch, register
from halfbyte.forward.slot_decode import DecodeBatch
from halfbyte.forward.slot_paths import SlotInput
from halfbyte.generate.decode_recorder import DecodeRecorder
from halfbyte.kernels.operators import uses_operators

# Kinds of layers whose only state is keys and values.
LAYER_TYPES = {"full_attention", "sliding_attention"}


class Backend(Protocol):
    """A model with slots, whatever computes it.

    Attributes:
        num_slots: number of requests at once.
        max_context: largest number of tokens of a prompt and its answer.
        vocab_size: V, number of logits.
        can_copy: whether ``copy`` works.
        device: where the cache lies.
        unused_bytes: bytes that the cache may still take there.
    """

    num_slots: int
    max_context: int
    vocab_size: int
    can_copy: bool
    device: torch.device

    @property
    def unused_bytes(self) -> int:
        """See the class."""

    def run(self, inputs: Sequence[SlotInput]) -> torch.Tensor:
        """Compute a pass; return logits (N, V), fp32, on the CPU: the last ``num_logits`` of each input in turn."""

    def keep(self, slot: int, length: int) -> int:
        """Drop the tokens of a slot from number ``length`` on; return how many could be kept."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of one slot to another; only where ``can_copy``."""

    def forget(self) -> None:
        """Free what the cache holds; all slots are empty afterwards."""


class SlotModel:
    """A transformers model with adapters, as a backend.

    Args:
        model: a causal language model; inputs with an adapter need ``mix_adapters`` first.
        num_slots: number of requests at once.
        max_context: largest number of tokens of a prompt and its answer.
        dtype: of keys and values.
        cache_bytes: bytes that keys and values may take, which are known to be free.
        growth: number of tokens by which each slot of the cache grows.
        graphs: on CUDA, record passes of one token each and replay them.

    Raises:
        ModelError: some of its layers are not attention.
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
        graphs: bool = True,
    ) -> None:
        register()
        self.model = model
        self.num_slots, self.max_context = num_slots, max_context
        self._cache_bytes = cache_bytes
        self.device = next(model.parameters()).device
        self.dtype = dtype
        text_config = model.config.get_text_config()
        self.vocab_size = int(text_config.vocab_size)
        self.num_layers = int(text_config.num_hidden_layers)
        others = set(getattr(text_config, "layer_types", None) or LAYER_TYPES) - LAYER_TYPES
        if others:
            raise ModelError(
                f"{type(model).__name__}: layers of the kind {', '.join(sorted(others))}, for which"
                f" requests cannot share a pass. {MERGE_ADVICE} by --engine vllm, or as GGUF by llama.cpp"
            )
        self.mixed = [module for module in model.modules() if isinstance(module, MixedLinear)]
        self.adapters = {name for layer in self.mixed for name in layer.lora}
        self._cache = KVCache(num_slots, dtype, self.device, growth)
        self._recorder = None
        if graphs and uses_operators(self.device):
            self._recorder = DecodeRecorder(self._call, self._cache, self.device)
        model.set_attn_implementation(NAME)
        model.eval()

    @property
    def unused_bytes(self) -> int:
        """As ``Backend.unused_bytes``."""
        return max(0, self._cache_bytes - self._cache.num_bytes)

    @torch.inference_mode()
    def run(self, inputs: Sequence[SlotInput]) -> torch.Tensor:
        """As ``Backend.run``."""
        logits, rows = self.logits(inputs)
        order = torch.tensor([row for input_rows in rows for row in input_rows], device=self.device)
        return logits[order].float().to("cpu")  # (N, V)

    @torch.inference_mode()
    def logits(self, inputs: Sequence[SlotInput]) -> tuple[torch.Tensor, list[range]]:
        """Compute a pass; return logits (N, V), and for each input which of their rows are its own.

        N is the sum of ``num_logits``: those of the last tokens of each input.

        Raises:
            ModelError: an adapter is unknown, or some layers bypass transformers' attention interface.
        """
        return self._pass(inputs, self._cache)

    @torch.inference_mode()
    def share(self, ids: list[int], *, apart: bool) -> None:
        """Let all slots begin with the same tokens, which are computed once; before any other pass.

        ``apart``: keep them once, too; else each slot gets a copy.
        """
        beginning = KVCache(1, self.dtype, self.device, growth=len(ids))
        self._pass([SlotInput(0, None, ids, 0)], beginning)
        self._cache.share(beginning, len(ids), apart=apart)

    def _pass(
        self, inputs: Sequence[SlotInput], cache: KVCache
    ) -> tuple[torch.Tensor, list[range]]:
        order = sorted(
            range(len(inputs)), key=lambda n: (inputs[n].adapter or "", len(inputs[n].ids))
        )
        ordered = [inputs[number] for number in order]
        unknown = {slot_input.adapter for slot_input in inputs} - self.adapters - {None}
        if unknown:
            raise ModelError(f"no layer has the adapter {', '.join(map(str, unknown))}")
        rows, start = [range(0)] * len(inputs), 0
        for number in order:
            rows[number] = range(start, start + inputs[number].num_logits)
            start = rows[number].stop
        logits = None
        if self._recorder is not None and cache is self._cache:
            logits = self._recorder.logits(ordered)
        if logits is None:
            batch = SlotBatch(ordered, cache, self.device)
            ids = [token for one in ordered for token in one.ids]
            positions = [at for one in ordered for at in range(one.start, one.end)]
            numbers = torch.tensor([ids, positions], device=self.device)  # (2, T)
            logits = self._call(numbers[0], numbers[1], batch.logit_indices, batch)
        return logits, rows

    def _call(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        logit_indices: torch.Tensor,
        batch: SlotBatch | DecodeBatch,
    ) -> torch.Tensor:
        """Return the logits (N, V) of a pass of tokens (T,) at their positions (T,)."""
        for layer in self.mixed:
            layer.ranges = batch.adapter_ranges
        output = self.model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=logit_indices,
            slot_batch=batch,
        )
        num_attended = len(batch.attended_layers)
        if num_attended != self.num_layers:
            raise ModelError(
                f"{type(self.model).__name__}: only {num_attended} of its {self.num_layers} layers use"
                " transformers' attention interface, so requests cannot share a pass. Use --engine vllm"
                " or llama.cpp"
            )
        logits: torch.Tensor = output.logits[0]  # (1, N, V) → (N, V)
        return logits

    def keep(self, slot: int, length: int) -> int:
        """As ``Backend.keep``; tokens that come later overwrite the others."""
        return length

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        """As ``Backend.copy``."""
        self._cache.copy(source, target, length)

    def forget(self) -> None:
        """As ``Backend.forget``."""
        self._cache.clear()


def token_bytes(text_config: Any, dtype: torch.dtype) -> int:
    """Return the bytes of a token's keys and values in all layers, from a model's text configuration."""
    heads = int(
        getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    )
    size = int(
        getattr(text_config, "head_dim", None)
        or text_config.hidden_size // text_config.num_attention_heads
    )
    return 2 * int(text_config.num_hidden_layers) * heads * size * dtype.itemsize
