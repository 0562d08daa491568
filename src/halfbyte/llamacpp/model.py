"""Owns running a GGUF file in llama.cpp: its tokens, its logits, its answers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfbyte.data.encoded import IGNORED
from halfbyte.errors import ModelError
from halfbyte.generate.batched import Answer
from halfbyte.llamacpp.gguf_file import BATCH_TOKENS, CONTEXT_STEP
from halfbyte.llamacpp.library import CONTEXT_FIELDS, GPU_LAYERS, library
from halfbyte.llamacpp.tools import library_path

METADATA_BYTES = 1 << 20


class GgufModel:
    """Runs a GGUF file in llama.cpp, with or without a LoRA adapter in GGUF.

    Successive prompts share their prefix: the part of the KV cache that the next prompt begins with stays.

    Args:
        path: the file.
        gpu_layers: how many layers go into VRAM, the output first, then the last layers; the others stay in
            RAM. -1: all.
        adapter: a LoRA adapter in GGUF, applied at full scale.

    Raises:
        ModelError: llama.cpp is missing, cannot read the file, or has no GPU support though layers should
            go into VRAM.
    """

    def __init__(self, path: Path, *, gpu_layers: int = 0, adapter: Path | None = None) -> None:
        self.path, self.gpu_layers = path, gpu_layers
        self.lib = library(library_path())
        self._adapter: Any = None
        self._context: Any = None
        self._cached_ids: list[int] = []  # tokens in the KV cache
        if gpu_layers and not self.lib.llama_supports_gpu_offload():
            raise ModelError(
                f"{path}: {'all' if gpu_layers < 0 else gpu_layers} layers should go into VRAM, but"
                f" {self.lib.path} is a build for the CPU only. Install llama-cpp-python for your GPU, or set HALFBYTE_LIBLLAMA to such a build"
            )
        settings = self.lib.llama_model_default_params()
        settings.put("n_gpu_layers", *GPU_LAYERS, 9999 if gpu_layers < 0 else gpu_layers)
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), settings)
        if not self.model:
            raise ModelError(f"{path}: llama.cpp cannot load it: {self.lib.pop_error()}")
        self._vocab = self.lib.llama_model_get_vocab(self.model)
        self.vocab_size: int = self.lib.llama_vocab_n_tokens(self._vocab)
        if adapter is not None:
            self._adapter = self.lib.llama_adapter_lora_init(self.model, str(adapter).encode())
            if not self._adapter:
                self.close()
                raise ModelError(f"{adapter}: llama.cpp cannot load it: {self.lib.pop_error()}")

    def close(self) -> None:
        """Free the memory; the model cannot be used afterwards."""
        if self._context:
            self.lib.llama_free(self._context)
        if self.model:
            self.lib.llama_model_free(self.model)  # with its adapters
        self._context = self.model = None

    def __enter__(self) -> GgufModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def chat_template(self) -> str | None:
        """Return the Jinja template inside the file, or None."""
        text = self.lib.llama_model_chat_template(self.model, None)
        return None if text is None else str(text.decode("utf-8"))

    def metadata(self, key: str) -> str | None:
        """Return a value of the file's metadata as text, such as that of ``general.architecture``."""
        buffer = ctypes.create_string_buffer(METADATA_BYTES)
        length = self.lib.llama_model_meta_val_str(self.model, key.encode(), buffer, METADATA_BYTES)
        return None if length < 0 else buffer.value.decode("utf-8", "replace")

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Tokenize a rendered conversation, special tokens included.

        ``add_special``: put BOS in front if the file says so.
        """
        content = text.encode("utf-8")
        ids = (ctypes.c_int32 * (len(content) + 8))()
        count = self.lib.llama_tokenize(
            self._vocab, content, len(content), ids, len(ids), add_special, True
        )
        return list(ids[:count])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, with the special tokens among them, such as marks of thoughts."""
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        buffer = ctypes.create_string_buffer(METADATA_BYTES)
        length = self.lib.llama_detokenize(
            self._vocab, tokens, len(ids), buffer, METADATA_BYTES, False, True
        )
        return buffer.raw[: max(0, length)].decode("utf-8", "replace")

    def prompt(
        self, turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> tuple[str, list[int]]:
        """Render a generation prompt to text and ids with the file's own chat template and tokenizer.

        Args:
            turns: the conversation, as chat templates take it.
            tools: the tools that may be called.

        Raises:
            ModelError: the file has no chat template, or the template rejects the conversation.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        if self.chat_template is None:
            raise ModelError(
                f"{self.path}: holds no chat template, so no conversation can be rendered"
            )
        bos, eos = self._token_text("bos"), self._token_text("eos")
        try:
            (text,), _ = render_jinja_template(
                [turns],
                tools=tools,
                chat_template=self.chat_template,
                add_generation_prompt=True,
                bos_token=bos,
                eos_token=eos,
            )
        except Exception as error:  # Jinja and the template's own raise_exception
            raise ModelError(
                f"{self.path}: its chat template rejects the conversation: {error}"
            ) from error
        has_bos = bool(bos) and text.startswith(bos)
        return text, self.tokenize(text, add_special=not has_bos)

    def describe(self) -> str:
        """Describe the file in one line."""
        buffer = ctypes.create_string_buffer(256)
        self.lib.llama_model_desc(self.model, buffer, 256)
        description = buffer.value.decode("utf-8", "replace")
        return f"{self.path.name}: {description}, {self.path.stat().st_size / 1e6:.0f} MB, in llama.cpp"

    def _token_text(self, kind: str) -> str:
        token = getattr(self.lib, f"llama_vocab_{kind}")(self._vocab)
        text = self.lib.llama_vocab_get_text(self._vocab, token) if token >= 0 else b""
        return str(text.decode("utf-8", "replace"))

    def ends(self, token: int) -> bool:
        """Return whether the file says that generation ends with this token."""
        return bool(self.lib.llama_vocab_is_eog(self._vocab, token))

    def logits(self, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Return the logits (len(positions), vocabulary), fp32, after the tokens at these positions."""
        self._ensure_context(len(ids))
        self._truncate_cache(0)
        logits = torch.empty(len(positions), self.vocab_size)
        row = {position: row for row, position in enumerate(positions)}
        for start in range(0, len(ids), BATCH_TOKENS):
            batch_ids = ids[start : start + BATCH_TOKENS]
            offsets = [at for at in range(len(batch_ids)) if start + at in row]
            self._decode(batch_ids, offsets)
            for at in offsets:
                logits[row[start + at]] = self._logits_at(at)
        return logits

    def predict(
        self, rows: list[tuple[list[int], list[int]]], positions: list[list[int]], vocabulary: int
    ) -> tuple[torch.Tensor, float]:
        """Return log-probabilities (N, W) at the positions of each row, and the mean loss on labels.

        W is the smaller of ``vocabulary`` and the file's vocabulary: embedding rows beyond it are padding,
        which no token uses.
        """
        selected, total, count = [], 0.0, 0
        width = min(vocabulary, self.vocab_size)
        for (ids, labels), keep in zip(rows, positions, strict=True):
            scored = sorted({*keep, *_before_labels(labels)})
            log_probs = torch.log_softmax(self.logits(ids, scored)[:, :width], dim=-1)
            row_of = {position: row for row, position in enumerate(scored)}
            selected.append(log_probs[[row_of[position] for position in keep]])
            nats, tokens = _loss(log_probs, row_of, labels)
            total, count = total + nats, count + tokens
        return torch.cat(selected), total / count

    def losses(self, rows: list[tuple[list[int], list[int]]]) -> list[tuple[float, int]]:
        """Return each row's summed loss in nats and its number of labelled tokens."""
        losses = []
        for ids, labels in rows:
            scored = _before_labels(labels)
            log_probs = torch.log_softmax(self.logits(ids, scored), dim=-1)
            row_of = {position: row for row, position in enumerate(scored)}
            losses.append(_loss(log_probs, row_of, labels))
        return losses

    def answers(
        self,
        prompts: Sequence[list[int]],
        *,
        stop_ids: list[int] | None,
        max_new_tokens: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """Generate greedy answers in the order of the prompts.

        ``stop_ids``: token ids that end an answer; None for the stop tokens that the file names.
        """
        self._ensure_context(max(map(len, prompts)) + max_new_tokens)
        answers = []
        for prompt in prompts:
            answers.append(self._answer(prompt, stop_ids, max_new_tokens))
            if progress is not None:
                progress(len(answers))
        return answers

    def _answer(self, prompt: list[int], stop_ids: list[int] | None, max_new_tokens: int) -> Answer:
        shared = 0
        for cached, token in zip(self._cached_ids, prompt[:-1], strict=False):
            if cached != token:
                break
            shared += 1
        shared = self._truncate_cache(shared)
        last = 0
        for start in range(shared, len(prompt), BATCH_TOKENS):
            batch_ids = prompt[start : start + BATCH_TOKENS]
            last = len(batch_ids) - 1
            self._decode(batch_ids, [last] if start + len(batch_ids) == len(prompt) else [])
        ids: list[int] = []
        while True:
            token = int(self._logits_at(last).argmax())
            if self.ends(token) if stop_ids is None else token in stop_ids:
                return Answer(ids, "stop")
            ids.append(token)
            if len(ids) == max_new_tokens:
                return Answer(ids, "length")
            self._decode([token], [0])
            last = 0

    def _ensure_context(self, num_tokens: int) -> None:
        """Replace the context if it is shorter than ``num_tokens``."""
        if self._context and self.lib.llama_n_ctx(self._context) >= num_tokens:
            return
        if self._context:
            self.lib.llama_free(self._context)
        settings = self.lib.llama_context_default_params()
        size = -(-num_tokens // CONTEXT_STEP) * CONTEXT_STEP
        values = {"n_ctx": size, "n_batch": BATCH_TOKENS, "n_ubatch": BATCH_TOKENS}
        for field, value in values.items():
            settings.put(field, *CONTEXT_FIELDS[field], value)
        self._context = self.lib.llama_init_from_model(self.model, settings)
        if not self._context:
            raise ModelError(
                f"{self.path}: llama.cpp cannot create a context of {size} tokens: {self.lib.pop_error()}"
            )
        self._cached_ids = []
        threads = torch.get_num_threads()
        self.lib.llama_set_n_threads(self._context, threads, threads)
        if self._adapter:
            self._apply_adapter()

    def _apply_adapter(self) -> None:
        if self.lib.has("llama_set_adapters_lora"):
            adapters = (ctypes.c_void_p * 1)(self._adapter)
            code = self.lib.llama_set_adapters_lora(
                self._context, adapters, 1, (ctypes.c_float * 1)(1.0)
            )
        else:
            code = self.lib.llama_set_adapter_lora(self._context, self._adapter, 1.0)
        if code:
            raise ModelError(
                f"{self.path}: llama.cpp cannot apply the adapter: {self.lib.pop_error()}"
            )

    def _truncate_cache(self, length: int) -> int:
        """Drop the cache from token ``length`` on and return how many tokens could be kept."""
        memory = self.lib.llama_get_memory(self._context)
        if length == 0 or not self.lib.llama_memory_seq_rm(memory, 0, length, -1):
            self.lib.llama_memory_clear(memory, False)
            length = 0
        del self._cached_ids[length:]
        return length

    def _decode(self, ids: Sequence[int], offsets: Sequence[int]) -> None:
        """Append tokens to the cache and compute the logits of those at ``offsets``."""
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            with_logits = set(offsets)
            for at, token in enumerate(ids):
                batch.token[at], batch.pos[at] = token, len(self._cached_ids) + at
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
                batch.logits[at] = at in with_logits
            code = self.lib.llama_decode(self._context, batch)
        finally:
            self.lib.llama_batch_free(batch)
        if code:
            raise ModelError(f"{self.path}: llama.cpp failed ({code}): {self.lib.pop_error()}")
        self._cached_ids += ids

    def _logits_at(self, at: int) -> torch.Tensor:
        """Return a view of a token's logits, valid until the next call."""
        pointer = self.lib.llama_get_logits_ith(self._context, at)
        return torch.from_numpy(np.ctypeslib.as_array(pointer, (self.vocab_size,)))


def _before_labels(labels: list[int]) -> list[int]:
    """Return the positions whose next token has a label."""
    return [at - 1 for at, label in enumerate(labels) if at and label != IGNORED]


def _loss(log_probs: torch.Tensor, row_of: dict[int, int], labels: list[int]) -> tuple[float, int]:
    positions = _before_labels(labels)
    rows = [row_of[at] for at in positions]
    targets = [labels[at + 1] for at in positions]
    return -float(log_probs[rows, targets].double().sum()), len(positions)
