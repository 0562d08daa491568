"""Owns the packed pass: the call `model(layout=…)` that `add_token_loss` teaches a model, from rows to losses.

Shapes: B rows of a padded batch, or 1 for a tree; T tokens of the longest row, or of the tree; t of one row;
N predictions, E hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from halfbyte.data.encoded import IGNORED
from halfbyte.data.prefix_tree import Layout, Tokens, lay_out
from halfbyte.forward import prefix_attention
from halfbyte.forward.loss import Head, head_losses, head_scores, score_logits
from halfbyte.forward.packed_layout import PackedLayout
from halfbyte.forward.prefix_attention import Tree
from halfbyte.forward.probes import (
    Tolerance,
    eval_mode,
    first_conclusive,
    probe_ids,
    refusal_of,
    relative_gap,
)
from halfbyte.forward.tree_parts import PrefixTree
from halfbyte.forward.varlen_attention import VarlenTree
from halfbyte.kernels.operators import uses_operators

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 8
PROBE_TOLERANCE = 1e-3
LAYER_TYPES = {"full_attention", "sliding_attention"}


def add_token_loss(
    model: PreTrainedModel, *, labelled_head: bool = True, varlen: bool = True
) -> str:
    """Teach ``model`` the call ``model(layout=…, token_loss="sum")``.

    The call returns the summed loss of a pass in nats; with ``"each"`` the loss of each of its predictions;
    or with ``"scores"`` these losses and, for each, 1 where the label is the likeliest token, as (2, N).
    Other calls return what they returned before.

    The head is computed block by block where a probe shows that this is exact. For a model that scales its
    logits, the model's own logits are used.

    Args:
        model: any causal language model; its attention becomes ``halfbyte``, which is SDPA for other calls.
        labelled_head: compute the logits of labelled tokens alone; else take all of the model's own logits.
        varlen: on CUDA, compute attention over a tree in one call; else in padded batches.

    Returns:
        why rows are padded instead of laid out as a tree, or "".
    """
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    in_blocks = labelled_head and _head_is_plain(model, softcap)
    refusal = _use_tree_attention(model, varlen)
    model_forward = type(model).forward

    # The signature stays that of the model: generate() and the Trainer read it.
    @functools.wraps(model_forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        layout: Layout | PackedLayout | None = None,
        token_loss: Literal["sum", "each", "scores"] = "sum",
        **options: Any,
    ) -> Any:
        if layout is None:
            return model_forward(self, *args, **options)
        packed, inputs, sources = _begin_pass(self, layout, varlen)
        targets, counts = packed["targets"], packed["counts"]  # (N,) each
        if in_blocks:
            hidden = self.base_model(**inputs, use_cache=False).last_hidden_state  # (B, T, E)
            states = gather_rows(hidden, sources)  # (N, E)
            head = Head.of(self)
            if token_loss == "scores":
                return head_scores(head, states, targets, softcap)
            losses = head_losses(head, states, targets, softcap)
        else:
            # (B, T, V) → (N, V); no name holds the logits of all tokens, so that their memory is freed here.
            logits = gather_rows(model_forward(self, **inputs, use_cache=False).logits, sources)
            if token_loss == "scores":
                return score_logits(logits, targets)  # (2, N) from (N, V)
            losses = nn.functional.cross_entropy(logits.float(), targets.long(), reduction="none")
        return (losses * counts).sum() if token_loss == "sum" else losses

    model.forward = types.MethodType(forward, model)
    return refusal


def _begin_pass(
    model: Any, layout: Layout | PackedLayout, varlen: bool
) -> tuple[PackedLayout, dict[str, Any], torch.Tensor]:
    """Return a layout on the model's device, the arguments of its pass, and the tokens (N,) that predict."""
    device = model.get_input_embeddings().weight.device
    if isinstance(layout, Layout):
        in_one_call = varlen and uses_operators(device)
        layout = PackedLayout.of(layout, varlen=in_one_call).to(device)
    flat_lora = getattr(model, "flat_lora", None)
    if flat_lora is not None:
        flat_lora.refresh(_compute_dtype(device))
    if layout.layout.padded or not has_tree_attention(model):
        return layout, *_padded_inputs(layout.layout, device)
    return layout, *_layout_inputs(layout)


