"""Owns the product with weights in int8: they are unpacked for each pass, and inputs are not rounded.

bitsandbytes' own layer rounds inputs to 8 bits too (LLM.int8, arXiv 2208.07339 §3), with a scale per row and the
columns of outliers apart, which depend on the other rows of a pass: the same prompt then has other answers alone
and beside others. Shapes: … any leading dimensions, in and out features of a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt
from torch import nn
from torch.nn import functional

from halfbyte.model.quantised import plain_weight


class Int8Linear(Linear8bitLt):
    """A linear layer of bitsandbytes in int8 that multiplies with exactly the weight that it stores.

    Attributes:
        compute_dtype: the dtype of products, as 4-bit layers have it.
    """

    compute_dtype: torch.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Wᵀ + b (…, out) in the dtype of x (…, in)."""
        y: torch.Tensor = _Product.apply(x.to(self.compute_dtype), self)  # type: ignore[no-untyped-call]
        return (y if self.bias is None else y + self.bias.to(y.dtype)).to(x.dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ that keeps the packed weight alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Int8Linear) -> torch.Tensor:
        """Unpack the weight (out, in) and multiply."""
        ctx.layer = layer
        return functional.linear(x, plain_weight(layer, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Unpack the weight again."""
        (dy,) = gradients  # (…, out)
        return dy @ plain_weight(ctx.layer, dy.dtype), None


def keep_inputs(model: nn.Module, dtype: torch.dtype) -> None:
    """Let a model's layers in int8 multiply with inputs that are not rounded, in ``dtype``, in place."""
    module: Any
    for module in model.modules():
        if type(module) is Linear8bitLt:
            module.__class__, module.compute_dtype = Int8Linear, dtype
