"""Owns a GGUF file in llama.cpp: its tokens, its logits, its answers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfbyte.data.render import IGNORED
from halfbyte.data.rows import Message
from halfbyte.errors import ModelError
from halfbyte.generate.batched import Answer
from halfbyte.llamacpp.library import CONTEXT_FIELDS, GPU_LAYERS, library
from halfbyte.llamacpp.tools import engine_path

PIECE_TOKENS = 512  # of a prompt in one call, as by default
METADATA_BYTES = 1 << 20


class GgufModel:
    """A GGUF file loaded by llama.cpp, with a LoRA adapter in GGUF on it or without.

    Prompts share what they begin with: the part of the cache that fits the next one stays.

    Args:
        path: the file.
        gpu_layers: layers in VRAM, the output first, then the last ones; the rest stays in RAM. -1: all.
        adapter: a LoRA adapter in GGUF, at its full scale.

    Raises:
        ModelError: no llama.cpp, it cannot read the file, or it knows no GPU where one is asked for.
    """

    def __init__(self, path: Path, *, gpu_layers: int = 0, adapter: Path | None = None) -> None:
        self.path, self.gpu_layers = path, gpu_layers
        self.lib = library(engine_path())
        self._adapter: Any = None
        self._context: Any = None
        self._held: list[int] = []  # tokens in the cache
        if gpu_layers and not self.lib.llama_supports_gpu_offload():
            raise ModelError(
                f"{path}: {gpu_layers} layers are to lie in VRAM, and {self.lib.path} is a build for the"
                " CPU alone. Install llama-cpp-python for your GPU, or set HALFBYTE_LIBLLAMA to such a build"
            )
        settings = self.lib.llama_model_default_params()
        settings.put("n_gpu_layers", *GPU_LAYERS, 9999 if gpu_layers < 0 else gpu_layers)
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), settings)
        if not self.model:
            raise ModelError(f"{path}: llama.cpp cannot load it: {self.lib.told()}")
        self._vocab = self.lib.llama_model_get_vocab(self.model)
        self.vocab_size: int = self.lib.llama_vocab_n_tokens(self._vocab)
        if adapter is not None:
            self._adapter = self.lib.llama_adapter_lora_init(self.model, str(adapter).encode())
            if not self._adapter:
                self.close()
                raise ModelError(f"{adapter}: llama.cpp cannot load it: {self.lib.told()}")

    def close(self) -> None:
        """Give the memory back; the model is of no use afterwards."""
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
        """The Jinja text inside the file."""
        text = self.lib.llama_model_chat_template(self.model, None)
        return None if text is None else str(text.decode("utf-8"))

    def metadata(self, key: str) -> str | None:
        """A value of the file's metadata as text, such as of ``general.architecture``."""
        buffer = ctypes.create_string_buffer(METADATA_BYTES)
        length = self.lib.llama_model_meta_val_str(self.model, key.encode(), buffer, METADATA_BYTES)
        return None if length < 0 else buffer.value.decode("utf-8", "replace")

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Ids of a rendered conversation: control tokens count.

        ``add_special``: put BOS in front where the file says that it is wanted.
        """
        content = text.encode("utf-8")
        ids = (ctypes.c_int32 * (len(content) + 8))()
        count = self.lib.llama_tokenize(
            self._vocab, content, len(content), ids, len(ids), add_special, True
        )
        return list(ids[:count])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens left out."""
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        buffer = ctypes.create_string_buffer(METADATA_BYTES)
        length = self.lib.llama_detokenize(
            self._vocab, tokens, len(ids), buffer, METADATA_BYTES, True, False
        )
        return buffer.raw[: max(0, length)].decode("utf-8", "replace")

    def prompt(self, messages: Sequence[Message]) -> tuple[str, list[int]]:
        """Text and ids of a generation prompt, by the template and the tokenizer inside the file.

        Raises:
            ModelError: the file has no template, or it refuses the conversation.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        if self.chat_template is None:
            raise ModelError(f"{self.path}: holds no chat template, so it cannot be talked to")
        turns = [{"role": message.role, "content": message.content} for message in messages]
        bos, eos = self._token_text("bos"), self._token_text("eos")
        try:
            (text,), _ = render_jinja_template(
                [turns],
                chat_template=self.chat_template,
                add_generation_prompt=True,
                bos_token=bos,
                eos_token=eos,
            )
        except Exception as error:  # Jinja and the template's own raise_exception
            raise ModelError(f"{self.path}: its chat template refuses it: {error}") from error
        starts = bool(bos) and text.startswith(bos)
        return text, self.tokenize(text, add_special=not starts)

    def describe(self) -> str:
        """What the file is, in a line."""
        buffer = ctypes.create_string_buffer(256)
        self.lib.llama_model_desc(self.model, buffer, 256)
        what = buffer.value.decode("utf-8", "replace")
        return f"{self.path.name}: {what}, {self.path.stat().st_size / 1e6:.0f} MB, in llama.cpp"

    def _token_text(self, kind: str) -> str:
        token = getattr(self.lib, f"llama_vocab_{kind}")(self._vocab)
        text = self.lib.llama_vocab_get_text(self._vocab, token) if token >= 0 else b""
        return str(text.decode("utf-8", "replace"))

    def ends(self, token: int) -> bool:
        """Whether generation ends with this token by what the file says."""
        return bool(self.lib.llama_vocab_is_eog(self._vocab, token))

    def logits(self, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Logits (len(positions), vocabulary), fp32, after the tokens at these positions."""
        self._make_room(len(ids))
        self._forget(0)
        found = torch.empty(len(positions), self.vocab_size)
        row = {position: row for row, position in enumerate(positions)}
        for start in range(0, len(ids), PIECE_TOKENS):
            piece = ids[start : start + PIECE_TOKENS]
            wanted = [at for at in range(len(piece)) if start + at in row]
            self._decode(piece, wanted)
            for at in wanted:
                found[row[start + at]] = self._logits_at(at)
        return found

    def predict(
        self, rows: list[tuple[list[int], list[int]]], positions: list[list[int]], vocabulary: int
    ) -> tuple[torch.Tensor, float]:
        """Log-probabilities (N, W) at the positions of each row, and the loss on labels.

        W is the smaller of ``vocabulary`` and the file's own: rows of an embedding beyond it are
        padding, which no token uses.
        """
        chosen, total, count = [], 0.0, 0
        width = min(vocabulary, self.vocab_size)
        for (ids, labels), keep in zip(rows, positions, strict=True):
            asked = sorted({*keep, *_before_labels(labels)})
            log_probs = torch.log_softmax(self.logits(ids, asked)[:, :width], dim=-1)
            place = {position: row for row, position in enumerate(asked)}
            chosen.append(log_probs[[place[position] for position in keep]])
            nats, tokens = _loss(log_probs, place, labels)
            total, count = total + nats, count + tokens
        return torch.cat(chosen), total / count

    def losses(self, rows: list[tuple[list[int], list[int]]]) -> list[tuple[float, int]]:
        """Summed loss in nats and number of labelled tokens of each row."""
        found = []
        for ids, labels in rows:
            asked = _before_labels(labels)
            log_probs = torch.log_softmax(self.logits(ids, asked), dim=-1)
            place = {position: row for row, position in enumerate(asked)}
            found.append(_loss(log_probs, place, labels))
        return found

    def answers(
        self,
        prompts: Sequence[list[int]],
        *,
        stop_ids: list[int] | None,
        max_new_tokens: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """Greedy answers, in the order of the prompts; without ``stop_ids`` the file's own end them."""
        self._make_room(max(map(len, prompts)) + max_new_tokens)
        made = []
        for prompt in prompts:
            made.append(self._answer(prompt, stop_ids, max_new_tokens))
            if progress is not None:
                progress(len(made))
        return made

    def _answer(self, prompt: list[int], stop_ids: list[int] | None, max_new_tokens: int) -> Answer:
        shared = 0
        for ours, theirs in zip(self._held, prompt[:-1], strict=False):
            if ours != theirs:
                break
            shared += 1
        shared = self._forget(shared)
        last = 0
        for start in range(shared, len(prompt), PIECE_TOKENS):
            piece = prompt[start : start + PIECE_TOKENS]
            last = len(piece) - 1
            self._decode(piece, [last] if start + len(piece) == len(prompt) else [])
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

    def _make_room(self, num_tokens: int) -> None:
        """A context of at least so many tokens."""
        if self._context and self.lib.llama_n_ctx(self._context) >= num_tokens:
            return
        if self._context:
            self.lib.llama_free(self._context)
        settings = self.lib.llama_context_default_params()
        size = -(-num_tokens // 256) * 256
        wanted = {"n_ctx": size, "n_batch": PIECE_TOKENS, "n_ubatch": PIECE_TOKENS}
        for field, value in wanted.items():
            settings.put(field, *CONTEXT_FIELDS[field], value)
        self._context = self.lib.llama_init_from_model(self.model, settings)
        if not self._context:
            raise ModelError(f"{self.path}: no context of {size} tokens: {self.lib.told()}")
        self._held = []
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
            raise ModelError(f"{self.path}: llama.cpp cannot apply the adapter: {self.lib.told()}")

    def _forget(self, keep: int) -> int:
        """Drop the cache from token ``keep`` on; returns how many could be kept."""
        memory = self.lib.llama_get_memory(self._context)
        if keep == 0 or not self.lib.llama_memory_seq_rm(memory, 0, keep, -1):
            self.lib.llama_memory_clear(memory, False)
            keep = 0
        del self._held[keep:]
        return keep

    def _decode(self, ids: Sequence[int], wanted: Sequence[int]) -> None:
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            flags = set(wanted)
            for at, token in enumerate(ids):
                batch.token[at], batch.pos[at] = token, len(self._held) + at
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
                batch.logits[at] = at in flags
            code = self.lib.llama_decode(self._context, batch)
        finally:
            self.lib.llama_batch_free(batch)
        if code:
            raise ModelError(f"{self.path}: llama.cpp fails ({code}): {self.lib.told()}")
        self._held += ids

    def _logits_at(self, at: int) -> torch.Tensor:
        """A view, good until the next call."""
        pointer = self.lib.llama_get_logits_ith(self._context, at)
        return torch.from_numpy(np.ctypeslib.as_array(pointer, (self.vocab_size,)))


def _before_labels(labels: list[int]) -> list[int]:
    return [at - 1 for at, label in enumerate(labels) if at and label != IGNORED]


def _loss(log_probs: torch.Tensor, place: dict[int, int], labels: list[int]) -> tuple[float, int]:
    before = _before_labels(labels)
    rows = [place[at] for at in before]
    wanted = [labels[at + 1] for at in before]
    return -float(log_probs[rows, wanted].double().sum()), len(before)
