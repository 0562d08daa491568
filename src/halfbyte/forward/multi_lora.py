"""Owns adapters side by side: one frozen layer, and for each token the LoRA matrices of its own adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from halfbyte.errors import ModelError
from halfbyte.model.adapter import adapted_layers

UNSERVED = "Merge the run (train/merge.py) and serve runs/x/merged"


class MixedLinear(nn.Module):
    """A frozen linear layer with the LoRA matrices of several adapters, each for its tokens."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.lora: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.ranges: list[tuple[str, slice]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X (1, T, in) or, as experts get it, (T, in) to as many outputs."""
        out: torch.Tensor = self.base(x)
        for name, place in self.ranges:
            if name in self.lora:
                down, up = self.lora[name]
                mine = x[..., place, :]
                out[..., place, :] += ((mine.to(down.dtype) @ down) @ up).to(out.dtype)
        return out


def mix_adapters(model: nn.Module) -> list[MixedLinear]:
    """Replace PEFT's layers, so that each token can have its own adapter; all layers so replaced.

    Raises:
        ModelError: an adapter is more than matrices on linear layers (DoRA, experts, embeddings).
    """
    layers: dict[str, Any] = dict(adapted_layers(model))
    for name, layer in layers.items():
        if layer.lora_embedding_A or any(layer.use_dora.values()) or not _is_linear(layer):
            kind = "DoRA" if any(layer.use_dora.values()) else type(layer).__name__
            raise ModelError(
                f"{name}: {kind}, which cannot be mixed with other requests in one pass. {UNSERVED}"
            )
        mixed = MixedLinear(layer.base_layer)
        for adapter in layer.lora_A:
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            scale = layer.scaling[adapter]
            mixed.lora[adapter] = (down.detach().t(), up.detach().t() * scale)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, mixed)
    return [module for module in model.modules() if isinstance(module, MixedLinear)]


def _is_linear(layer: Any) -> bool:
    return all(isinstance(layer.lora_A[name], nn.Linear) for name in layer.lora_A) and hasattr(
        layer.base_layer, "in_features"
    )
