"""Owns the check that a tokenizer and a base fit: every token of the rows has a row in the embedding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

from halfbyte.data.render import Renderer
from halfbyte.data.samples import Samples
from halfbyte.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_vocabulary(
    name: str,
    config: PretrainedConfig,
    renderer: Renderer,
    parts: Sequence[Samples],
    new_ids: range,
) -> None:
    """Check the tokens of rows against a base, before it is loaded.

    Args:
        name: the base, for errors.
        config: its configuration as published.
        renderer: the renderer of the rows.
        parts: the rows, those of training first.
        new_ids: the ids of tokens that are added to the base.

    Raises:
        ModelError: the tokenizer has no EOS token, a token of a row or a stop token has no row in the
            embedding, or a new token is in no training row; every fault is named at once.
    """
    num_rows = int(config.get_text_config().vocab_size)
    tokenizer, faults = renderer.tokenizer, []
    if tokenizer.eos_token_id is None:
        faults.append(
            "its tokenizer has no EOS token, which ends answers and pads rows; name one as eos_token in"
            " tokenizer_config.json"
        )
    for stop in renderer.stop_ids:
        if stop >= num_rows and stop not in new_ids:
            faults.append(
                f"the stop token {tokenizer.convert_ids_to_tokens(stop)!r} has the id {stop}, and the"
                f" embedding {num_rows} rows, so no answer could end; name a data.chat_template with a stop"
                " token of this model, or set data.stop=eos"
            )
    seen = [set(chain.from_iterable(ids for ids, _ in part.tokens)) for part in parts]
    highest = max(set.union(*seen).difference(new_ids), default=0)
    if highest >= num_rows and highest not in renderer.stop_ids:
        place = next(e.row.place for part in parts for e in part if highest in e.encoded.ids)
        faults.append(
            f"{place} has the token {tokenizer.convert_ids_to_tokens(highest)!r} with the id {highest}, and"
            f" the embedding {num_rows} rows; use the tokenizer that belongs to the weights"
        )
    for index in sorted(set(new_ids) - seen[0]):
        faults.append(
            f"the new token {tokenizer.convert_ids_to_tokens(index)!r} is in no training row, so that it could"
            " not be learnt; leave it out of data.new_tokens"
        )
    if faults:
        raise ModelError("\n".join(f"{name}: {fault}" for fault in faults))
