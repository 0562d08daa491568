"""Owns the sizes of a model in GGUF and AWQ files, computed from tensor shapes and block formats alone.

Sources, read as facts:

- llama.cpp at 007dbbf3, src/llama-quant.cpp: which tensor gets which type (``llama_tensor_get_type``,
  ``tensor_type_fallback``, ``tensor_allows_quantization``); src/models: which models count as 70B.
- llama.cpp at 0024aa74, convert_hf_to_gguf.py: which tensors stay in F32.
- AutoAWQ 0.2.9, awq/modules/linear/gemm.py: what a packed layer holds.

The sizes agree with real files to the byte (tests/test_plan_formats.py). They leave out a GGUF file's
header and vocabulary, its padding to 32 bytes, RoPE frequency tables, and the vision tower, which is
stored in a separate file. Not implemented: Falcon's mixtures; the splits of ``kv_b_proj`` (DeepSeek) and
``in_proj_qkvz`` (Qwen3-Next); embedding rows beyond the vocabulary, which the conversion of Gemma 3
drops; an importance matrix, which gives some layers of ``q4_0`` more bits; and older llama.cpp, where a
fused QKV had one type in all layers (published Phi-4 files are therefore 7 % smaller in ``q2_k``, 1 %
larger in ``q5_k_m``, and equal to 0.1 % in ``q4_k_m``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count

from torch import nn
from transformers import PretrainedConfig

from halfbyte.errors import ModelError

# GGML type → weights in a block, bytes of a block.
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
# GGUF file type → the GGML type of tensors that no rule singles out.
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
# GGML type → the type used instead where rows are not a whole number of its blocks.
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
# Path components of the tensors that route tokens to experts; they are never quantised.
ROUTERS = {"gate", "router", "shared_expert_gate"}
# Other tensors that conversion keeps in F32, whatever their shape.
SMALL = re.compile(r"norm|conv|position|wpe")
# Small matrices of Gemma 3n and 4 that llama.cpp leaves unquantised.
KEPT = re.compile(r"per_layer_model_projection|altup|laurel")


@dataclass(frozen=True)
class Tensor:
    """Describes one weight of the language model as a file would hold it.

    Attributes:
        name: the parameter's name.
        role: "output", "embedding", "attn_v", "attn_k", "attn_output", "ffn_down", "linear" (any
            other matrix), "kept" (a matrix in half precision) or "small" (norms, biases, routers).
        num_weights: number of weights in the tensor.
        row: weights in a row, along which blocks and groups run.
        layer: index of the decoder layer, or None outside the layers.
        attn_v_index: for "attn_v", the number of such tensors before this one.
    """

    name: str
    role: str
    num_weights: int
    row: int
    layer: int | None
    attn_v_index: int = 0


@dataclass(frozen=True)
class ModelDims:
    """Holds the facts about the whole model that llama.cpp's rules depend on."""

    num_layers: int
    num_attn_v: int
    num_experts: int
    heads_per_kv: int
    is_70b: bool


def gguf_bytes(model: nn.Module, config: PretrainedConfig, file_type: str) -> int:
    """Return the bytes of a language model's tensors in a GGUF file made by llama-quantize.

    Args:
        model: the language model, without vision tower; it may be on the meta device.
        config: its config, or that of the multimodal model around it.
        file_type: one of ``GGUF_TYPES``.

    Returns:
        Bytes, without header and padding (the module's docstring lists what else is left out).

    Raises:
        ModelError: the file type is none of those.
    """
    if file_type not in GGUF_TYPES:
        raise ModelError(f"GGUF type {file_type!r}: allowed: " + ", ".join(GGUF_TYPES))
    tensors = _tensors(model, config.get_text_config())
    dims = _model_dims(tensors, config.get_text_config())
    total = 0
    for tensor in tensors:
        block_weights, block_bytes = BLOCKS[_ggml_type(tensor, dims, file_type)]
        total += tensor.num_weights // block_weights * block_bytes
    return total


def awq_bytes(model: nn.Module, config: PretrainedConfig, group_size: int = AWQ_GROUP_SIZE) -> int:
    """Return the bytes of a language model's tensors in 4-bit AWQ, GEMM format.

    The decoder's linear layers, including experts, hold 4-bit codes and, for each group, an fp16 scale
    and a 4-bit zero point; embeddings, head, norms, biases and routers stay in fp16.

    Args:
        model: the language model, without vision tower; it may be on the meta device.
        config: its config, or that of the multimodal model around it.
        group_size: weights of a row that share a scale.

    Raises:
        ModelError: AWQ cannot pack a layer, because its rows are not a whole number of groups or its
            outputs not a whole number of int32 words.
    """
    total = 0
    for tensor in _tensors(model, config.get_text_config()):
        if tensor.layer is None or tensor.role in ("small", "kept", "embedding", "output"):
            total += FP16_BYTES * tensor.num_weights
            continue
        if tensor.row % group_size or tensor.num_weights // tensor.row % AWQ_PACK:
            raise ModelError(
                f"AWQ: {tensor.name} has rows of {tensor.row} weights and"
                f" {tensor.num_weights // tensor.row} outputs; AWQ needs rows that are a multiple of"
                f" {group_size} and outputs that are a multiple of 8: use a group size that divides"
                f" {tensor.row}, or another format"
            )
        groups = tensor.num_weights // group_size
        total += (tensor.num_weights + groups) * AWQ_BITS // 8 + groups * FP16_BYTES
    return total


