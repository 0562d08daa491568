"""Owns tokens that a run adds to its base: in the tokenizer, as rows of embedding and head, and their training.

PEFT trains such rows as ``trainable_token_indices``, and computes with a copy of the whole embedding, and a
gradient of its size, in each pass. Here the frozen matrix stays as it is and only the rows are differentiated.

Shapes: T tokens of a pass, K new tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from halfbyte.errors import ModelError
from halfbyte.model.resolve import Base

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_tokens(tokenizer: PreTrainedTokenizerBase, base: Base) -> None:
    """Add the base's new tokens to its tokenizer, each to be read wherever its text stands.

    They are control tokens only where a chat template writes them.

    Raises:
        ModelError: the tokenizer has one of them already, reads nothing of one, or cannot number them.
    """
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    for token in base.new_tokens:
        if token in known:
            raise ModelError(
                f"data.new_tokens: {base.name} has the token {token!r} already, with the id {known[token]}; leave"
                " it out"
            )
        if not tokenizer(token, add_special_tokens=False)["input_ids"]:
            raise ModelError(
                f"data.new_tokens: {token!r} is no text to the tokenizer of {base.name}"
            )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in base.new_tokens])
    taken = sorted(set(new_ids(tokenizer, base)) & set(known.values()))
    if taken:
        raise ModelError(
            f"data.new_tokens: the ids of {base.name}'s tokenizer have gaps, and the next ones, such as"
            f" {taken[0]}, are those of other tokens; no token can be added"
        )


def new_ids(tokenizer: PreTrainedTokenizerBase, base: Base) -> range:
    """Return the ids of the base's new tokens, in their order, in a tokenizer that has them."""
    if not base.new_tokens:
        return range(0)
    first = int(tokenizer.convert_tokens_to_ids(base.new_tokens[0]))
    return range(first, first + len(base.new_tokens))


def add_rows(
    model: Any, plain: PreTrainedTokenizerBase, grown: PreTrainedTokenizerBase, base: Base
) -> None:
    """Give each new token rows in a model's embedding and head: the mean of those of its text's tokens.

    Args:
        model: a causal language model; it grows where it has too few rows.
        plain: the tokenizer without the new tokens.
        grown: the tokenizer with them.
        base: the base that they are added to.
    """
    ids, num_rows = new_ids(grown, base), model.get_input_embeddings().weight.shape[0]
    if ids.stop > num_rows:
        model.resize_token_embeddings(ids.stop, mean_resizing=False)
    for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
        if ids.start > num_rows:
            # Those of tokens that the base has no rows for; random ones would differ from load to load.
            mean = layer.weight.data[:num_rows].mean(0, dtype=torch.float32)
            layer.weight.data[num_rows : ids.start] = mean
        for token, index in zip(base.new_tokens, ids, strict=True):
            pieces = plain(token, add_special_tokens=False)["input_ids"]
            layer.weight.data[index] = layer.weight.data[pieces].float().mean(0)
            if getattr(layer, "bias", None) is not None:
                layer.bias.data[index] = layer.bias.data[pieces].float().mean()


def row_targets(model: Any, ids: range) -> dict[str, list[int]] | None:
    """Return PEFT's ``trainable_token_indices`` for a model's new tokens; None where there are none."""
    if not ids:
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embedding] if head.weight is embedding.weight else [embedding, head]
    names = {module: name for name, module in model.named_modules()}
    return {names[layer]: list(ids) for layer in layers}


def row_layers(model: nn.Module) -> list[Any]:
    """Return PEFT's layers with trained rows."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    return [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]


def train_rows_apart(model: nn.Module) -> None:
    """Let PEFT's layers with trained rows compute without a copy of the whole matrix, in place."""
    for layer in row_layers(model):
        # Internal to PEFT, tried with 0.21. Can go when it differentiates the rows alone.
        layer.forward_adapters = functools.partial(_forward, layer, layer.forward_adapters)
        layer.get_merged_weights = functools.partial(
            lambda layer, _: layer.base_layer.weight, layer
        )


def set_rows(model: nn.Module) -> None:
    """Write the trained rows into the matrices, for a model that is not trained further."""
    for layer in row_layers(model):
        layer.merge()


def trained_rows(module: Any) -> tuple[torch.Tensor, int] | None:
    """Return the rows (K, E) of an embedding or head that are trained, and the first one's id; None if none are."""
    layer = getattr(module, "token_adapter", None)
    if layer is None or layer.merged or layer.disable_adapters:
        return None
    (name,) = layer.active_adapters
    return layer.trainable_tokens_delta[name], layer.token_indices[name][0]


def slots_of(ids: torch.Tensor, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which ids are of the ``count`` tokens from ``start`` on, and the row of each, 0 for others."""
    slots = ids - start
    is_new = (slots >= 0) & (slots < count)
    return is_new, slots.where(is_new, 0)


def _forward(layer: Any, plain: Any, x: torch.Tensor, active: list[str], *args: Any) -> Any:
    """Compute an embedding of ids (…), or the logits of states (…, E), with the trained rows."""
    base: Any = layer.base_layer
    if not active or layer.merged or layer.disable_adapters:
        return plain(x, active, *args)
    rows, start = layer.trainable_tokens_delta[active[0]], layer.token_indices[active[0]][0]
    out = base(x)
    if isinstance(base, nn.Embedding):
        is_new, slots = slots_of(x, start, len(rows))
        # Looked up in fp32: the gradients of a token that stands often would not add up in 16 bits.
        new = nn.functional.embedding(slots, rows).to(base.weight.dtype)  # (…, E)
        scale: Any = getattr(base, "embed_scale", None)
        if scale is not None:  # Gemma scales what it looks up
            new = new * (scale.to(new.dtype) if isinstance(scale, torch.Tensor) else scale)
        return torch.where(is_new[..., None], new.to(out.dtype), out)
    bias = None if base.bias is None else base.bias[start : start + len(rows)]
    logits = nn.functional.linear(x, rows.to(x.dtype), bias)  # (…, K)
    return torch.cat([out[..., :start], logits, out[..., start + len(rows) :]], dim=-1)
