"""Owns the way back from bitsandbytes' storage to plain weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def dequantised_weight(layer: nn.Module) -> torch.Tensor:
    """The layer's weight (out, in) in fp32: exactly what its stored codes and constants stand for."""
    weight: Any = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        # The state's dtype is the compute dtype; a bf16 one would round the result.
        exact = copy.copy(state)
        exact.dtype = torch.float32
        restored: torch.Tensor = dequantize_4bit(weight.data, exact)
        return restored.reshape(state.shape).float()
    codes, scales = int8_codes(layer)
    if codes is not None and scales is not None:
        plain: torch.Tensor = codes.float() * scales.float()[:, None] / 127.0
        return plain
    plain = weight.detach().float()
    return plain


def int8_codes(layer: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """LLM.int8's codes (out, in) and scales (out,), which the first forward moves to the state."""
    weight: Any = getattr(layer, "weight", None)
    state: Any = getattr(layer, "state", None)
    scales = getattr(weight, "SCB", None)
    if scales is None:
        scales = getattr(state, "SCB", None)
    if scales is None:
        return None, None
    codes = getattr(state, "CB", None)
    return (weight.data if codes is None else codes), scales


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let a loaded model compute in ``dtype`` from now on, keeping the stored codes as they are."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and getattr(parameter, "quant_state", None) is None:
            parameter.data = parameter.data.to(dtype)
    module: Any
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            module.compute_dtype = dtype
            state.dtype = dtype