def causal_of(model: nn.Module) -> Any:
    """Return the causal model that PEFT wraps, or the model itself if it is not wrapped.

    LoRA layers sit inside the causal model, so it uses the adapter while that is switched on.
    """
    get_base_model: Any = getattr(model, "get_base_model", None)
    return get_base_model() if get_base_model is not None else model


def attention_of(model: Any) -> str:
    """Return the name of the attention implementation of a model's language part."""
    # Private attribute, tried with transformers 5.23, which has ``set_attn_implementation`` and no public
    # way to read what is set. Can go when it has one.
    return str(getattr(model.config.get_text_config(), "_attn_implementation", "eager"))


def has_tree_attention(model: nn.Module) -> bool:
    """Whether a model, wrapped by PEFT or not, can compute rows that are laid out as a tree."""
    return attention_of(causal_of(model)) == prefix_attention.NAME


class GatherRows(torch.autograd.Function):
    """Rows of a matrix, some of them more than once; its gradient is added up in place."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Return the rows (N, E) of x (B·T, E) at ``indices`` (N,)."""
        ctx.save_for_backward(indices)
        ctx.shape = x.shape
        return x.index_select(0, indices)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return zeros (B·T, E) with the gradient of each row added at its index."""
        (indices,) = ctx.saved_tensors
        (dy,) = gradients  # (N, E)
        return dy.new_zeros(ctx.shape).index_add_(0, indices, dy), None


def gather_rows(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the rows (N, E) of x (B, T, E) at ``indices`` (N,) among all B·T."""
    rows: torch.Tensor = GatherRows.apply(x.flatten(0, 1), indices)  # type: ignore[no-untyped-call]
    return rows


def tree_inputs(
    ids: torch.Tensor, positions: torch.Tensor, tree: PrefixTree | Tree
) -> dict[str, Any]:
    """Return the arguments of a pass over the tree of tokens (1, T)."""
    return {
        "input_ids": ids,
        "position_ids": positions,
        # A mask of four dimensions keeps transformers from building one; ours is in the tree.
        "attention_mask": torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=ids.device),
        "tree": tree,
    }


def _layout_inputs(packed: PackedLayout) -> tuple[dict[str, Any], torch.Tensor]:
    """Return the arguments of a pass over the tree, and the indices (N,) of the tokens that predict."""
    tree: PrefixTree | VarlenTree
    if "query_starts" in packed:
        tree = VarlenTree.of(packed)
    else:
        tree = PrefixTree(packed.layout.nodes, packed.numbers.device)
    ids, positions = (packed[name].long()[None] for name in ("ids", "positions"))  # (1, T) each
    return tree_inputs(ids, positions, tree), packed["sources"]


def _compute_dtype(device: torch.device) -> torch.dtype:
    """Return what matrix products compute in now."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.float32


def _padded_inputs(layout: Layout, device: torch.device) -> tuple[dict[str, Any], torch.Tensor]:
    """Return the arguments of the plain padded pass, and the indices (N,) of the tokens that predict."""
    batch = pad_right(
        layout.rows, pad_id=0, device=device
    )  # any id: nothing attends to the padding
    length = batch["input_ids"].shape[1]
    indices = [0] * len(layout.targets)
    for row, (numbers, (_, labels)) in enumerate(zip(layout.predictions, layout.rows, strict=True)):
        sources = [i - 1 for i in range(1, len(labels)) if labels[i] != IGNORED]
        for number, source in zip(numbers, sources, strict=True):
            indices[number] = row * length + source
    return {"input_ids": batch["input_ids"]}, torch.tensor(indices, dtype=torch.long, device=device)


def pad_right(
    rows: Sequence[Tokens], pad_id: int, device: torch.device | None = None
) -> dict[str, torch.Tensor]:
    """Return ``input_ids`` and ``labels`` (B, T) of rows of (ids, labels).

    Padding stands on the right and carries label -100. In a causal model no real token attends to it, so no
    attention mask is needed.
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
    """Whether the head's product of the hidden states, capped, equals the model's own logits."""
    head = model.get_output_embeddings()
    if not is_linear_head(head):
        return False
    with eval_mode(model):
        ids = torch.arange(PROBE_TOKENS, device=head.weight.device)[None]  # (1, T)
        expected = type(model).forward(model, ids, use_cache=False).logits.float()  # (1, T, V)
        hidden = model.base_model(ids, use_cache=False).last_hidden_state  # (1, T, E)
        weight = Head.of(model).whole()  # (V, E)
        logits = (hidden.to(weight.dtype) @ weight.T).float()  # (1, T, V)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
    error = (logits - expected).abs().max()
    return bool(error <= PROBE_TOLERANCE * expected.abs().max().clamp(min=1))


