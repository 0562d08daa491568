"""Owns the norms of queries and keys with their rotary position embedding (arXiv 2104.09864 §3.4).

With the halves (n₁, n₂) of a normed head, and cosines and sines of its position:

    y₁ = n₁·cos₁ - n₂·sin₁,   y₂ = n₂·cos₂ + n₁·sin₂

and the gradient of n is the same rotation, transposed.

Shapes: T tokens, H heads, D head size; all in fp32 inside.
"""

from __future__ import annotations

import torch

from halfbyte.kernels.norms import rms_norm, rms_norm_backward


def norm_rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Return the rotated heads (T, H, D), in the dtype of x.

    Args:
        x: heads (T, H, D).
        cos: cosines (T, D) of each token's position.
        sin: sines (T, D).
        weight: of the norm (D,) in fp32; None: the heads are not normed.
        eps: of the norm.
    """
    n = x.float() if weight is None else rms_norm(x.float(), weight, eps)  # (T, H, D)
    n1, n2 = n.chunk(2, dim=-1)  # (T, H, D/2) each
    (cos1, cos2), (sin1, sin2) = _halves(cos), _halves(sin)
    return torch.cat([n1 * cos1 - n2 * sin1, n2 * cos2 + n1 * sin2], dim=-1).to(x.dtype)


def norm_rope_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Return the gradient (T, H, D) of x, in its dtype, from that of the rotated heads (T, H, D)."""
    dy1, dy2 = dy.float().chunk(2, dim=-1)  # (T, H, D/2) each
    (cos1, cos2), (sin1, sin2) = _halves(cos), _halves(sin)
    dn = torch.cat([dy1 * cos1 + dy2 * sin2, dy2 * cos2 - dy1 * sin1], dim=-1)  # (T, H, D)
    if weight is None:
        return dn.to(x.dtype)
    return rms_norm_backward(dn, x.float(), weight, eps).to(x.dtype)


def _halves(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the halves (T, 1, D/2) of a table (T, D), in fp32."""
    first, second = table.float()[:, None].chunk(2, dim=-1)
    return first, second
