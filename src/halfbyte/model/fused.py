"""Owns the fused LoRA linear: frozen layers that read the same input, with their LoRA, in one function.

For W frozen, y = x Wᵀ + s (x Aᵀ) Bᵀ. What PEFT computes with clone, scale and add over whole outputs is
added by the matrix product itself; x is kept once, x Aᵀ (T, r) beside it; the gradient of x is summed in
place over all layers that read it. W is unpacked for each product and never kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from halfbyte.model.adapter import adapted_layers
from halfbyte.model.quantised import plain_weight

# Layers of one parent that read the same input, as transformers names them.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
ADAPTER = "default"


class FusedLora(torch.autograd.Function):
    """Several frozen linear layers with their LoRA on one input."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layers: list[Any], *factors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Outputs (…, out) of each layer.

        Args:
            ctx: autograd's context.
            x: (…, in) in the dtype of the products.
            layers: PEFT's LoRA layers.
            factors: A (r, in) and B (out, r) of each, in turn.
        """
        rows = x.reshape(-1, x.shape[-1])
        downs = [a.to(x.dtype) for a in factors[::2]]
        narrow = rows @ torch.cat(downs).T
        parts = torch.split(narrow, [a.shape[0] for a in downs], dim=1)
        outputs = []
        for layer, part, up in zip(layers, parts, factors[1::2], strict=True):
            base = layer.get_base_layer()
            y = rows @ plain_weight(base, x.dtype).T
            if base.bias is not None:
                y += base.bias
            y.addmm_(part, up.to(x.dtype).T, alpha=layer.scaling[ADAPTER])
            outputs.append(y.view(*x.shape[:-1], y.shape[-1]))
        ctx.save_for_backward(rows, narrow, *factors)
        ctx.layers, ctx.shape = layers, x.shape
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x and of each A and B."""
        rows, narrow, *factors = ctx.saved_tensors
        dtype = rows.dtype
        downs, ups = factors[::2], factors[1::2]
        sizes = [a.shape[0] for a in downs]
        parts = torch.split(narrow, sizes, dim=1)
        pushed = torch.empty_like(narrow)
        for_x: torch.Tensor | None = None
        for_ups = []
        pushes = torch.split(pushed, sizes, dim=1)
        given = zip(ctx.layers, gradients, ups, parts, pushes, strict=True)
        for layer, gradient, up, part, push in given:
            g = gradient.reshape(-1, gradient.shape[-1])
            scale = layer.scaling[ADAPTER]
            if ctx.needs_input_grad[0]:
                weight = plain_weight(layer.get_base_layer(), dtype)
                for_x = g @ weight if for_x is None else for_x.addmm_(g, weight)
                del weight
            push.copy_(g @ up.to(dtype)).mul_(scale)
            for_ups.append((g.T @ part).mul_(scale).to(up.dtype))
        if for_x is not None:
            for_x.addmm_(pushed, torch.cat([a.to(dtype) for a in downs]))
            for_x = for_x.view(ctx.shape)
        for_downs = torch.split((pushed.T @ rows).to(downs[0].dtype), sizes)
        pairs = [g for pair in zip(for_downs, for_ups, strict=True) for g in pair]
        return for_x, None, *pairs


@dataclass
class Group:
    """Layers that are computed together when the first of them is called.

    The others take what is theirs if they are called with the same tensor, and compute it anew if not.
    """

    layers: list[Any]
    own: list[Callable[..., torch.Tensor]]
    input: torch.Tensor | None = None
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)

    def forward(self, number: int, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """Output of layer ``number``; PEFT's own where it does more than add one LoRA."""
        if args or options or not all(map(_adds_its_lora, self.layers)):
            return self.own[number](x, *args, **options)
        if self.input is not x or number not in self.outputs:
            factors = [
                part[ADAPTER].weight for one in self.layers for part in (one.lora_A, one.lora_B)
            ]
            device = x.device.type
            dtype = (
                torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
            )
            found: Any = FusedLora.apply(x.to(dtype), self.layers, *factors)  # type: ignore[no-untyped-call]
            self.input, self.outputs = x, dict(enumerate(found))
        output = self.outputs.pop(number)
        if not self.outputs:
            self.input = None
        return output


def fuse_lora(model: nn.Module) -> int:
    """Put ``FusedLora`` in the place of PEFT's forward, in place; returns the number of layers fused.

    Layers with dropout, DoRA or a base other than a plain or 4-bit linear layer keep PEFT's.
    """
    fusable = {id(layer) for layer in adapted_layers(model).values() if _is_fusable(layer)}
    for parent in model.modules():
        waiting = {name: child for name, child in parent.named_children() if id(child) in fusable}
        for names in TOGETHER:
            if all(name in waiting for name in names):
                _fuse([waiting.pop(name) for name in names])
        for child in waiting.values():
            _fuse([child])
    return len(fusable)


def _fuse(layers: list[Any]) -> None:
    group = Group(layers, [layer.forward for layer in layers])
    for number, layer in enumerate(layers):
        layer.forward = functools.partial(group.forward, number)


def _is_fusable(layer: Any) -> bool:
    base = layer.get_base_layer()
    plain = type(base) is nn.Linear or hasattr(getattr(base, "weight", None), "quant_state")
    return (
        plain
        and list(layer.lora_A) == [ADAPTER]
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
        and not layer.lora_variant
        and layer.lora_B[ADAPTER].bias is None
    )


def _adds_its_lora(layer: Any) -> bool:
    return not layer.disable_adapters and not layer.merged