def _ggml_type(tensor: Tensor, dims: ModelDims, file_type: str) -> str:
    """Return a tensor's GGML type in a file of this type; a fallback where rows are no whole blocks."""
    default = GGUF_TYPES[file_type]
    if tensor.role == "small":
        return "F32"
    if tensor.role == "kept" or default == "F16":
        return "F16"
    ggml_type = _preferred_type(tensor, dims, file_type, default)
    if tensor.row % BLOCKS[ggml_type][0]:
        ggml_type = FALLBACKS.get(ggml_type, "F16")
    return "F16" if tensor.row % BLOCKS[ggml_type][0] else ggml_type


def _preferred_type(tensor: Tensor, dims: ModelDims, file_type: str, default: str) -> str:
    if tensor.role == "output":
        fits = tensor.row % BLOCKS[default][0] == 0
        return "Q6_K" if fits and default != "Q8_0" else "Q8_0"
    if tensor.role == "attn_v":
        return _attn_v_type(tensor, dims, file_type, default)
    if tensor.role == "ffn_down":
        return _ffn_down_type(tensor.layer or 0, dims.num_layers, file_type, default)
    if tensor.role == "attn_k" and dims.num_experts == 8:
        return "Q8_0"
    if tensor.role == "attn_output":
        types = {"q3_k_m": "Q4_K", "q2_k": "Q3_K"}
        if dims.num_experts == 8:
            types = dict.fromkeys(("q4_k_m", "q3_k_m", "q2_k"), "Q5_K")
        return types.get(file_type, default)
    return default


def _attn_v_type(tensor: Tensor, dims: ModelDims, file_type: str, default: str) -> str:
    ggml_type = default
    if file_type in ("q4_k_m", "q5_k_m") and _gets_more_bits(tensor.attn_v_index, dims.num_attn_v):
        ggml_type = "Q6_K"
    elif file_type == "q3_k_m":
        ggml_type = "Q5_K" if tensor.attn_v_index < 2 else "Q4_K"
    elif file_type == "q2_k":
        ggml_type = "Q4_K" if dims.heads_per_kv >= 4 else "Q3_K"
    if dims.is_70b and ggml_type in ("Q3_K", "Q4_K"):
        ggml_type = "Q5_K"
    return "Q8_0" if dims.num_experts == 8 else ggml_type


def _ffn_down_type(layer: int, num_layers: int, file_type: str, default: str) -> str:
    if file_type in ("q4_k_m", "q5_k_m") and _gets_more_bits(layer, num_layers):
        return "Q6_K"
    if file_type == "q3_k_m":
        return "Q5_K" if layer < num_layers // 16 else "Q4_K"
    return "Q3_K" if file_type == "q2_k" else default


def _gets_more_bits(index: int, total: int) -> bool:
    """Return whether a mixture spends more bits here: on the first and last eighth, and every third layer."""
    eighth = total // 8
    return index < eighth or index >= 7 * total // 8 or (index - eighth) % 3 == 2


def _model_dims(tensors: list[Tensor], config: PretrainedConfig) -> ModelDims:
    heads = getattr(config, "num_attention_heads", None) or 1
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    expert_fields = ("num_local_experts", "num_experts", "n_routed_experts")
    grouped = config.model_type == "llama" and heads != kv_heads
    return ModelDims(
        num_layers=config.num_hidden_layers,
        num_attn_v=sum(tensor.role == "attn_v" for tensor in tensors),
        num_experts=max(1, *(getattr(config, name, None) or 0 for name in expert_fields)),
        heads_per_kv=heads // kv_heads,
        is_70b=config.num_hidden_layers == 80 and (grouped or config.model_type == "qwen2"),
    )


def _tensors(model: nn.Module, config: PretrainedConfig) -> list[Tensor]:
    tensors = sorted(_unordered_tensors(model, config), key=lambda tensor: tensor.layer or 0)
    indices = count()
    return [replace(t, attn_v_index=next(indices)) if t.role == "attn_v" else t for t in tensors]


def _unordered_tensors(model: nn.Module, config: PretrainedConfig) -> Iterator[Tensor]:
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
    """Return the inputs of experts stacked as (experts, output, input) or (experts, input, output)."""
    first, second = shape[-2:]
    if role == "ffn_down":
        return second if first == hidden_size else first
    return first if first == hidden_size else second
