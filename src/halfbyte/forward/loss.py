"""Owns the training loss: cross-entropy of labelled tokens only, without ever holding all of their logits.

For a frozen head W, the hidden state h_i that makes prediction i, and its label y_i:

    loss_i = logsumexp(W h_i) - (W h_i)[y_i]
    dh_i   = (softmax(W h_i) - onehot(y_i)) W

Both terms of a loss come from the same logits, so that it is never negative, and its gradient is its own.
On CUDA the logits leave their product in fp32. On a CPU they are rounded to the dtype of the head; that of the
label, whose rounding would stand in the loss as it is, is then put right in both terms.

The first terms are attention of h over the rows of W, with W as keys and as values. Like attention they are
computed block by block with a running maximum m and a running sum ℓ (online softmax, arXiv 1805.02867 §3;
FlashAttention, arXiv 2205.14135 §3.1), for logits z of a block W_b:

    m' = max(m, max z),   p = exp(z - m'),   ℓ' = exp(m - m')·ℓ + Σ p,   a' = exp(m - m')·a + p W_b

At the end logsumexp = m + log ℓ and softmax(W h) W = a / ℓ. Gradients are computed in the forward pass: each
block of W is read once, its logits live in the cache, and the backward pass is a multiplication by a scalar.
A cap c on the logits (Gemma 2, arXiv 2408.00118 §2) makes them c·tanh(z/c), with slope 1 - tanh²(z/c).

New tokens v of a run have rows of W that are trained (``data.new_tokens``), with the gradient

    dW[v] = Σ_i (softmax(W h_i)[v] - [y_i = v]) h_i

Shapes: N predictions, R of them in a tile, E hidden size, V vocabulary, K rows of W in a block, M trained rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from halfbyte.kernels.capability import capability_of
from halfbyte.kernels.operators import addmm_fp32_, launched, mm_fp32, operator
from halfbyte.model.new_tokens import slots_of, trained_rows

# Larger temporaries are mapped and unmapped on every use by glibc, which costs more than the sums.
BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20}
TILE_ROWS = 1024  # predictions that share a block's logits
TRACED_BLOCKS = 3  # blocks of the vocabulary after which the live bytes of a tile repeat
SCORED_ROWS = 64  # predictions whose logits are held at once when they are scored


@dataclass(frozen=True)
class Head:
    """The weight of a language-model head: frozen, but for rows that are trained.

    Attributes:
        weight: (V, E).
        rows: (M, E) in place of those of ``weight`` from ``start`` on; None where all are frozen.
        start: the first of them.
    """

    weight: torch.Tensor
    rows: torch.Tensor | None = None
    start: int = 0

    @classmethod
    def of(cls, model: Any) -> Head:
        """Return the head of a causal model."""
        layer = model.get_output_embeddings()
        return cls(layer.weight, *(trained_rows(layer) or ()))

    def blocks(self, size: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield all rows in blocks (K, E) of at most ``size``, those that are trained as the last one.

        With the id of each block's first row.
        """
        end = self.start if self.rows is None else self.start + len(self.rows)
        for begin, stop in ((0, self.start), (end, len(self.weight))):
            for first in range(begin, stop, size):
                yield first, self.weight[first : min(first + size, stop)]
        if self.rows is not None:
            yield self.start, self.rows.to(self.weight.dtype)

    def whole(self) -> torch.Tensor:
        """Return all rows (V, E) in order."""
        if self.rows is None:
            return self.weight
        end = self.start + len(self.rows)
        new = self.rows.to(self.weight.dtype)
        return torch.cat([self.weight[: self.start], new, self.weight[end:]])

    def of_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the rows (R, E) of labels (R,)."""
        w = self.weight[labels]
        if self.rows is None:
            return w
        is_new, slots = slots_of(labels, self.start, len(self.rows))
        return torch.where(is_new[:, None], self.rows[slots].to(w.dtype), w)

    def slopes(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        normaliser: torch.Tensor,
        softcap: float | None,
    ) -> torch.Tensor:
        """Return the derivatives (R, M) of losses by the logits of the trained rows.

        Args:
            hidden: (R, E) states that predict the labels.
            labels: (R,) token ids.
            normaliser: (R, 1) logsumexp of all logits.
            softcap: the cap on logits, if the model has one.
        """
        assert self.rows is not None
        z = (hidden @ self.rows.to(hidden.dtype).T).float()  # (R, M)
        capped = None if softcap is None else torch.tanh(z / softcap)
        if softcap is not None and capped is not None:
            z = softcap * capped
        ids = torch.arange(self.start, self.start + len(self.rows), device=labels.device)
        slopes = (z - normaliser).exp() - (labels[:, None] == ids).float()
        return slopes if capped is None else slopes * (1 - capped * capped)


class TokenLoss(torch.autograd.Function):
    """Cross-entropy of each hidden state against its label."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        rows: torch.Tensor | None,
        head: Head,
        labels: torch.Tensor,
        softcap: float | None,
        starts: range,
        block_bytes: int,
    ) -> torch.Tensor:
        """Compute the losses (N,) in nats, in fp32.

        Args:
            ctx: autograd's context.
            hidden: (N, E) states that predict the labels.
            rows: (M, E) rows of the head that are trained, those of ``head``, or None.
            head: the language-model head.
            labels: (N,) token ids.
            softcap: the cap on logits, if the model has one.
            starts: first row of each tile; the step of the range is the rows of one tile.
            block_bytes: most bytes of the logits that are held at once, in fp32.
        """
        needs_gradient = hidden.requires_grad
        dh = torch.empty_like(hidden) if needs_gradient else None  # (N, E)
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)  # (N,)
        slopes: list[torch.Tensor] = []  # (R, M) each
        for start in starts:
            tile = slice(start, start + starts.step)
            h = hidden[tile].detach()  # (R, E)
            block = max(1, block_bytes // (4 * len(h)))
            losses[tile], dh_tile, normaliser = _tile(
                h, head, labels[tile], softcap, needs_gradient, block
            )
            if dh is not None and dh_tile is not None:
                dh[tile] = dh_tile
            if rows is not None and needs_gradient:
                slopes.append(head.slopes(h, labels[tile], normaliser, softcap))
        if dh is not None:
            ctx.save_for_backward(dh, *([hidden, torch.cat(slopes)] if slopes else []))
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale the gradient that ``forward`` computed, by one factor for each row."""
        dh, *new = ctx.saved_tensors
        # In fp32: a factor such as 1/N or a loss scale must not be rounded to 16 bit, or overflow it.
        factors = gradients[0].float()[:, None]  # (N, 1)
        rows = None
        if new:
            hidden, slopes = new
            rows = (slopes * factors).T @ hidden.float()  # (M, E)
        return (dh.float() * factors).to(dh.dtype), rows, None, None, None, None, None


def _tile(
    hidden: torch.Tensor,
    head: Head,
    labels: torch.Tensor,
    softcap: float | None,
    needs_gradient: bool,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Compute the losses (R,) of a tile of hidden states (R, E), their gradient (R, E), and logsumexp (R, 1)."""
    running = torch.zeros((4, len(hidden)), dtype=torch.float32, device=hidden.device)  # (4, R)
    running[0] = -torch.inf
    a = torch.zeros_like(hidden, dtype=torch.float32) if needs_gradient else None  # (R, E)
    softmax = operator("softmax_block", hidden.device)
    is_rounded = hidden.dtype != torch.float32 and launched("mm_fp32", hidden.device) is None
    for first, w in head.blocks(block):  # w: (K, E)
        z = mm_fp32(hidden, w.T)  # (R, K)
        p = softmax(z, labels, first, running, softcap or 0.0, w.dtype)  # (R, K)
        del z
        if a is not None:
            a.mul_(running[3, :, None])
            addmm_fp32_(a, p, w)
        del p  # before the next block's logits are allocated
    exact, w_labels = None, None  # (R,), (R, E)
    if a is not None or is_rounded:
        w_labels = head.of_labels(labels).float()
    if is_rounded and w_labels is not None:
        exact = (hidden.float() * w_labels).sum(dim=1)
        exact = exact if softcap is None else softcap * torch.tanh(exact / softcap)
    losses, total, d_labels, label_logits = _label_terms(running, exact, softcap)  # (R,) each
    normaliser = (losses + label_logits)[:, None]  # (R, 1)
    if a is None or w_labels is None:
        return losses, None, normaliser
    return losses, a.div_(total[:, None]).add_(w_labels.mul_(d_labels[:, None])), normaliser


def _label_terms(
    running: torch.Tensor, exact: torch.Tensor | None, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return losses, ℓ, their derivatives by the labels' logits as far as ``a`` lacks them, and those logits.

    Args:
        running: (4, R) as ``softmax_block`` leaves it.
        exact: (R,) capped logits of the labels where those of ``running`` are rounded.
        softcap: the cap.

    Returns:
        (R,) each.
    """
    maximum, total, logits, _ = running
    if exact is None:
        return total.log() + maximum - logits, total, -_slope(logits, softcap), logits
    rounded_p, p = (logits - maximum).exp(), (exact - maximum).exp()
    others = (total - rounded_p).clamp_(min=0)
    losses = nn.functional.softplus(others.log() + maximum - exact)  # log(1 + others / p)
    total, slope = others + p, _slope(exact, softcap)
    return losses, total, (slope * p - _slope(logits, softcap) * rounded_p) / total - slope, exact


def _slope(capped: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Return the derivative (R,) of capped logits (R,) by the logits."""
    return torch.ones_like(capped) if softcap is None else 1 - (capped / softcap).square()


def tile_starts(num_predictions: int) -> range:
    """Return the first row of each tile of so many predictions."""
    return range(0, num_predictions, TILE_ROWS)


def block_bytes(device: torch.device) -> int:
    """Return the most bytes of logits that a block of the vocabulary has where passes are computed."""
    return BLOCK_BYTES["cpu" if capability_of(device) is None else "cuda"]


def head_losses(
    head: Head, hidden: torch.Tensor, labels: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """Return the losses (N,) of the hidden states (N, E) that predict ``labels`` (N,)."""
    return _head_losses(
        head, hidden, labels, softcap, tile_starts(len(labels)), block_bytes(hidden.device)
    )


def traced_head_losses(
    head: Head,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None,
) -> torch.Tensor:
    """Do what ``head_losses`` does as far as its memory needs: the values are wrong.

    All tiles are alike, and so are all blocks of the vocabulary; the next one's tensors are allocated
    before the last one's are freed.
    """
    size = block_bytes(hidden.device)
    tiles = tile_starts(len(labels))[:2]
    rows = min(TILE_ROWS, len(labels))
    few = replace(head, weight=head.weight[: TRACED_BLOCKS * max(1, size // (4 * rows))])
    return _head_losses(few, hidden, labels, softcap, tiles, size)


def _head_losses(
    head: Head,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None,
    starts: range,
    size: int,
) -> torch.Tensor:
    # Outside autocast: the head's products stay in the dtype it is stored in.
    with torch.autocast(hidden.device.type, enabled=False):
        hidden = hidden.to(head.weight.dtype)
        losses: torch.Tensor = TokenLoss.apply(  # type: ignore[no-untyped-call]
            hidden, head.rows, head, labels, softcap, starts, size
        )
    return losses


@torch.no_grad()
def score_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return (2, N) from logits (N, V): losses in nats, and 1 where the label is the likeliest token."""
    losses = nn.functional.cross_entropy(logits.float(), labels.long(), reduction="none")  # (N,)
    return torch.stack([losses, (logits.argmax(dim=1) == labels).float()])  # (2, N)


@torch.no_grad()
def head_scores(
    head: Head, hidden: torch.Tensor, labels: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """Return ``score_logits`` (2, N) of hidden states (N, E), without ever holding all of their logits."""
    scores = []
    weight = head.whole()  # (V, E)
    for start in range(0, len(labels), SCORED_ROWS):
        part = slice(start, start + SCORED_ROWS)
        logits = (hidden[part].to(weight.dtype) @ weight.T).float()  # (R, V)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        scores.append(score_logits(logits, labels[part]))
    return torch.cat(scores, dim=1)  # (2, N)
