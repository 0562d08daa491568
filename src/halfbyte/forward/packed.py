"""Owns the pass over a layout of rows: hidden states of its tokens, then the loss of its predictions."""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from halfbyte.data.prefix_tree import Layout, Tokens, lay_out
from halfbyte.data.render import IGNORED
from halfbyte.forward import prefix_attention
from halfbyte.forward.loss import head_losses, head_scores, score_logits, tile_starts
from halfbyte.forward.probes import Allowed, first_sure, probe_words, relative_gap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 8
PROBE_TOLERANCE = 1e-3
LAYER_TYPES = {"full_attention", "sliding_attention"}


def add_token_loss(model: PreTrainedModel, *, labelled_head: bool = True) -> str:
    """Teach ``model`` the call ``model(layout=…, token_loss="sum")``.

    It returns the summed loss of a pass in nats, with ``"each"`` the loss of each of its
    predictions, or with ``"scores"`` (2, N) these losses and 1 where the label is the likeliest token.
    Other calls give what they gave.

    The head is computed block by block where a probe shows that to be exact; where a model scales its
    logits its own are taken.

    Args:
        model: any causal language model; its attention becomes ``halfbyte``, which is SDPA for
            other calls.
        labelled_head: score labelled tokens alone; else take all of the model's own logits.

    Returns:
        why rows are padded instead of laid out as a tree, or "".
    """
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    blocks = labelled_head and _head_is_plain(model, softcap)
    refusal = _use_tree_attention(model)
    own_forward = type(model).forward

    # The signature stays the model's own: generate() and the Trainer read it.
    @functools.wraps(own_forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        layout: Layout | None = None,
        token_loss: Literal["sum", "each", "scores"] = "sum",
        **options: Any,
    ) -> Any:
        if layout is None:
            return own_forward(self, *args, **options)
        device = self.get_input_embeddings().weight.device
        counts, targets = (
            torch.tensor(numbers, dtype=torch.long, device=device)
            for numbers in (layout.counts, layout.targets)
        )
        if layout.padded or refusal:
            inputs, sources = _padded(layout, device)
        else:
            inputs, sources = _laid_out(layout, device)
        if blocks:
            hidden = self.base_model(**inputs, use_cache=False).last_hidden_state
            states = pick(hidden, sources)
            if token_loss == "scores":
                return head_scores(self, states, targets, softcap)
            losses = head_losses(self, states, targets, softcap, tile_starts(len(targets)))
        else:
            logits = pick(own_forward(self, **inputs, use_cache=False).logits, sources)
            if token_loss == "scores":
                return score_logits(logits, targets)
            losses = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        return (losses * counts).sum() if token_loss == "sum" else losses

    model.forward = types.MethodType(forward, model)
    model.pads_rows = bool(refusal)
    return refusal


class Picked(torch.autograd.Function):
    """Rows of a matrix, some of them more than once; its gradient is added up in place."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Rows (N, D) at ``places`` (N,) of (T, D)."""
        ctx.save_for_backward(places)
        ctx.shape = rows.shape
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Zeros (T, D) with each row's gradient added at its place."""
        (places,) = ctx.saved_tensors
        return gradients[0].new_zeros(ctx.shape).index_add_(0, places, gradients[0]), None


