"""Owns generation in padded batches: prompts as ids in, answers as ids out, many at once, greedily."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from halfbyte.forward.packed import causal_of


@dataclass(frozen=True)
class Answer:
    """Generated ids without the stop token, and why generation ended: ``stop`` or ``length``."""

    ids: list[int]
    finish_reason: str


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[list[int]],
    *,
    stop_ids: list[int],
    pad_id: int,
    max_new_tokens: int,
    batch_rows: int,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Return greedy answers, in the order of the prompts.

    Prompts of similar length share a batch, padded on the left. The model's own generation settings
    (sampling, penalties, stop tokens) are not used, so that every variant decodes in the same way.

    Args:
        model: a causal language model, with or without an adapter.
        prompts: ids that end where the answer begins.
        stop_ids: ids that end an answer.
        pad_id: any id; padding is masked by position.
        max_new_tokens: largest number of tokens of an answer.
        batch_rows: number of prompts at once.
        progress: called with the number of prompts done so far.
    """
    from transformers import GenerationConfig

    causal = causal_of(model)
    device = next(model.parameters()).device
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=stop_ids,
        pad_token_id=pad_id,
        use_cache=True,
    )
    answers: dict[int, Answer] = {}
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    training = model.training
    model.eval()
    # generate() fills what is unset from the model's settings, which differ between variants.
    model_settings, causal.generation_config = causal.generation_config, GenerationConfig()
    for start in range(0, len(order), batch_rows):
        rows = order[start : start + batch_rows]
        longest = max(len(prompts[row]) for row in rows)
        ids = [[pad_id] * (longest - len(prompts[row])) + prompts[row] for row in rows]
        mask = [[0] * (longest - len(prompts[row])) + [1] * len(prompts[row]) for row in rows]
        sequences = causal.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=greedy,
        )
        for row, new_ids in zip(rows, sequences[:, longest:].tolist(), strict=True):
            answers[row] = until_stop(new_ids, set(stop_ids))
        if progress is not None:
            progress(len(answers))
    causal.generation_config = model_settings
    model.train(training)
    return [answers[row] for row in range(len(prompts))]


def until_stop(ids: list[int], stop_ids: set[int]) -> Answer:
    """Return the ids before the first stop token as an answer, or all of them if there is none."""
    for at, token in enumerate(ids):
        if token in stop_ids:
            return Answer(ids[:at], "stop")
    return Answer(ids, "length")
