"""Owns adapters side by side: one frozen layer, and for each token the LoRA matrices of its own adapter.

y = x Wᵀ + s·(x Aᵀ) Bᵀ (LoRA, arXiv 2106.09685 §4.1), with A, B and s by token.

Shapes: T tokens of the pass, t tokens of one adapter, in and out features of a layer, r rank of an adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from halfbyte.errors import ModelError
from halfbyte.model.adapter import adapted_layers

MERGE_ADVICE = "Merge the run (halfbyte merge) and serve runs/x/merged"


class MixedLinear(nn.Module):
    """A frozen linear layer with the LoRA matrices of several adapters, each for its tokens.

    Attributes:
        base: the frozen layer.
        lora: Aᵀ (in, r) and s·Bᵀ (r, out) of each adapter by name.
        ranges: names of adapters and their tokens in the pass that comes next. Set by ``SlotModel`` before
            each pass, since the model's own code, which calls the layer, hands on nothing but x.
    """

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base: Any = base
        self.in_features: int = base.in_features
        self.lora: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.ranges: list[tuple[str, slice]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the outputs of x (1, T, in), or (T, in) as experts get it."""
        y: torch.Tensor = self.base(x)  # (…, T, out)
        for name, tokens in self.ranges:
            if name in self.lora:
                a_t, b_t = self.lora[name]
                x_part = x[..., tokens, :]  # (…, t, in)
                y[..., tokens, :] += ((x_part.to(a_t.dtype) @ a_t) @ b_t).to(y.dtype)
        return y


def mix_adapters(model: nn.Module) -> list[MixedLinear]:
    """Replace PEFT's layers by ``MixedLinear``, so that each token can have its own adapter; return them all.

    Raises:
        ModelError: an adapter is more than matrices on linear layers (DoRA, experts, embeddings).
    """
    # Internal to PEFT, tried with 0.21: the attributes of its LoRA layers. PEFT's own mixed batches choose an
    # adapter by row of the batch, not by token. Can go when they choose by token.
    layers: dict[str, Any] = dict(adapted_layers(model))
    for name, layer in layers.items():
        if layer.lora_embedding_A or any(layer.use_dora.values()) or not _is_linear(layer):
            kind = "DoRA" if any(layer.use_dora.values()) else type(layer).__name__
            raise ModelError(
                f"{name}: {kind}, which cannot be mixed with other requests in one pass."
                f" {MERGE_ADVICE}"
            )
        mixed = MixedLinear(layer.base_layer)
        for adapter in layer.lora_A:
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight  # (r, in), (out, r)
            scale = layer.scaling[adapter]
            mixed.lora[adapter] = (a.detach().t(), b.detach().t() * scale)  # (in, r), (r, out)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, mixed)
    return [module for module in model.modules() if isinstance(module, MixedLinear)]


def _is_linear(layer: Any) -> bool:
    """Whether an adapted layer and its LoRA matrices are linear layers."""
    return all(isinstance(layer.lora_A[name], nn.Linear) for name in layer.lora_A) and hasattr(
        layer.base_layer, "in_features"
    )
