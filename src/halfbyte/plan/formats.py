"""Owns the sizes of a model in GGUF and AWQ files, by their block formats, from tensor shapes alone.

Sources, read as facts:

- llama.cpp at 007dbbf3, src/llama-quant.cpp: which tensor gets which type (``llama_tensor_get_type``,
  ``tensor_type_fallback``, ``tensor_allows_quantization``); src/models: which models count as 70B.
- llama.cpp at 0024aa74, convert_hf_to_gguf.py: which tensors stay in F32.
- AutoAWQ 0.2.9, awq/modules/linear/gemm.py: what a packed layer holds.

Files agree to the byte (tests/test_plan_formats.py). Left out: a GGUF file's header and vocabulary,
its padding to 32 bytes, RoPE frequency tables, and the vision tower, which has a file of its own.
Not followed: Falcon's own mixtures; the splits of ``kv_b_proj`` (DeepSeek) and ``in_proj_qkvz``
(Qwen3-Next); embedding rows beyond the vocabulary, which the conversion of Gemma 3 drops; an
importance matrix, which lifts some layers of ``q4_0``; and older llama.cpp, where a fused QKV had
one type in all layers (published Phi-4 files are 7 % smaller for it in ``q2_k``, 1 % larger in
``q5_k_m``, alike to 0.1 % in ``q4_k_m``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count

from torch import nn
from transformers import PretrainedConfig

from halfbyte.errors import ModelError

# GGML type: weights in a block, bytes of a block.
BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
# GGUF file type: the GGML type of tensors that no rule singles out.
GGUF_TYPES = {
    "f16": "F16",
    "q8_0": "Q8_0",
    "q6_k": "Q6_K",
    "q5_k_m": "Q5_K",
    "q4_k_m": "Q4_K",
    "q4_1": "Q4_1",
    "q4_0": "Q4_0",
    "q3_k_m": "Q3_K",
    "q2_k": "Q2_K",
}
# What a type gives way to where rows are no whole number of its blocks.
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

AWQ_GROUP_SIZE = 128
AWQ_BITS = 4
AWQ_PACK = 32 // AWQ_BITS
FP16_BYTES = 2

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
ROLES = {
    "attn_v": re.compile(r"(v_proj|qkv_proj|in_proj_qkv|query_key_value|c_attn|Wqkv)$"),
    "attn_k": re.compile(r"k_proj$"),
    "attn_output": re.compile(
        r"(o_proj|self_attn\.(out_proj|dense)|attention\.dense|attn\.c_proj)$"
    ),
    "ffn_down": re.compile(r"(down_proj|output_linear|dense_4h_to_h|fc2|w2|mlp\.c_proj)$"),
}
# Path components of the tensors that choose experts: never quantised.
ROUTERS = {"gate", "router", "shared_expert_gate"}
# Other tensors that conversion keeps in F32, whatever their shape.
SMALL = re.compile(r"norm|conv|position|wpe")
# Small matrices of Gemma 3n and 4 that llama.cpp leaves as they are.
KEPT = re.compile(r"per_layer_model_projection|altup|laurel")


@dataclass(frozen=True)
class Tensor:
    """One weight of the language model, as a file would hold it.

    Attributes:
        name: of the parameter.
        role: "output", "embedding", "attn_v", "attn_k", "attn_output", "ffn_down", "linear" (any
            other matrix), "kept" (a matrix in half precision) or "small" (norms, biases, routers).
        num_weights: in all.
        row: weights in a row, along which blocks and groups run.
        layer: index of the decoder layer, or None outside of them.
        place: for "attn_v", how many of its role come before it.
    """

    name: str
    role: str
    num_weights: int
    row: int
    layer: int | None
    place: int = 0


@dataclass(frozen=True)
class ModelDims:
    """What llama.cpp's rules ask about the whole model."""

    num_layers: int
    num_attn_v: int
    num_experts: int
    heads_per_kv: int
    is_70b: bool


def gguf_bytes(model: nn.Module, config: PretrainedConfig, file_type: str) -> int:
    """Bytes of tensor data of a language model in a GGUF file made by llama-quantize.

    Args:
        model: the language model, without vision tower; the meta device will do.
        config: its config, or the one of the multimodal model around it.
        file_type: one of ``GGUF_TYPES``.

    Returns:
        Bytes, without header and padding (see above for what else is left out).

    Raises:
        ModelError: another file type.
    """
    if file_type not in GGUF_TYPES:
        raise ModelError(f"GGUF type {file_type!r}: allowed: " + ", ".join(GGUF_TYPES))
    tensors = _tensors(model, config.get_text_config())
    shape = _shape(tensors, config.get_text_config())
    total = 0
    for tensor in tensors:
        weights, num_bytes = BLOCKS[_ggml_type(tensor, shape, file_type)]
        total += tensor.num_weights // weights * num_bytes
    return total


def awq_bytes(model: nn.Module, config: PretrainedConfig, group_size: int = AWQ_GROUP_SIZE) -> int:
    """Bytes of tensor data of a language model in 4-bit AWQ, GEMM format.

    The linear layers of the decoder, experts included, hold 4-bit codes, and for each group an fp16
    scale and a 4-bit zero point; embeddings, head, norms, biases and routers stay in fp16.

    Args:
        model: the language model, without vision tower; the meta device will do.
        config: its config, or the one of the multimodal model around it.
        group_size: weights of a row that share a scale.

    Raises:
        ModelError: a layer that AWQ cannot pack: its rows are no whole number of groups, or its
            output no whole number of int32 words.
    """
    total = 0
    for tensor in _tensors(model, config.get_text_config()):
        if tensor.layer is None or tensor.role in ("small", "kept", "embedding", "output"):
            total += FP16_BYTES * tensor.num_weights
            continue
        if tensor.row % group_size or tensor.num_weights // tensor.row % AWQ_PACK:
            raise ModelError(
                f"AWQ: {tensor.name} has rows of {tensor.row} weights and"
                f" {tensor.num_weights // tensor.row} outputs; AWQ needs rows in groups of"
                f" {group_size} and outputs in eights: use a group size that divides"
                f" {tensor.row}, or another format"
            )
        groups = tensor.num_weights // group_size
        total += (tensor.num_weights + groups) * AWQ_BITS // 8 + groups * FP16_BYTES
    return total


