"""Owns a GGUF file in llama.cpp as a backend: one sequence for each slot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from halfbyte.errors import ModelError
from halfbyte.forward.slot_attention import SlotInput
from halfbyte.llamacpp.library import CONTEXT_FIELDS
from halfbyte.llamacpp.model import GgufModel


class LlamaSlotModel:
    """A model in llama.cpp. It has no adapters by request: serve the merged model's file.

    Args:
        model: the loaded file.
        num_slots: requests at once; each has its own stream of the cache, allocated now.
        max_context: tokens of a prompt and its answer, at most.
        prompt_tokens: of prompts in one pass, at most.

    Raises:
        ModelError: the cache cannot be allocated.
    """

    can_copy = False
    unused_bytes = 0  # llama.cpp takes its cache at once

    def __init__(
        self, model: GgufModel, *, num_slots: int, max_context: int, prompt_tokens: int
    ) -> None:
        self.gguf, self.num_slots, self.max_context = model, num_slots, max_context
        self.device = torch.device("cpu")
        self.vocab_size = model.vocab_size
        lib = model.lib
        settings = lib.llama_context_default_params()
        batch = prompt_tokens + num_slots
        wanted = {
            "n_ctx": num_slots * max_context,
            "n_batch": batch,
            "n_ubatch": batch,
            "n_seq_max": num_slots,
        }
        for field, value in wanted.items():
            settings.put(field, *CONTEXT_FIELDS[field], value)
        self._context = lib.llama_init_from_model(model.model, settings)
        if not self._context:
            raise ModelError(
                f"{model.path}: no cache of {num_slots} x {max_context} tokens: {lib.told()}."
                " Use fewer --slots or a shorter --max-context"
            )
        threads = torch.get_num_threads()
        lib.llama_set_n_threads(self._context, threads, threads)

    def run(self, lanes: Sequence[SlotInput]) -> torch.Tensor:
        """As ``Backend.run``."""
        lib = self.gguf.lib
        total = sum(len(lane.ids) for lane in lanes)
        batch = lib.llama_batch_init(total, 0, 1)
        last = []
        try:
            batch.n_tokens = total
            at = 0
            for lane in lanes:
                for position, token in enumerate(lane.ids, start=lane.start):
                    batch.token[at], batch.pos[at] = token, position
                    batch.n_seq_id[at], batch.seq_id[at][0] = 1, lane.slot
                    batch.logits[at] = position == lane.end - 1
                    at += 1
                last.append(at - 1)
            code = lib.llama_decode(self._context, batch)
        finally:
            lib.llama_batch_free(batch)
        if code:
            raise ModelError(f"{self.gguf.path}: llama.cpp fails ({code}): {lib.told()}")
        rows = [
            np.ctypeslib.as_array(lib.llama_get_logits_ith(self._context, at), (self.vocab_size,))
            for at in last
        ]
        return torch.from_numpy(np.stack(rows))  # a copy: the next call writes over them

    def keep(self, slot: int, length: int) -> int:
        """As ``Backend.keep``; a recurrent state cannot go back, and begins anew."""
        lib = self.gguf.lib
        memory = lib.llama_get_memory(self._context)
        if lib.llama_memory_seq_rm(memory, slot, length, -1):
            return length
        lib.llama_memory_seq_rm(memory, slot, 0, -1)
        return 0

    def copy(self, source: int, target: int, length: int) -> None:
        """Streams of the cache do not share."""
        raise NotImplementedError

    def forget(self) -> None:
        """As ``Backend.forget``."""
        lib = self.gguf.lib
        lib.llama_memory_clear(lib.llama_get_memory(self._context), False)
