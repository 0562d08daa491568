"""Owns the training loss: cross-entropy on labelled tokens only, without ever holding all logits.

For a frozen head W and hidden states h of the N labelled positions, the summed loss is
sum_i (logsumexp(W h_i) - W[y_i]·h_i) and its gradient (softmax(W h_i) - onehot(y_i)) W. Both are
computed in one pass over tiles of rows, so that the largest temporary is one tile of logits and the
backward pass is a multiplication by a scalar. Prompt positions never meet the head.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from halfbyte.data.render import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Larger temporaries are mapped and unmapped on every use by glibc, which costs more than the sums.
TILE_BYTES_CPU = 24 << 20
TILE_BYTES_CUDA = 128 << 20
MIN_TILE_ROWS = 32
PROBE_TOKENS = 8
PROBE_TOLERANCE = 1e-3


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
            logits = (hidden[part].detach() @ head.T).float()
            capped = None
            if softcap is not None:
                capped = torch.tanh_(logits.div_(softcap))
                logits = capped * softcap
            picked = logits.gather(1, labels[part, None])
            top = logits.amax(dim=1, keepdim=True)
            exps = logits.sub_(top).exp_()
            sums = exps.sum(dim=1, keepdim=True)
            losses[part] = (sums.log() + top - picked)[:, 0]
            if gradient is None:
                continue
            slope = exps.div_(sums)
            slope.scatter_add_(1, labels[part, None], torch.full_like(picked, -1.0))
            if capped is not None:
                slope.mul_(1 - capped * capped)
            torch.mm(slope.to(head.dtype), head, out=gradient[part])
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


def tile_rows(vocabulary: int, device_type: str) -> int:
    """Rows of fp32 logits in one tile."""
    budget = TILE_BYTES_CUDA if device_type == "cuda" else TILE_BYTES_CPU
    return max(MIN_TILE_ROWS, budget // (4 * vocabulary))


def add_token_loss(model: PreTrainedModel) -> bool:
    """Teach ``model`` the call ``model(input_ids, labels=…, token_loss="sum")``.

    It returns the loss summed over labelled tokens, in nats, or with ``"each"`` the loss of each of
    them in reading order. Other calls are untouched. Returns
    whether the tiled head is exact for this architecture, as a probe of ``PROBE_TOKENS`` tokens
    shows; where it is not (a scaled or biased head), the model's own logits are used.
    """
    own_forward = type(model).forward
    softcap = getattr(model.config, "final_logit_softcapping", None)
    tiled = _probe(model, softcap)

    # The signature stays the model's own: generate() and the Trainer read it.
    @functools.wraps(own_forward)
    def forward(
        self: PreTrainedModel,
        input_ids: torch.Tensor | None = None,
        *args: Any,
        token_loss: Literal["sum", "each"] | None = None,
        labels: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        if token_loss is None:
            if labels is not None:
                options["labels"] = labels
            return own_forward(self, input_ids, *args, **options)
        assert labels is not None
        shifted = labels[:, 1:]
        mask = shifted != IGNORED
        if tiled:
            hidden = self.base_model(input_ids, use_cache=False).last_hidden_state
            rows = tile_rows(self.get_output_embeddings().weight.shape[0], hidden.device.type)
            picked, wanted = hidden[:, :-1][mask], shifted[mask]
            losses = head_losses(self, picked, wanted, softcap, range(0, len(wanted), rows))
        else:
            logits = own_forward(self, input_ids, use_cache=False).logits[:, :-1][mask]
            losses = nn.functional.cross_entropy(logits.float(), shifted[mask], reduction="none")
        return losses.sum() if token_loss == "sum" else losses

    # TRL has put a forward of its own on the instance; ours takes its place.
    model.forward = types.MethodType(forward, model)
    return tiled


def head_losses(
    model: Any, picked: torch.Tensor, labels: torch.Tensor, softcap: float | None, starts: range
) -> torch.Tensor:
    """Losses (N,) of the hidden states (N, D) that predict ``labels`` (N,)."""
    head = model.get_output_embeddings().weight
    # Outside autocast: the head's products stay in the dtype it is stored in.
    with torch.autocast(picked.device.type, enabled=False):
        losses: torch.Tensor = TokenLoss.apply(picked.to(head.dtype), head, labels, softcap, starts)  # type: ignore[no-untyped-call]
    return losses


def pad_right(
    rows: Sequence[tuple[list[int], list[int]]], pad_id: int, device: torch.device | None = None
) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``labels`` (B, T) of rows of (ids, labels).

    Padding stands on the right and carries label -100. In a causal model no real token sees it, so
    that no attention mask is needed.
    """
    longest = max(len(ids) for ids, _ in rows)
    ids = [ids + [pad_id] * (longest - len(ids)) for ids, _ in rows]
    labels = [labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "labels": torch.tensor(labels, device=device),
    }


@torch.no_grad()
def row_losses(
    model: nn.Module, rows: Sequence[tuple[list[int], list[int]]], pad_id: int, batch_rows: int
) -> list[tuple[float, int]]:
    """For each row its summed loss in nats and the number of labelled tokens.

    ``model`` knows ``token_loss``. Rows are grouped by length; the result does not depend on the
    grouping but for rounding.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))
    found: dict[int, tuple[float, int]] = {}
    training = model.training
    model.eval()
    for start in range(0, len(order), batch_rows):
        part = order[start : start + batch_rows]
        batch = pad_right([rows[row] for row in part], pad_id, device)
        counts = (batch["labels"][:, 1:] != IGNORED).sum(dim=1).tolist()
        losses = model(**batch, token_loss="each").double().split(counts)
        for row, each, count in zip(part, losses, counts, strict=True):
            found[row] = (float(each.sum()), count)
    model.train(training)
    return [found[row] for row in range(len(rows))]


@torch.no_grad()
def _probe(model: Any, softcap: float | None) -> bool:
    """Whether head(hidden), capped, gives the model's own logits."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None:
        return False
    training = model.training
    model.eval()
    ids = torch.arange(PROBE_TOKENS, device=head.weight.device)[None]
    wanted = type(model).forward(model, ids, use_cache=False).logits.float()
    hidden = model.base_model(ids, use_cache=False).last_hidden_state
    logits = (hidden.to(head.weight.dtype) @ head.weight.T).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    model.train(training)
    error = (logits - wanted).abs().max()
    return bool(error <= PROBE_TOLERANCE * wanted.abs().max().clamp(min=1))
