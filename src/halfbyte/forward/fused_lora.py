"""Owns the fused LoRA linear: frozen layers that read the same input, with their LoRA, in one function.

For a frozen W with LoRA matrices A and B and scale s (arXiv 2106.09685 §4.1):

    y  = x Wᵀ + (x (sA)ᵀ) Bᵀ
    dx = dy W + (dy B) (sA),   dB = dyᵀ (x (sA)ᵀ),   dA = s·(dy B)ᵀ x

What PEFT computes with clone, scale and add over whole outputs is added by the matrix product itself.
x (sA)ᵀ is kept for the backward pass, and x once for all layers that read it, or not even x where a recipe
can compute it again from tensors that are kept anyway. dx is summed in place over the layers. W is
dequantised for each product and never kept. On CUDA the 16-bit copies of sA and B of all layers are made in
two launches a pass (``flat_lora``), and dA and dB leave their products in fp32.

Shapes: T tokens, in and out features of a layer, r its rank, R the sum of the ranks of the layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from halfbyte.forward.flat_lora import FlatLora
from halfbyte.kernels.operators import mm_fp32
from halfbyte.model.adapter import adapted_layers
from halfbyte.model.quantised import is_packed_layer, plain_weight

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
        group: LayerGroup,
        recipe: Recipe,
        num_inputs: int,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Compute the outputs (…, out) of each layer.

        Args:
            ctx: autograd's context.
            x: (…, in), detached, in the dtype of the products.
            group: the layers.
            recipe: how x is computed.
            num_inputs: from how many tensors.
            tensors: these, and then A (r, in) and B (out, r) of each layer.
        """
        x_rows = x.reshape(-1, x.shape[-1])  # (T, in)
        lora_a, lora_b = group.matrices(x.dtype)  # (R, in), (out, r) each
        xa = x_rows @ lora_a.T  # (T, R)
        outputs = []
        for base, bias, xa_part, b in zip(
            group.bases, group.biases, group.columns(xa), lora_b, strict=True
        ):
            weight = plain_weight(base, x.dtype)  # (out, in)
            if bias is None:
                y = x_rows @ weight.T  # (T, out)
            else:
                y = torch.addmm(bias.to(x.dtype), x_rows, weight.T)
            del weight
            y.addmm_(xa_part, b.T)
            outputs.append(y.view(*x.shape[:-1], y.shape[-1]))  # (…, out)
        ctx.save_for_backward(xa, *tensors[:num_inputs])
        ctx.group, ctx.recipe, ctx.num_inputs = group, recipe, num_inputs
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        """Compute the gradients of the inputs of x, and of each A and B."""
        xa, *inputs = ctx.saved_tensors
        group: LayerGroup = ctx.group
        lora_a, lora_b = group.matrices(ctx.dtype)  # (R, in), (out, r) each
        needs_dx = any(ctx.needs_input_grad[4 : 4 + ctx.num_inputs])
        dyb = torch.empty_like(xa)  # (T, R)
        dx: torch.Tensor | None = None
        dbs = []
        for base, gradient, b, xa_part, dyb_part in zip(
            group.bases, gradients, lora_b, group.columns(xa), group.columns(dyb), strict=True
        ):
            dy = gradient.reshape(-1, gradient.shape[-1])  # (T, out)
            if needs_dx:
                weight = plain_weight(base, ctx.dtype)  # (out, in)
                dx = dy @ weight if dx is None else dx.addmm_(dy, weight)  # (T, in)
                del weight
            torch.mm(dy, b, out=dyb_part)  # (T, r)
            dbs.append(mm_fp32(dy.T, xa_part))  # (out, r)
        x_rows = ctx.recipe.forward(*inputs).to(ctx.dtype).reshape(-1, ctx.shape[-1])  # (T, in)
        da = mm_fp32(dyb.T, x_rows, group.scale)  # (R, in)
        das = torch.split_with_sizes(da, group.ranks)  # (r, in) each
        del x_rows
        dinputs: tuple[Any, ...] = (None,) * ctx.num_inputs
        if dx is not None:
            dx.addmm_(dyb, lora_a)
            dinputs = ctx.recipe.backward(dx.view(ctx.shape), *inputs)
        dmatrices = [gradient for pair in zip(das, dbs, strict=True) for gradient in pair]
        return None, None, None, None, *dinputs, *dmatrices


