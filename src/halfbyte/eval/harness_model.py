"""Owns how a model in memory answers lm-evaluation-harness: what questions share is computed once."""

from __future__ import annotations

import sys
from functools import cached_property
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from halfbyte.data.render import IGNORED
from halfbyte.forward.scoring import ROWS_PER_SCORED, row_scores
from halfbyte.generate.batched import causal_of
from halfbyte.generate.continuous import SlotGenerator, slots_refusal

# Of a model's own settings for generation, those that change nothing of greedy answers.
HARMLESS = {
    *("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id"),
    *("do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p"),
    *("max_length", "use_cache", "cache_implementation"),
    *("transformers_version", "_from_model_config"),
}
NEUTRAL = {
    **{"repetition_penalty": 1, "encoder_repetition_penalty": 1, "length_penalty": 1},
    **{"num_beams": 1, "num_return_sequences": 1, "no_repeat_ngram_size": 0},
    **{"diversity_penalty": 0, "min_length": 0},
}
LOOKBACK = 2  # tokens more than a stop text has, since it may come in other pieces


class SharedPrefixLM(HFLM):
    """The harness's own transformers model, with passes of our own.

    It tokenises, truncates and reads answers as the harness does. The choices of a question, and the
    questions of a task, begin alike: they lie in one pass as a tree, where the harness computes each
    beginning anew; answers grow in slots, without padding, and each ends where it ends, where the
    harness goes on until the longest of a batch has. The figures are those of the harness, asking one
    question at a time, but for rounding.
    """

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Without a bar for the tokens of each call."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        rows = []
        for _, context, continuation in requests:
            assert context
            assert 0 < len(continuation) <= self.max_length
            ids = (context + continuation)[-(self.max_length + 1) :]
            labels = [IGNORED] * (len(ids) - len(continuation)) + continuation
            rows.append((ids, labels))
        num_rows = override_bs or max(1, int(self.batch_size) // ROWS_PER_SCORED)
        return [(-loss, all(hits)) for loss, hits in row_scores(self.model, rows, num_rows)]

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **settings: Any
    ) -> Tensor:
        """Ids of prompts and answers, padded: ``[rows, tokens]``."""
        known = {"attention_mask", "do_sample", "temperature"}
        is_greedy = not settings.get("do_sample") and not settings.get("temperature")
        is_greedy = is_greedy and set(settings) <= known
        mask = settings["attention_mask"].bool()
        if not is_greedy or not mask.any(dim=1).all() or self._own_way:
            made: Tensor = super()._model_generate(context, max_length, stop, **settings)
            return made
        lookback = {text: len(self.tok_encode(text)) + LOOKBACK for text in stop}

        told = causal_of(self.model).generation_config.eos_token_id
        stop_ids = [told] if isinstance(told, int) else list(told or [])

        def ends(ids: list[int]) -> bool:
            return ids[-1] in stop_ids or any(
                text in self.tokenizer.decode(ids[-count:]) for text, count in lookback.items()
            )

        answers = SlotGenerator(self.model).generate(
            [row[kept].tolist() for row, kept in zip(context, mask, strict=True)],
            stop_ids=[],  # the harness keeps the stop token, which may be no special one
            max_new_tokens=max_length - context.shape[1],
            ends=ends,
        )
        longest = max(len(answer.ids) for answer in answers)
        padded = [
            answer.ids + [self.tokenizer.pad_token_id] * (longest - len(answer.ids))
            for answer in answers
        ]
        return torch.cat([context, torch.tensor(padded, dtype=torch.long).to(context.device)], 1)

    @cached_property
    def _own_way(self) -> str:
        """Why the model generates as the harness has it, or ""."""
        told = causal_of(self.model).generation_config.to_diff_dict()
        own = {
            name
            for name, value in told.items()
            if name not in HARMLESS and value not in (None, False) and value != NEUTRAL.get(name)
        }
        refusal = f"it asks for {', '.join(sorted(own))}" if own else slots_refusal(self.model)
        if refusal:
            print(f"benchmarks: answers in padded batches: {refusal}", file=sys.stderr)
        return refusal

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: the report says which model it is."""
        return {}
