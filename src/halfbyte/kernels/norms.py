"""Owns the root-mean-square norm (arXiv 1910.07467 §4), with the residual that is added to it.

y = x·s·w with s = (mean(x²) + eps)^(-1/2), and dx = s·(dy·w - x·s²·mean(dy·w·x)); both in fp32.

Shapes: … any leading dimensions, E features.
"""

from __future__ import annotations

import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the norm (…, E) of x (…, E), added to a residual (…, E) if there is one, in the dtype of either.

    Args:
        x: in any float dtype.
        weight: w (E,), in fp32.
        eps: keeps rows of zeros finite.
        residual: (…, E).
    """
    x32 = x.float()  # (…, E)
    y = (x32 * _scale(x32, eps)).mul_(weight)
    if residual is None:
        return y.to(x.dtype)
    return y.add_(residual).to(residual.dtype)


def rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Return the gradient (…, E) of x, in its dtype."""
    x32 = x.float()  # (…, E)
    s = _scale(x32, eps)  # (…, 1)
    dyw = dy.float() * weight  # (…, E)
    c = torch.linalg.vecdot(dyw, x32)[..., None]  # (…, 1)
    c.mul_(s).mul_(s).mul_(s).div_(-x.shape[-1])  # -s³·mean(dy·w·x)
    return dyw.mul_(s).addcmul_(x32, c).to(x.dtype)


def _scale(x32: torch.Tensor, eps: float) -> torch.Tensor:
    """Return s (…, 1); mean(x²) is |x|² / E."""
    norm: torch.Tensor = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)  # (…, 1)
    return norm.square_().div_(x32.shape[-1]).add_(eps).rsqrt_()