@dataclass(eq=False)
class LayerGroup:
    """Layers that are computed together when the first of them is called.

    The others return their part if they are called with the same tensor, and compute it anew if not.

    Attributes:
        layers: PEFT's LoRA layers, all with the same scale.
        original_forwards: PEFT's forward of each.
        flat: where the 16-bit copies of the matrices of all groups lie, if they have any.
        x: the tensor that the outputs belong to.
        outputs: by number of the layer, those that have not been returned yet.
    """

    layers: list[Any]
    original_forwards: list[Callable[..., torch.Tensor]]
    flat: FlatLora | None = None
    x: torch.Tensor | None = None
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)

    @functools.cached_property
    def parameters(self) -> list[nn.Parameter]:
        """A (r, in) and B (out, r) of each layer."""
        return [
            part[ADAPTER].weight for layer in self.layers for part in (layer.lora_A, layer.lora_B)
        ]

    @functools.cached_property
    def ranks(self) -> list[int]:
        """The rank of each layer."""
        return [a.shape[0] for a in self.parameters[::2]]

    @functools.cached_property
    def bases(self) -> list[Any]:
        """The frozen layers."""
        return [layer.get_base_layer() for layer in self.layers]

    @functools.cached_property
    def biases(self) -> list[torch.Tensor | None]:
        """The frozen bias (out,) of each layer."""
        return [base.bias for base in self.bases]

    def columns(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the part (T, r) of each layer of rows (T, R)."""
        return torch.split_with_sizes(rows, self.ranks, 1) if len(self.ranks) > 1 else (rows,)

    @property
    def scale(self) -> float:
        """The factor s of all layers."""
        return float(self.layers[0].scaling[ADAPTER])

    def matrices(self, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return sA (R, in) of all layers and B (out, r) of each, in ``dtype``."""
        copies = self.flat and self.flat.copies_of(self, dtype)
        if copies:
            return copies
        lora_a = torch.cat([a.detach() for a in self.parameters[::2]]) * self.scale  # (R, in)
        return lora_a.to(dtype), [b.detach().to(dtype) for b in self.parameters[1::2]]

    def forward(self, number: int, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """Return the output of layer ``number``, from PEFT's forward where it does more than add one LoRA."""
        if args or options or not self.adds_lora():
            return self.original_forwards[number](x, *args, **options)
        if self.x is not x or number not in self.outputs:
            self.x, self.outputs = x, dict(enumerate(self.compute(x)))
        output = self.outputs.pop(number)
        if not self.outputs:
            self.x = None
        return output

    def adds_lora(self) -> bool:
        """Whether the layers add their adapter now: it is neither switched off nor merged into the base."""
        return not any([layer.disable_adapters or layer.merged for layer in self.layers])  # noqa: C419 (faster)

    def compute(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the outputs (…, out) of all layers for x (…, in)."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        recipe, inputs = getattr(x, "recipe", (Identity(), (x,)))  # see apply_recipe
        outputs: tuple[torch.Tensor, ...] = FusedLora.apply(  # type: ignore[no-untyped-call]
            x.detach().to(dtype), self, recipe, len(inputs), *inputs, *self.parameters
        )
        return outputs


def fuse_lora(model: nn.Module) -> list[LayerGroup]:
    """Replace PEFT's forward by ``FusedLora``, in place; return the groups of layers that were fused.

    Layers with dropout, DoRA or a base other than a plain or packed linear layer keep PEFT's forward.
    """
    fusable = {id(layer) for layer in adapted_layers(model).values() if _is_fusable(layer)}
    groups = []
    for parent in model.modules():
        layers: dict[str, Any] = {
            name: child for name, child in parent.named_children() if id(child) in fusable
        }
        for names in SAME_INPUT:
            together = [layers[name] for name in names if name in layers]
            if len(together) == len(names) and len({one.scaling[ADAPTER] for one in together}) == 1:
                groups.append(_fuse([layers.pop(name) for name in names]))
        groups += [_fuse([layer]) for layer in layers.values()]
    return groups


def _fuse(layers: list[Any]) -> LayerGroup:
    """Let layers that read the same input be computed together."""
    group = LayerGroup(layers, [layer.forward for layer in layers])
    for number, layer in enumerate(layers):
        layer.forward = functools.partial(group.forward, number)
    return group


def group_of(layers: list[Any]) -> LayerGroup | None:
    """Return the group of exactly these layers, or None if they are not computed together."""
    groups = {id(group): group for layer in layers if (group := bound_group(layer)) is not None}
    group = next(iter(groups.values()), None)
    is_whole = len(groups) == 1 and group is not None and len(group.layers) == len(layers)
    return group if is_whole else None


def bound_group(layer: Any) -> LayerGroup | None:
    """Return the group that a layer is computed by, or None if it is not."""
    function = getattr(layer.forward, "func", None)
    group = getattr(function, "__self__", None)
    return group if isinstance(group, LayerGroup) else None


# Internal to PEFT, tried with 0.21, here and in ``LayerGroup.adds_lora``: the attributes that its LoRA layers
# read in ``forward``. Can go when PEFT says by itself whether a layer computes plain LoRA.


def _is_fusable(layer: Any) -> bool:
    """Whether a LoRA layer computes the formula of this module: one plain LoRA on a plain or packed base."""
    base = layer.get_base_layer()
    return (
        (type(base) is nn.Linear or is_packed_layer(base))
        and list(layer.lora_A) == [ADAPTER]
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
        and not layer.lora_variant
        and layer.lora_B[ADAPTER].bias is None
    )
