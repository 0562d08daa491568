"""Owns what a GGUF file takes, by its header (`read_gguf`): bytes of layers, KV cache and temporaries.

The sources are those of ``plan/gguf_placement.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import PlanError
from halfbyte.llamacpp.gguf_header import Header, read_header

BATCH_TOKENS = 512  # n_ubatch, by default and in halfbyte
CONTEXT_STEP = 256  # tokens; a context is a multiple of it
CACHE_BYTES = 2  # fp16
# Temporaries of a token: its logits or, where larger, this many vectors of the MLP's inner width; and this
# many of the residual stream's width.
INNER_VECTORS, WIDTH_VECTORS = 4, 2
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
LAYER_NAME = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class GgufFile:
    """Holds the sizes that follow from a file's header.

    Attributes:
        architecture: llama.cpp's name of it.
        layer_bytes: weights of each layer.
        input_bytes: the embeddings and everything else that stays in RAM.
        output_bytes: the last norm and the head, unless the head is tied to the embeddings.
        tied_bytes: the embeddings if they are the head too; VRAM then holds a second copy of them.
        cache_token_bytes: keys and values of one token in each layer.
        work_bytes: temporaries of a batch, including the logits of all its tokens.
        context_length: the context length that the model was trained with.
    """

    architecture: str
    layer_bytes: tuple[int, ...]
    input_bytes: int
    output_bytes: int
    tied_bytes: int
    cache_token_bytes: tuple[int, ...]
    work_bytes: int
    context_length: int

    def cache_bytes(self, context: int) -> list[int]:
        """Return the bytes of keys and values in each layer for a context of so many tokens."""
        cells = -(-context // CONTEXT_STEP) * CONTEXT_STEP
        return [cells * token_bytes for token_bytes in self.cache_token_bytes]


def read_gguf(path: Path) -> GgufFile:
    """Read the sizes of a file's parts from its header; weights are not read.

    Raises:
        PlanError: the file cannot be read, is one of several parts, or its header lacks a value.
    """
    header = read_header(path)
    parts = header.metadata.get("split.count", 1)
    if parts > 1:
        raise PlanError(f"{path}: is one of {parts} parts; join them with llama-gguf-split --merge")
    return _sizes(header, path)


def _sizes(header: Header, path: Path) -> GgufFile:
    architecture = str(header.metadata.get("general.architecture", ""))

    def metadata(key: str, default: Any = None) -> Any:
        value = header.metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise PlanError(
                f"{path}: its header lacks {architecture}.{key}, so the size of its KV cache is unknown"
            )
        return value

    num_layers, width = int(metadata("block_count")), int(metadata("embedding_length"))
    layer_bytes, input_bytes, output_bytes = [0] * num_layers, 0, 0
    for name, size in header.tensor_bytes.items():
        match = LAYER_NAME.match(name)
        if match and int(match[1]) < num_layers:
            layer_bytes[int(match[1])] += size
        elif name.startswith("output"):
            output_bytes += size
        else:
            input_bytes += size
    if EMBEDDING not in header.shapes:
        raise PlanError(f"{path}: holds no {EMBEDDING}, so it is not a whole language model")
    heads = _per_layer(metadata("attention.head_count"), num_layers)
    kv_heads = _per_layer(metadata("attention.head_count_kv", heads), num_layers)
    key_length = int(metadata("attention.key_length", width // max(heads)))
    value_length = int(metadata("attention.value_length", width // max(heads)))
    inner_width = max(_per_layer(metadata("feed_forward_length", 4 * width), num_layers))
    vocab_size = header.shapes[EMBEDDING][-1]
    values = max(vocab_size, INNER_VECTORS * inner_width) + WIDTH_VECTORS * width
    return GgufFile(
        architecture,
        tuple(layer_bytes),
        input_bytes,
        output_bytes,
        0 if HEAD in header.shapes else header.tensor_bytes[EMBEDDING],
        tuple(CACHE_BYTES * count * (key_length + value_length) for count in kv_heads),
        4 * BATCH_TOKENS * values,
        int(metadata("context_length")),
    )


def _per_layer(value: Any, num_layers: int) -> list[int]:
    return [int(each) for each in value] if isinstance(value, list) else [int(value)] * num_layers
