"""Owns the order in which a model's layers are replaced by fused ones: projections, norms and MLPs, attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from halfbyte.config.schema import Speed
from halfbyte.forward.flat_lora import FlatLora
from halfbyte.forward.fused_attention import fuse_attention
from halfbyte.forward.fused_layers import fuse_layers
from halfbyte.forward.fused_lora import LayerGroup, fuse_lora
from halfbyte.forward.packed import causal_of
from halfbyte.kernels.operators import uses_operators


def fuse(
    model: nn.Module, speed: Speed, dtype: torch.dtype = torch.float32, *, probe: bool = True
) -> None:
    """Replace the layers of PEFT and transformers by the fused ones that ``speed`` allows, in place.

    Args:
        model: with its adapter.
        speed: the optimisations to use.
        dtype: of the matrix products.
        probe: replace layers only where the results are the same; a model without data has none to compare.
    """
    groups = fuse_lora(model) if speed.fused_lora else []
    if speed.fused_layers:
        fuse_layers(model, probe=probe)
    if not groups or not uses_operators(groups[0].parameters[0].device):
        return
    if speed.flat_adapter:
        _lay_flat(causal_of(model), groups, dtype)
    if speed.fused_layers and speed.kernels and speed.varlen_attention:
        fuse_attention(model, probe=probe)


def _lay_flat(causal: Any, groups: list[LayerGroup], dtype: torch.dtype) -> None:
    """Let the groups of a model read their matrices from copies that each pass makes anew."""
    devices = {parameter.device for group in groups for parameter in group.parameters}
    if len(devices) > 1:  # layers are spread over several
        return
    dtypes = {parameter.dtype for group in groups for parameter in group.parameters}
    if dtypes != {torch.float32}:
        return
    causal.flat_lora = FlatLora(groups, dtype)
    for group in groups:
        group.flat = causal.flat_lora
