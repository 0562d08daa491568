"""Owns the fused LoRA linear: frozen layers that read the same input, with their LoRA, in one function.

For W frozen, y = x Wᵀ + s (x Aᵀ) Bᵀ. What PEFT computes with clone, scale and add over whole outputs is
added by the matrix product itself; x Aᵀ (T, r) is kept, and x once, or not even x where it can be made
again from what is kept anyway; the gradient of x is summed in place over all layers that read it. W is
unpacked for each product and never kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from halfbyte.model.adapter import adapted_layers
from halfbyte.model.quantised import plain_weight

# Layers of one parent that read the same input, as transformers names them.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
ADAPTER = "default"


class Recipe(Protocol):
    """How a tensor was made from others, so that it can be made again instead of kept."""

    def make(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The tensor, from its inputs."""
        ...

    def pull(self, gradient: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of the inputs."""
        ...


class Plain:
    """The recipe of a tensor that is its own input."""

    def make(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The input."""
        return inputs[0]

    def pull(self, gradient: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Its gradient."""
        return (gradient,)


class Made(torch.autograd.Function):
    """A recipe as a function that keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, *inputs: torch.Tensor) -> torch.Tensor:
        """What the recipe makes."""
        ctx.save_for_backward(*inputs)
        ctx.recipe = recipe
        return recipe.make(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        """Gradients of the inputs."""
        return None, *ctx.recipe.pull(gradients[0], *ctx.saved_tensors)


def make(recipe: Recipe, *inputs: torch.Tensor) -> torch.Tensor:
    """What a recipe makes, knowing it: a ``FusedLora`` that reads it keeps the inputs instead."""
    tensor: Any = Made.apply(recipe, *inputs)  # type: ignore[no-untyped-call]
    tensor.recipe = (recipe, inputs)
    made: torch.Tensor = tensor
    return made


class FusedLora(torch.autograd.Function):
    """Several frozen linear layers with their LoRA on one input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        layers: list[Any],
        recipe: Recipe,
        num_inputs: int,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Outputs (…, out) of each layer.

        Args:
            ctx: autograd's context.
            x: (…, in), without a gradient of its own, in the dtype of the products.
            layers: PEFT's LoRA layers.
            recipe: how x was made.
            num_inputs: from how many tensors.
            tensors: these, and then A (r, in) and B (out, r) of each layer.
        """
        factors = tensors[num_inputs:]
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
        ctx.save_for_backward(narrow, *tensors)
        ctx.layers, ctx.recipe, ctx.num_inputs = layers, recipe, num_inputs
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        """Gradients of the inputs and of each A and B."""
        narrow, *tensors = ctx.saved_tensors
        inputs, factors = tensors[: ctx.num_inputs], tensors[ctx.num_inputs :]
        downs, ups = factors[::2], factors[1::2]
        sizes = [a.shape[0] for a in downs]
        needed = any(ctx.needs_input_grad[4 : 4 + ctx.num_inputs])
        pushed = torch.empty_like(narrow)
        for_x: torch.Tensor | None = None
        for_ups = []
        parts, pushes = torch.split(narrow, sizes, dim=1), torch.split(pushed, sizes, dim=1)
        for layer, gradient, up, part, push in zip(
            ctx.layers, gradients, ups, parts, pushes, strict=True
        ):
            g = gradient.reshape(-1, gradient.shape[-1])
            scale = layer.scaling[ADAPTER]
            if needed:
                weight = plain_weight(layer.get_base_layer(), ctx.dtype)
                for_x = g @ weight if for_x is None else for_x.addmm_(g, weight)
                del weight
            push.copy_(g @ up.to(ctx.dtype)).mul_(scale)
            for_ups.append((g.T @ part).mul_(scale).to(up.dtype))
        rows = ctx.recipe.make(*inputs).to(ctx.dtype).reshape(-1, ctx.shape[-1])
        for_downs = torch.split((pushed.T @ rows).to(downs[0].dtype), sizes)
        del rows
        for_inputs: tuple[Any, ...] = (None,) * ctx.num_inputs
        if for_x is not None:
            for_x.addmm_(pushed, torch.cat([a.to(ctx.dtype) for a in downs]))
            for_inputs = ctx.recipe.pull(for_x.view(ctx.shape), *inputs)
        pairs = [g for pair in zip(for_downs, for_ups, strict=True) for g in pair]
        return None, None, None, None, *for_inputs, *pairs


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
            recipe, inputs = getattr(x, "recipe", (Plain(), (x,)))
            found: Any = FusedLora.apply(  # type: ignore[no-untyped-call]
                x.detach().to(dtype), self.layers, recipe, len(inputs), *inputs, *factors
            )
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
