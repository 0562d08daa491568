"""Owns one block of the online softmax of logits (arXiv 1805.02867 §3), in one launch.

For logits z of a block, a running maximum m and a running sum ℓ:

    m' = max(m, max z),   p = exp(z - m'),   ℓ' = exp(m - m')·ℓ + Σ p

A cap c makes the logits c·tanh(z/c), with slope 1 - tanh²(z/c).

Shapes: R predictions, K rows of the head in the block.
"""

from __future__ import annotations

import torch


def softmax_block(
    logits: torch.Tensor,
    labels: torch.Tensor,
    first: int,
    running: torch.Tensor,
    softcap: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return p (R, K), times the slope of the cap, in ``dtype``; and update what runs along, in place.

    Args:
        logits: (R, K) in fp32, not yet capped; they are overwritten.
        labels: (R,), ids of the vocabulary.
        first: id of the block's first row.
        running: (4, R) in fp32: m, ℓ, the capped logit of the label where a block has held it, and
            exp(m - m') of this block.
        softcap: the cap; 0 for none.
        dtype: of p.
    """
    maximum, total, label_logits, decay = running
    capped = torch.tanh_(logits.div_(softcap)) if softcap else None
    z = logits if capped is None else capped * softcap
    columns = labels - first  # (R,)
    inside = (columns >= 0) & (columns < logits.shape[1])
    columns = columns.clamp_(0, logits.shape[1] - 1)
    here = z.gather(1, columns[:, None].long())[:, 0]
    label_logits.copy_(torch.where(inside, here, label_logits))
    new = torch.maximum(maximum, z.amax(dim=1))
    p = z.sub_(new[:, None]).exp_()
    torch.exp(maximum - new, out=decay)
    total.mul_(decay).add_(p.sum(dim=1))
    maximum.copy_(new)
    if capped is not None:
        p.mul_(capped.square_().neg_().add_(1))
    return p.to(dtype)


def softmax_block_shapes(
    logits: torch.Tensor,
    labels: torch.Tensor,
    first: int,
    running: torch.Tensor,
    softcap: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return an empty p."""
    return torch.empty_like(logits, dtype=dtype)
