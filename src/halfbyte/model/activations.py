"""Owns the estimate of what the backward pass keeps, and so whether to recompute it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

USABLE_FRAC = 0.6  # of the free memory; the rest is for gradients, workspaces and the allocator


def activation_bytes(config: PretrainedConfig, num_tokens: int, dtype: torch.dtype) -> int:
    """Bytes that one micro-batch keeps for its backward pass without checkpointing.

    Counted for each layer and token, as transformers' eager layers and PEFT's LoRA keep them: eight
    hidden-size tensors (norms, residuals, their fp32 copies, LoRA inputs), queries, keys and values
    three times over (product, adapter sum, rotation) and the attention output, and six
    intermediate-size tensors (gate, up, activation, product, adapter sums).
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    queries, keys_values = heads * head_dim, 2 * kv_heads * head_dim
    elements = 8 * config.hidden_size + 3 * (queries + keys_values) + queries
    elements += 6 * config.intermediate_size
    return int(config.num_hidden_layers * num_tokens * elements * dtype.itemsize)


def free_bytes(device: torch.device) -> int:
    """Free memory on the device, or of the machine for the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def needs_checkpointing(
    config: PretrainedConfig, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether a micro-batch of ``num_tokens`` would not fit without recomputing activations."""
    return activation_bytes(config, num_tokens, dtype) > USABLE_FRAC * free_bytes(device)
