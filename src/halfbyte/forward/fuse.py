"""Owns the order in which a model's layers are replaced by fused ones: projections, norms and MLPs, attention."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from halfbyte.config.schema import Speed
from halfbyte.forward.flat_lora import FlatLora
from halfbyte.forward.fused_attention import PROJECTIONS, fuse_attention
from halfbyte.forward.fused_block import fuse_blocks, is_sandwich
from halfbyte.forward.fused_layers import fuse_layers, is_gated_mlp, is_norm
from halfbyte.forward.fused_lora import LayerGroup, fuse_lora
from halfbyte.forward.packed import causal_of
from halfbyte.kernels.operators import triton_refusal, uses_operators
from halfbyte.model.adapter import adapted_layers, zero_trained_only

KEPT_LORA = "dropout, DoRA, a bias, or a base that is no linear layer"
KEPT_LAYERS = "their formula is another one, or is not known here"


def fuse(
    model: nn.Module, speed: Speed, dtype: torch.dtype = torch.float32, *, probe: bool = True
) -> None:
    """Replace the layers of PEFT and transformers by the fused ones that ``speed`` allows, in place.

    Its ``zero_grad`` then visits the trained parameters alone.

    Args:
        model: with its adapter.
        speed: the optimisations to use.
        dtype: of the matrix products.
        probe: replace layers only where the results are the same; a model without data has none to compare.
    """
    zero_trained_only(model)
    groups = fuse_lora(model) if speed.fused_lora else []
    if speed.fused_layers:
        fuse_layers(model, probe=probe)
    if not groups or not uses_operators(groups[0].parameters[0].device):
        return
    if speed.flat_adapter:
        _lay_flat(causal_of(model), groups, dtype)
    if speed.fused_layers and speed.kernels and speed.varlen_attention:
        fuse_attention(model, probe=probe)
        fuse_blocks(model, probe=probe)


def fuse_frozen(model: nn.Module, device: torch.device) -> None:
    """Freeze a model that only answers, and fuse its norms and gates where passes are computed as on CUDA."""
    if uses_operators(device):
        fuse_layers(model.requires_grad_(False))


def plain_lines(model: nn.Module, speed: Speed, device: torch.device) -> list[str]:
    """Return a line for each optimisation that ``speed`` allows and a fused model does without, saying why."""
    modules: list[Any] = list(model.modules())
    kinds: list[tuple[bool, str, Iterable[Any], str]] = [
        (speed.fused_lora, "LoRA layers", adapted_layers(model).values(), KEPT_LORA),
        (speed.fused_layers, "norms", filter(is_norm, modules), KEPT_LAYERS),
        (speed.fused_layers, "gated MLPs", filter(is_gated_mlp, modules), KEPT_LAYERS),
    ]
    if uses_operators(device) and speed.kernels and speed.varlen_attention:
        attention = filter(_is_attention, modules)
        kinds.append((speed.fused_layers, "attention layers", attention, KEPT_LAYERS))
        sums = filter(is_sandwich, modules)
        kinds.append((speed.fused_layers, "layers' residual sums", sums, KEPT_LAYERS))
    lines = []
    for is_allowed, name, every, why in kinds:
        layers = list(every)
        plain = sum(not isinstance(vars(m).get("forward"), functools.partial) for m in layers)
        if is_allowed and plain:
            lines.append(f"{plain} of {len(layers)} {name} are not fused: {why}")
    if device.type == "cuda" and speed.kernels and uses_operators(device) and triton_refusal():
        lines.append(
            f"PyTorch's operators compute in place of Triton's kernels: {triton_refusal()}"
        )
    return lines


def _is_attention(module: Any) -> bool:
    return all(hasattr(module, name) for name in PROJECTIONS)


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
