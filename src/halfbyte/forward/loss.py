"""Owns the training loss: cross-entropy of labelled tokens only, without ever holding their logits.

For a frozen head W and the hidden states h of the N tokens that predict a label, the losses are
logsumexp(W h_i) - W[y_i]·h_i, and their gradients (softmax(W h_i) - onehot(y_i)) W: attention of h over
the rows of W, with W as keys and as values. Like attention it is computed block by block with running
maxima and sums (arXiv 1805.02867 §3; 2205.14135 §3.1), in the forward pass: each block of W is read
once, its logits live in the cache, and the backward pass is a multiplication by a scalar.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Larger temporaries are mapped and unmapped on every use by glibc, which costs more than the sums.
BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
TILE_ROWS = 1024  # predictions that share a block's logits
SCORED_ROWS = 64  # predictions whose logits are held at once when they are scored


class TokenLoss(torch.autograd.Function):
    """Cross-entropy of each hidden state against its label, with a frozen head."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        labels: torch.Tensor,
        softcap: float | None,
        starts: range,
    ) -> torch.Tensor:
        """Losses (N,) in nats, fp32.

        Args:
            ctx: autograd's context.
            hidden: (N, D) states that predict the labels.
            head: (V, D) weight of the language-model head.
            labels: (N,) token ids.
            softcap: Gemma-2's cap: logits become cap·tanh(logits/cap).
            starts: first row of each tile; the step is the rows of one.
        """
        needs_gradient = hidden.requires_grad
        gradient = torch.empty_like(hidden) if needs_gradient else None
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        for start in starts:
            part = slice(start, start + starts.step)
            rows = hidden[part].detach()
            losses[part], found = _tile(rows, head, labels[part], softcap, needs_gradient)
            if gradient is not None and found is not None:
                gradient[part] = found
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(
        ctx: Any, *grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, None, None, None, None]:
        """Scale the gradients that forward computed, one factor for each row."""
        (gradient,) = ctx.saved_tensors
        # In fp32: a factor such as 1/N or a loss scale must not be rounded to 16 bit, or overflow it.
        scaled = gradient.float() * grad[0].float()[:, None]
        return scaled.to(gradient.dtype), None, None, None, None


def _tile(
    hidden: torch.Tensor,
    head: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None,
    needs_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses (R,) of a tile of rows, and the gradient (R, D) of each by its hidden state."""
    rows = len(hidden)
    wanted = head[labels]
    picked = (hidden.float() * wanted.float()).sum(1, keepdim=True)
    bend = None
    if softcap is not None:
        capped = torch.tanh(picked / softcap)
        picked, bend = softcap * capped, 1 - capped * capped
    top = torch.full_like(picked, -torch.inf)
    total = torch.zeros_like(picked)
    pulled = torch.zeros_like(hidden, dtype=torch.float32) if needs_gradient else None
    block = max(1, BLOCK_BYTES.get(hidden.device.type, BLOCK_BYTES["cpu"]) // (4 * rows))
    for first in range(0, head.shape[0], block):
        weights = head[first : first + block]
        logits = (hidden @ weights.T).float()
        slope = None
        if softcap is not None:
            capped = torch.tanh_(logits.div_(softcap))
            slope = 1 - capped * capped if needs_gradient else None
            logits = capped.mul_(softcap)
        highest = torch.maximum(top, logits.amax(dim=1, keepdim=True))
        shares = logits.sub_(highest).exp_()
        fade = (top - highest).exp_()
        total.mul_(fade).add_(shares.sum(dim=1, keepdim=True))
        top = highest
        if pulled is not None:
            if slope is not None:
                shares.mul_(slope)
            if head.dtype == torch.float32:
                pulled.mul_(fade).addmm_(shares, weights)
            else:
                pulled.mul_(fade).add_(shares.to(head.dtype) @ weights)
        del logits, shares  # before the next block's are made
    losses = (total.log() + top - picked)[:, 0]
    if pulled is None:
        return losses, None
    pull = wanted.float() if bend is None else wanted * bend
    return losses, pulled.div_(total).sub_(pull)


def tile_starts(num_predictions: int) -> range:
    """First row of each tile of so many predictions."""
    return range(0, num_predictions, TILE_ROWS)


def head_losses(
    model: Any, picked: torch.Tensor, labels: torch.Tensor, softcap: float | None, starts: range
) -> torch.Tensor:
    """Losses (N,) of the hidden states (N, D) that predict ``labels`` (N,)."""
    head = model.get_output_embeddings().weight
    # Outside autocast: the head's products stay in the dtype it is stored in.
    with torch.autocast(picked.device.type, enabled=False):
        losses: torch.Tensor = TokenLoss.apply(picked.to(head.dtype), head, labels, softcap, starts)  # type: ignore[no-untyped-call]
    return losses


@torch.no_grad()
def score_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Loss in nats, and 1 where the label is the likeliest token: (2, N) from logits (N, V)."""
    losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    return torch.stack([losses, (logits.argmax(dim=1) == labels).float()])


@torch.no_grad()
def head_scores(
    model: Any, picked: torch.Tensor, labels: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """``score_logits`` (2, N) of hidden states (N, D), without ever holding all of their logits."""
    head = model.get_output_embeddings().weight
    parts = []
    for start in range(0, len(labels), SCORED_ROWS):
        part = slice(start, start + SCORED_ROWS)
        logits = (picked[part].to(head.dtype) @ head.T).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        parts.append(score_logits(logits, labels[part]))
    return torch.cat(parts, dim=1)
