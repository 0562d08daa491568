"""Owns the sizes of a GGUF file's parts, from its header alone.

Sources as in ``plan/gguf_placement.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import PlanError
from halfbyte.llamacpp.gguf_header import Header, read_header

BATCH_TOKENS = 512  # n_ubatch, by default and in halfbyte
CACHE_STEP = 256  # tokens
CACHE_BYTES = 2  # fp16
# Of a batch's temporaries: the logits, or the MLP's where they are larger, beside the residual stream.
INNER_ROWS, WIDTH_ROWS = 4, 2
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class GgufFile:
    """What a file's header says.

    Attributes:
        layer_bytes: weights of each layer.
        input_bytes: embeddings and whatever else stays in RAM.
        output_bytes: the last norm and the head; without it where it is tied to the embeddings.
        tied_bytes: the embeddings where they are the head too; a second copy of them lies in VRAM.
        cache_row_bytes: keys and values of one token, for each layer.
        work_bytes: temporaries of a batch, the logits of all its tokens among them.
        context_length: that the model was trained with.
    """

    architecture: str
    layer_bytes: tuple[int, ...]
    input_bytes: int
    output_bytes: int
    tied_bytes: int
    cache_row_bytes: tuple[int, ...]
    work_bytes: int
    context_length: int

    def cache_bytes(self, context: int) -> list[int]:
        """Keys and values of each layer for so many tokens."""
        cells = -(-context // CACHE_STEP) * CACHE_STEP
        return [cells * row for row in self.cache_row_bytes]


def read_gguf(path: Path) -> GgufFile:
    """The header of a file; weights are not read.

    Raises:
        PlanError: it cannot be read, is one of several parts, or says too little.
    """
    header = read_header(path)
    parts = header.metadata.get("split.count", 1)
    if parts > 1:
        raise PlanError(f"{path}: is one of {parts} parts; join them with llama-gguf-split --merge")
    return _described(header, path)


def _described(header: Header, path: Path) -> GgufFile:
    architecture = str(header.metadata.get("general.architecture", ""))

    def told(key: str, default: Any = None) -> Any:
        value = header.metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise PlanError(
                f"{path}: does not say {architecture}.{key}; how much its cache takes is not known"
            )
        return value

    num_layers, width = int(told("block_count")), int(told("embedding_length"))
    layers, input_bytes, output_bytes = [0] * num_layers, 0, 0
    for name, size in header.tensor_bytes.items():
        layer = LAYER.match(name)
        if layer and int(layer[1]) < num_layers:
            layers[int(layer[1])] += size
        elif name.startswith("output"):
            output_bytes += size
        else:
            input_bytes += size
    if EMBEDDING not in header.shapes:
        raise PlanError(f"{path}: holds no {EMBEDDING}: it is no whole language model")
    heads = _per_layer(told("attention.head_count"), num_layers)
    kv_heads = _per_layer(told("attention.head_count_kv", heads), num_layers)
    key = int(told("attention.key_length", width // max(heads)))
    value = int(told("attention.value_length", width // max(heads)))
    inner = max(_per_layer(told("feed_forward_length", 4 * width), num_layers))
    largest = max(header.shapes[EMBEDDING][-1], INNER_ROWS * inner) + WIDTH_ROWS * width
    return GgufFile(
        architecture,
        tuple(layers),
        input_bytes,
        output_bytes,
        0 if HEAD in header.shapes else header.tensor_bytes[EMBEDDING],
        tuple(CACHE_BYTES * count * (key + value) for count in kv_heads),
        4 * BATCH_TOKENS * largest,
        int(told("context_length")),
    )


def _per_layer(value: Any, num_layers: int) -> list[int]:
    return [int(one) for one in value] if isinstance(value, list) else [int(value)] * num_layers