def is_linear_head(head: Any) -> bool:
    """Whether a head is a matrix without a bias, of which PEFT may train rows."""
    layer = getattr(head, "original_module", head)
    return isinstance(layer, nn.Linear) and layer.bias is None


def tree_refusal(model: Any, attention: str) -> str:
    """Return why a model's configuration rules a tree out by itself, or "".

    Args:
        model: a causal language model.
        attention: the implementation that it was loaded with.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    if attention != "sdpa":
        return f"attention is {attention}; only sdpa can be laid out as a tree"
    others = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if others:
        return f"{name} has {', '.join(sorted(others))} layers"
    return f"{name} has attention dropout" if getattr(config, "attention_dropout", 0) else ""


@torch.no_grad()
def _use_tree_attention(model: Any, varlen: bool) -> str:
    """Give the model our attention if a probe passes; return why it cannot have it, or "".

    The probe lays rows out as a tree, two of them with a common prefix, and compares their hidden states with
    those of the padded rows. Unless it passes, whatever it raises, the model keeps the attention it had.
    """
    name, attention = type(model).__name__, attention_of(model)
    if attention == prefix_attention.NAME:
        return ""
    refusal = tree_refusal(model, attention)
    if refusal:
        return refusal
    prefix_attention.register()
    passes = False
    try:
        with eval_mode(model):
            difference = first_conclusive(lambda attempt: _probe_tree(model, varlen, attempt))
        passes = not difference
        refusal = f"{name}: {difference}" if difference else ""
    except Exception as error:
        refusal = f"{name} cannot be laid out as a tree: {refusal_of(error)}"
    finally:
        if not passes:
            model.set_attn_implementation(attention)
    return refusal


def _probe_tree(model: Any, varlen: bool, attempt: int) -> tuple[str, bool]:
    """Compare a tree with padded rows; return the difference, or "", and whether it is conclusive."""
    ids = probe_ids(model, PROBE_TOKENS + 4, attempt)
    prefix, ends = ids[:PROBE_TOKENS], ids[PROBE_TOKENS:]
    rows = [[*prefix, *ends], [*prefix, ends[3], ends[0]], [*ends[2::-1], ends[3], ends[0]]]
    layout = lay_out([(row, row) for row in rows], share=True)
    device = model.get_input_embeddings().weight.device
    padded = _padded_inputs(layout, device)[0]["input_ids"]  # (B, T)

    def states(ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = model.base_model(ids, use_cache=False).last_hidden_state
        return hidden  # (B, T, E)

    model.set_attn_implementation("sdpa")
    together = states(padded)
    expected = [together[row, : len(path)] for row, path in enumerate(layout.paths)]  # (t, E) each
    alone = [states(padded[row : row + 1, : len(path)]) for row, path in enumerate(layout.paths)]
    noise = max(relative_gap(one[0], other) for one, other in zip(alone, expected, strict=True))
    moved = padded[:1].roll(1, dims=1)  # (1, T): the same last token after others
    moved[:, -1] = padded[:1, -1]
    context_effect = relative_gap(states(moved)[0, -1], together[0, -1])
    tolerance = Tolerance.of(model, noise, context_effect)
    model.set_attn_implementation(prefix_attention.NAME)
    packed = PackedLayout.of(layout, varlen=varlen and uses_operators(device)).to(device)
    inputs, _ = _layout_inputs(packed)
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[0]  # (T, E)
    for path, row_states in zip(layout.paths, expected, strict=True):
        gap = relative_gap(hidden[path], row_states)
        if not gap <= tolerance.gap:
            refusal = f"hidden states differ by {gap:.1g} from those of padded rows"
            return refusal, not gap <= tolerance.fault
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if "sliding_attention" in layer_types and inputs["tree"].windows == {None}:
        return "its layers do not pass the sliding window to the attention", True
    return "", True