def _ggml_type(tensor: Tensor, shape: ModelDims, file_type: str) -> str:
    """GGML type of one tensor in a file of that type, where its rows allow it, else the next best."""
    default = GGUF_TYPES[file_type]
    if tensor.role == "small":
        return "F32"
    if tensor.role == "kept" or default == "F16":
        return "F16"
    wanted = _wanted(tensor, shape, file_type, default)
    if tensor.row % BLOCKS[wanted][0]:
        wanted = FALLBACKS.get(wanted, "F16")
    return "F16" if tensor.row % BLOCKS[wanted][0] else wanted


def _wanted(tensor: Tensor, shape: ModelDims, file_type: str, default: str) -> str:
    if tensor.role == "output":
        fits = tensor.row % BLOCKS[default][0] == 0
        return "Q6_K" if fits and default != "Q8_0" else "Q8_0"
    if tensor.role == "attn_v":
        return _wanted_attn_v(tensor, shape, file_type, default)
    if tensor.role == "ffn_down":
        return _wanted_ffn_down(tensor.layer or 0, shape.num_layers, file_type, default)
    if tensor.role == "attn_k" and shape.num_experts == 8:
        return "Q8_0"
    if tensor.role == "attn_output":
        special = {"q3_k_m": "Q4_K", "q2_k": "Q3_K"}
        if shape.num_experts == 8:
            special = dict.fromkeys(("q4_k_m", "q3_k_m", "q2_k"), "Q5_K")
        return special.get(file_type, default)
    return default


def _wanted_attn_v(tensor: Tensor, shape: ModelDims, file_type: str, default: str) -> str:
    wanted = default
    if file_type in ("q4_k_m", "q5_k_m") and _more_bits(tensor.place, shape.num_attn_v):
        wanted = "Q6_K"
    elif file_type == "q3_k_m":
        wanted = "Q5_K" if tensor.place < 2 else "Q4_K"
    elif file_type == "q2_k":
        wanted = "Q4_K" if shape.heads_per_kv >= 4 else "Q3_K"
    if shape.is_70b and wanted in ("Q3_K", "Q4_K"):
        wanted = "Q5_K"
    return "Q8_0" if shape.num_experts == 8 else wanted


def _wanted_ffn_down(layer: int, num_layers: int, file_type: str, default: str) -> str:
    if file_type in ("q4_k_m", "q5_k_m") and _more_bits(layer, num_layers):
        return "Q6_K"
    if file_type == "q3_k_m":
        return "Q5_K" if layer < num_layers // 16 else "Q4_K"
    return "Q3_K" if file_type == "q2_k" else default


def _more_bits(index: int, total: int) -> bool:
    """Whether a mixture spends more on this layer: the first and last eighths, and every third."""
    eighth = total // 8
    return index < eighth or index >= 7 * total // 8 or (index - eighth) % 3 == 2


def _shape(tensors: list[Tensor], config: PretrainedConfig) -> ModelDims:
    heads = getattr(config, "num_attention_heads", None) or 1
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    named = ("num_local_experts", "num_experts", "n_routed_experts")
    grouped = config.model_type == "llama" and heads != kv_heads
    return ModelDims(
        num_layers=config.num_hidden_layers,
        num_attn_v=sum(tensor.role == "attn_v" for tensor in tensors),
        num_experts=max(1, *(getattr(config, name, None) or 0 for name in named)),
        heads_per_kv=heads // kv_heads,
        is_70b=config.num_hidden_layers == 80 and (grouped or config.model_type == "qwen2"),
    )


def _tensors(model: nn.Module, config: PretrainedConfig) -> list[Tensor]:
    found = sorted(_found(model, config), key=lambda tensor: tensor.layer or 0)
    places = count()
    return [replace(t, place=next(places)) if t.role == "attn_v" else t for t in found]


def _found(model: nn.Module, config: PretrainedConfig) -> Iterator[Tensor]:
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    head = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    tied = head is None or head is embedding or getattr(config, "tie_word_embeddings", False)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        match = LAYER.search(name)
        layer = int(match[1]) if match else None
        if parameter is embedding or "embed_tokens_per_layer" in name:
            role = "output" if tied else "embedding"
        elif parameter is head:
            if tied:
                continue
            role = "output"
        else:
            role = _role(name, shape)
        row = _expert_row(role, shape, config.hidden_size) if len(shape) == 3 else shape[-1]
        yield Tensor(name, role, parameter.numel(), row, layer)


def _role(name: str, shape: tuple[int, ...]) -> str:
    path = name.removesuffix(".weight")
    parts = path.split(".")
    is_matrix = (len(shape) == 2 and name.endswith(".weight")) or len(shape) == 3
    if not is_matrix or SMALL.search(parts[-1]) or ROUTERS & set(parts):
        return "small"
    if KEPT.search(path):
        return "kept"
    return next((role for role, pattern in ROLES.items() if pattern.search(path)), "linear")


def _expert_row(role: str, shape: tuple[int, ...], hidden_size: int) -> int:
    """Inputs of experts stacked as (experts, output, input), or with the last two swapped."""
    first, second = shape[-2:]
    if role == "ffn_down":
        return second if first == hidden_size else first
    return first if first == hidden_size else second
