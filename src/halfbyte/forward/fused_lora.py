"""Owns the fused LoRA linear: frozen layers that read the same input, with their LoRA, in one function.

For a frozen W with LoRA matrices A and B and scale s (arXiv 2106.09685 §4.1):

    y  = x Wᵀ + s·(x Aᵀ) Bᵀ
    dx = dy W + (s·dy B) A,   dB = s·dyᵀ (x Aᵀ),   dA = (s·dy B)ᵀ x

What PEFT computes with clone, scale and add over whole outputs is added by the matrix product itself.
x Aᵀ is kept for the backward pass, and x once for all layers that read it, or not even x where a recipe can
compute it again from tensors that are kept anyway. dx is summed in place over the layers. W is dequantised
for each product and never kept.

Shapes: T tokens, in and out features of a layer, r its rank, R the sum of the ranks of the layers.
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
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
ADAPTER = "default"


class Recipe(Protocol):
    """How a tensor is computed from others, so that it can be computed again instead of kept."""

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Compute the tensor from its inputs."""
        ...

    def backward(self, dy: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute the gradients of the inputs from that of the tensor."""
        ...


class Identity:
    """The recipe of a tensor that is its own input."""

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the input."""
        return inputs[0]

    def backward(self, dy: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the gradient."""
        return (dy,)


class RecipeFunction(torch.autograd.Function):
    """A recipe as a differentiable function that keeps nothing but the inputs."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, *inputs: torch.Tensor) -> torch.Tensor:
        """Compute the recipe."""
        ctx.save_for_backward(*inputs)
        ctx.recipe = recipe
        return recipe.forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        """Compute the gradients of the inputs."""
        return None, *ctx.recipe.backward(gradients[0], *ctx.saved_tensors)


def apply_recipe(recipe: Recipe, *inputs: torch.Tensor) -> torch.Tensor:
    """Compute a recipe, and attach it to the result: a ``FusedLora`` that reads it keeps the inputs instead.

    The attribute ``recipe`` of the tensor is the one way from a norm to the projections that read its result:
    the model's own code hands it from one to the other, and passes tensors alone.
    """
    y: Any = RecipeFunction.apply(recipe, *inputs)  # type: ignore[no-untyped-call]
    y.recipe = (recipe, inputs)
    tagged: torch.Tensor = y
    return tagged


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
        """Compute the outputs (…, out) of each layer.

        Args:
            ctx: autograd's context.
            x: (…, in), detached, in the dtype of the products.
            layers: PEFT's LoRA layers.
            recipe: how x is computed.
            num_inputs: from how many tensors.
            tensors: these, and then A (r, in) and B (out, r) of each layer.
        """
        matrices = tensors[num_inputs:]
        x_rows = x.reshape(-1, x.shape[-1])  # (T, in)
        lora_a = [a.to(x.dtype) for a in matrices[::2]]  # (r, in) each
        xa = x_rows @ torch.cat(lora_a).T  # (T, R)
        xa_parts = torch.split(xa, [a.shape[0] for a in lora_a], dim=1)  # (T, r) each
        outputs = []
        for layer, xa_part, b in zip(layers, xa_parts, matrices[1::2], strict=True):
            base = layer.get_base_layer()
            y = x_rows @ plain_weight(base, x.dtype).T  # (T, out)
            if base.bias is not None:
                y += base.bias
            y.addmm_(xa_part, b.to(x.dtype).T, alpha=layer.scaling[ADAPTER])
            outputs.append(y.view(*x.shape[:-1], y.shape[-1]))  # (…, out)
        ctx.save_for_backward(xa, *tensors)
        ctx.layers, ctx.recipe, ctx.num_inputs = layers, recipe, num_inputs
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        """Compute the gradients of the inputs of x, and of each A and B."""
        xa, *tensors = ctx.saved_tensors
        inputs, matrices = tensors[: ctx.num_inputs], tensors[ctx.num_inputs :]
        lora_a, lora_b = matrices[::2], matrices[1::2]
        ranks = [a.shape[0] for a in lora_a]
        needs_dx = any(ctx.needs_input_grad[4 : 4 + ctx.num_inputs])
        dxa = torch.empty_like(xa)  # (T, R)
        dx: torch.Tensor | None = None
        dbs = []
        xa_parts, dxa_parts = torch.split(xa, ranks, dim=1), torch.split(dxa, ranks, dim=1)
        for layer, gradient, b, xa_part, dxa_part in zip(
            ctx.layers, gradients, lora_b, xa_parts, dxa_parts, strict=True
        ):
            dy = gradient.reshape(-1, gradient.shape[-1])  # (T, out)
            scale = layer.scaling[ADAPTER]
            if needs_dx:
                weight = plain_weight(layer.get_base_layer(), ctx.dtype)  # (out, in)
                dx = dy @ weight if dx is None else dx.addmm_(dy, weight)  # (T, in)
                del weight
            dxa_part.copy_(dy @ b.to(ctx.dtype)).mul_(scale)  # (T, r)
            dbs.append((dy.T @ xa_part).mul_(scale).to(b.dtype))  # (out, r)
        x_rows = ctx.recipe.forward(*inputs).to(ctx.dtype).reshape(-1, ctx.shape[-1])  # (T, in)
        das = torch.split((dxa.T @ x_rows).to(lora_a[0].dtype), ranks)  # (r, in) each
        del x_rows
        dinputs: tuple[Any, ...] = (None,) * ctx.num_inputs
        if dx is not None:
            dx.addmm_(dxa, torch.cat([a.to(ctx.dtype) for a in lora_a]))
            dinputs = ctx.recipe.backward(dx.view(ctx.shape), *inputs)
        dmatrices = [gradient for pair in zip(das, dbs, strict=True) for gradient in pair]
        return None, None, None, None, *dinputs, *dmatrices


@dataclass
class LayerGroup:
    """Layers that are computed together when the first of them is called.

    The others return their part if they are called with the same tensor, and compute it anew if not.

    Attributes:
        layers: PEFT's LoRA layers.
        original_forwards: PEFT's forward of each.
        x: the tensor that the outputs belong to.
        outputs: by number of the layer, those that have not been returned yet.
    """

    layers: list[Any]
    original_forwards: list[Callable[..., torch.Tensor]]
    x: torch.Tensor | None = None
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)

    def forward(self, number: int, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """Return the output of layer ``number``, from PEFT's forward where it does more than add one LoRA."""
        if args or options or not all(map(_adds_lora, self.layers)):
            return self.original_forwards[number](x, *args, **options)
        if self.x is not x or number not in self.outputs:
            matrices = [
                part[ADAPTER].weight
                for layer in self.layers
                for part in (layer.lora_A, layer.lora_B)
            ]
            device = x.device.type
            dtype = (
                torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
            )
            recipe, inputs = getattr(x, "recipe", (Identity(), (x,)))  # see apply_recipe
            outputs: Any = FusedLora.apply(  # type: ignore[no-untyped-call]
                x.detach().to(dtype), self.layers, recipe, len(inputs), *inputs, *matrices
            )
            self.x, self.outputs = x, dict(enumerate(outputs))
        output = self.outputs.pop(number)
        if not self.outputs:
            self.x = None
        return output


def fuse_lora(model: nn.Module) -> int:
    """Replace PEFT's forward by ``FusedLora``, in place; return the number of layers that were fused.

    Layers with dropout, DoRA or a base other than a plain or 4-bit linear layer keep PEFT's forward.
    """
    fusable = {id(layer) for layer in adapted_layers(model).values() if _is_fusable(layer)}
    for parent in model.modules():
        layers = {name: child for name, child in parent.named_children() if id(child) in fusable}
        for names in SAME_INPUT:
            if all(name in layers for name in names):
                _fuse([layers.pop(name) for name in names])
        for layer in layers.values():
            _fuse([layer])
    return len(fusable)


def _fuse(layers: list[Any]) -> None:
    """Let layers that read the same input be computed together."""
    group = LayerGroup(layers, [layer.forward for layer in layers])
    for number, layer in enumerate(layers):
        layer.forward = functools.partial(group.forward, number)


# Internal to PEFT, tried with 0.21, in the two functions below: the attributes that its LoRA layers read in
# ``forward``. Can go when PEFT says by itself whether a layer computes plain LoRA.


def _is_fusable(layer: Any) -> bool:
    """Whether a LoRA layer computes the formula of this module: one plain LoRA on a plain or 4-bit base."""
    base = layer.get_base_layer()
    is_linear = type(base) is nn.Linear or hasattr(getattr(base, "weight", None), "quant_state")
    return (
        is_linear
        and list(layer.lora_A) == [ADAPTER]
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
        and not layer.lora_variant
        and layer.lora_B[ADAPTER].bias is None
    )


def _adds_lora(layer: Any) -> bool:
    """Whether a LoRA layer adds its adapter now: it is neither switched off nor merged into the base."""
    return not layer.disable_adapters and not layer.merged
