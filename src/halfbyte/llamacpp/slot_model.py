"""Owns serving a GGUF file in llama.cpp as a backend, with one sequence for each slot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from halfbyte.data.conversation import Row, tools_of
from halfbyte.data.render import Renderer
from halfbyte.errors import ModelError
from halfbyte.forward.slot_paths import SlotInput
from halfbyte.llamacpp.library import CONTEXT_FIELDS
from halfbyte.llamacpp.model import GgufModel


class LlamaSlotModel:
    """Runs a model in llama.cpp as a backend.

    It has no adapters per request: serve the merged model's file instead.

    Args:
        model: the loaded file.
        num_slots: the number of requests at once; each has its own stream of the KV cache, allocated now.
        max_context: the most tokens that a prompt and its answer may have.
        prompt_tokens: the most prompt tokens in one pass.

    Raises:
        ModelError: the cache cannot be allocated.
    """

    can_copy = False
    unused_bytes = 0  # llama.cpp allocates its whole cache at once

    def __init__(
        self, model: GgufModel, *, num_slots: int, max_context: int, prompt_tokens: int
    ) -> None:
        self.gguf, self.num_slots, self.max_context = model, num_slots, max_context
        self.device = torch.device("cpu")
        self.vocab_size = model.vocab_size
        lib = model.lib
        settings = lib.llama_context_default_params()
        batch_tokens = prompt_tokens + num_slots
        values = {
            "n_ctx": num_slots * max_context,
            "n_batch": batch_tokens,
            "n_ubatch": batch_tokens,
            "n_seq_max": num_slots,
        }
        for field, value in values.items():
            settings.put(field, *CONTEXT_FIELDS[field], value)
        self._context = lib.llama_init_from_model(model.model, settings)
        if not self._context:
            raise ModelError(
                f"{model.path}: llama.cpp cannot allocate a cache of {num_slots} x {max_context} tokens:"
                f" {lib.pop_error()}."
                " Use fewer --slots or a shorter --max-context"
            )
        threads = torch.get_num_threads()
        lib.llama_set_n_threads(self._context, threads, threads)

    def run(self, inputs: Sequence[SlotInput]) -> torch.Tensor:
        """As ``Backend.run``."""
        lib = self.gguf.lib
        num_tokens = sum(len(slot_input.ids) for slot_input in inputs)
        batch = lib.llama_batch_init(num_tokens, 0, 1)
        wanted = []
        try:
            batch.n_tokens = num_tokens
            at = 0
            for slot_input in inputs:
                for position, token in enumerate(slot_input.ids, start=slot_input.start):
                    batch.token[at], batch.pos[at] = token, position
                    batch.n_seq_id[at], batch.seq_id[at][0] = 1, slot_input.slot
                    batch.logits[at] = position >= slot_input.end - slot_input.num_logits
                    if batch.logits[at]:
                        wanted.append(at)
                    at += 1
            code = lib.llama_decode(self._context, batch)
        finally:
            lib.llama_batch_free(batch)
        if code:
            raise ModelError(f"{self.gguf.path}: llama.cpp failed ({code}): {lib.pop_error()}")
        rows = [
            np.ctypeslib.as_array(lib.llama_get_logits_ith(self._context, at), (self.vocab_size,))
            for at in wanted
        ]
        return torch.from_numpy(np.stack(rows))  # a copy: the next call overwrites the logits

    def keep(self, slot: int, length: int) -> int:
        """As ``Backend.keep``; a recurrent state cannot be truncated and starts anew."""
        lib = self.gguf.lib
        memory = lib.llama_get_memory(self._context)
        if lib.llama_memory_seq_rm(memory, slot, length, -1):
            return length
        lib.llama_memory_seq_rm(memory, slot, 0, -1)
        return 0

    def copy(self, source: int, target: int, length: int) -> None:
        """Refuse: streams of the cache cannot be shared."""
        raise NotImplementedError

    def forget(self) -> None:
        """As ``Backend.forget``."""
        lib = self.gguf.lib
        lib.llama_memory_clear(lib.llama_get_memory(self._context), False)


def check_prompts(model: GgufModel, renderer: Renderer, rows: Sequence[Row]) -> None:
    """Check that a file's own template and tokenizer give the prompts that transformers gives.

    Args:
        model: the file.
        renderer: the renderer that transformers' tokenizer is used with.
        rows: conversations that end where an answer begins, with their tools.

    Raises:
        ModelError: a prompt differs.
    """
    for row in rows:
        tools = tools_of(row.tools) if row.tools else None
        _, theirs = model.prompt(renderer.turns(row.messages), tools)
        ours = renderer.encode_prompt(row.messages, row.place, row.tools)
        if ours != theirs:
            raise ModelError(
                f"{model.path}: the template or tokenizer in the file is not the one that transformers reads: a"
                f" probe ({row.place}) has {len(theirs)} tokens in llama.cpp and {len(ours)} there"
            )