def pick(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Rows (N, D) of states (B, T, D) by their place among all B·T."""
    picked: torch.Tensor = Picked.apply(states.flatten(0, 1), places)  # type: ignore[no-untyped-call]
    return picked


def tree_inputs(
    ids: torch.Tensor, positions: torch.Tensor, tree: prefix_attention.PrefixTree
) -> dict[str, Any]:
    """Arguments of a pass over the tree of tokens (1, T)."""
    return {
        "input_ids": ids,
        "position_ids": positions,
        # A mask of four dimensions keeps transformers from making one; ours is in the tree.
        "attention_mask": torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=ids.device),
        "tree": tree,
    }


def _laid_out(layout: Layout, device: torch.device) -> tuple[dict[str, Any], torch.Tensor]:
    """Arguments of a pass over the tree, and the places (N,) of the predictions."""
    ids, positions = (
        torch.tensor([numbers], device=device) for numbers in (layout.ids, layout.positions)
    )
    inputs = tree_inputs(ids, positions, prefix_attention.PrefixTree(layout.nodes, device))
    return inputs, torch.tensor(layout.sources, dtype=torch.long, device=device)


def _padded(layout: Layout, device: torch.device) -> tuple[dict[str, Any], torch.Tensor]:
    """Arguments of the plain padded pass; the pad is any id, since nothing looks at it."""
    batch = pad_right(layout.rows, pad_id=0, device=device)
    length = batch["input_ids"].shape[1]
    places = [0] * len(layout.targets)
    for row, (mine, (_, labels)) in enumerate(zip(layout.predictions, layout.rows, strict=True)):
        before = [i - 1 for i in range(1, len(labels)) if labels[i] != IGNORED]
        for number, place in zip(mine, before, strict=True):
            places[number] = row * length + place
    return {"input_ids": batch["input_ids"]}, torch.tensor(places, dtype=torch.long, device=device)


def pad_right(
    rows: Sequence[Tokens], pad_id: int, device: torch.device | None = None
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
def _head_is_plain(model: Any, softcap: float | None) -> bool:
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


def tree_refusal(model: Any, own_attention: str) -> str:
    """Why a model's configuration alone rules a tree out, or ""."""
    name, config = type(model).__name__, model.config.get_text_config()
    if own_attention != "sdpa":
        return f"attention is {own_attention}; only sdpa can be laid out as a tree"
    kinds = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if kinds:
        return f"{name} has {', '.join(sorted(kinds))} layers"
    return f"{name} drops attention weights out" if getattr(config, "attention_dropout", 0) else ""


@torch.no_grad()
def _use_tree_attention(model: Any) -> str:
    """Give the model our attention; returns why it cannot have it, or "" if it has.

    A probe lays rows out as a tree, two of them with a common beginning, and compares their hidden
    states with those of the padded rows.
    """
    name = type(model).__name__
    own = getattr(model.config.get_text_config(), "_attn_implementation", "eager")
    if own == prefix_attention.NAME:
        return ""
    refusal = tree_refusal(model, own)
    if refusal:
        return refusal
    prefix_attention.register()
    training = model.training
    model.eval()
    try:
        refusal = _probe_tree(model, name)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        refusal = f"{name} cannot be laid out as a tree: {error}"
    finally:
        model.train(training)
    if refusal:
        model.set_attn_implementation(own)
    return refusal


def _probe_tree(model: Any, name: str) -> str:
    refusal = first_sure(lambda turn: _probe_rows(model, turn))
    return f"{name}{refusal}" if refusal else ""


def _probe_rows(model: Any, turn: int) -> tuple[str, bool]:
    """What speaks against a tree on some rows, or ""; and whether the plain pass is sure of itself there."""
    words = probe_words(model, PROBE_TOKENS + 4, turn)
    stem, ends = words[:PROBE_TOKENS], words[PROBE_TOKENS:]
    ids = [[*stem, *ends], [*stem, ends[3], ends[0]], [*ends[2::-1], ends[3], ends[0]]]
    layout = lay_out([(row, row) for row in ids], share=True)
    device = model.get_input_embeddings().weight.device
    padded = _padded(layout, device)[0]["input_ids"]

    def states(rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model.base_model(rows, use_cache=False).last_hidden_state
        return found

    model.set_attn_implementation("sdpa")
    together = states(padded)
    wanted = [together[row, : len(path)] for row, path in enumerate(layout.paths)]
    alone = [states(padded[row : row + 1, : len(path)]) for row, path in enumerate(layout.paths)]
    noise = max(relative_gap(one[0], own) for one, own in zip(alone, wanted, strict=True))
    other = padded[:1].roll(1, dims=1)
    other[:, -1] = padded[:1, -1]
    allowed = Allowed.of(model, noise, relative_gap(states(other)[0, -1], together[0, -1]))
    model.set_attn_implementation(prefix_attention.NAME)
    inputs, _ = _laid_out(layout, device)
    found = model.base_model(**inputs, use_cache=False).last_hidden_state[0]
    for path, own in zip(layout.paths, wanted, strict=True):
        error = relative_gap(found[path], own)
        if not error <= allowed.gap:
            told = f": hidden states differ by {error:.1g} from those of padded rows"
            return told, allowed.is_sure
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if "sliding_attention" in kinds and inputs["tree"].windows == {None}:
        return " does not tell its attention the sliding window", True
    return "", True
