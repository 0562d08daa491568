"""Owns a decoder layer's forward where norms follow attention and MLP: each norm adds the residual in its launch.

The layer of Gemma 2 and 3 (arXiv 2408.00118 §2): h = h + norm(attention(norm(h))), h = h + norm(mlp(norm(h))).

Shapes: T tokens of the pass, E hidden size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfbyte.forward.fused_attention import TOLERANCE, both_forwards
from halfbyte.forward.fused_layers import RMSNorm, recipe_of
from halfbyte.kernels.operators import operator

AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
PARTS = {"self_attn", "mlp", "input_layernorm", "pre_feedforward_layernorm", *AFTER}


class NormAdd(torch.autograd.Function):
    """The norm of a part's output, added to the residual, by one operator each way."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, residual: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """Return residual + norm(x), (…, E), in the dtype of the residual."""
        ctx.save_for_backward(x)
        ctx.norm = norm
        total: torch.Tensor = operator("rms_norm", x.device)(x, norm.weight, norm.eps, residual)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        """Return the gradients of x and of the residual."""
        (x,) = ctx.saved_tensors
        dx = operator("rms_norm_backward", x.device)(gradients[0], x, ctx.norm.weight, ctx.norm.eps)
        return dx, gradients[0], None


@dataclass(frozen=True)
class FusedBlock:
    """A decoder layer's forward.

    Attributes:
        module: the layer.
        norms: that after the attention, and that after the MLP.
    """

    module: Any
    norms: tuple[RMSNorm, RMSNorm]

    def forward(self, hidden_states: torch.Tensor, *given: Any, **options: Any) -> torch.Tensor:
        """Compute the layer (1, T, E); calls with more arguments by position take the layer's own forward."""
        layer = self.module
        if given:
            plain: torch.Tensor = type(layer).forward(layer, hidden_states, *given, **options)
            return plain
        x, *_ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **options)
        hidden: torch.Tensor = NormAdd.apply(x, hidden_states, self.norms[0])  # type: ignore[no-untyped-call]
        x = layer.mlp(layer.pre_feedforward_layernorm(hidden))
        out: torch.Tensor = NormAdd.apply(x, hidden, self.norms[1])  # type: ignore[no-untyped-call]
        return out


def fuse_blocks(model: nn.Module, *, probe: bool) -> int:
    """Replace the forward of decoder layers by that of ``FusedBlock``, in place.

    Args:
        model: with fused attention and norms.
        probe: replace a layer only if it computes the same; a model without data has nothing to compare.

    Returns:
        how many layers were replaced.
    """
    number = 0
    module: Any
    for module in filter(is_sandwich, model.modules()):
        recipes = [recipe_of(getattr(module, name)) for name in AFTER]
        if recipes[0] is None or recipes[1] is None:
            continue
        block = FusedBlock(module, (recipes[0], recipes[1]))
        if not probe or _is_same(block):
            module.forward = functools.partial(FusedBlock.forward, block)
            number += 1
    return number


def is_sandwich(module: nn.Module) -> bool:
    """Whether a module is a decoder layer of this kind, by its parts."""
    return {name for name, _ in module.named_children()} == PARTS


def _is_same(block: FusedBlock) -> bool:
    """Whether a layer computes what its fused form does."""
    module, hidden_size = block.module, len(block.norms[0].weight)
    probed = both_forwards(module, block.forward, hidden_size, module.self_attn.head_dim)
    if probed is None or not isinstance(probed[0][0], torch.Tensor):
        return False
    own, fused = probed[0]
    return torch.allclose(own, fused, rtol=TOLERANCE, atol=TOLERANCE)
