"""Owns how a model in memory runs in lm-evaluation-harness: shared prefixes are computed once."""

from __future__ import annotations

import sys
from functools import cached_property
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from halfbyte.data.encoded import IGNORED
from halfbyte.forward.packed import causal_of
from halfbyte.forward.scoring import ROWS_PER_SCORED, row_scores
from halfbyte.generate.continuous import SlotGenerator, slots_refusal

# Settings of a model's generation config that do not change greedy answers.
HARMLESS = {
    *("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id"),
    *("do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p"),
    *("max_length", "use_cache", "cache_implementation"),
    *("transformers_version", "_from_model_config"),
}
# The values at which other settings do not change them.
NEUTRAL = {
    **{"repetition_penalty": 1, "encoder_repetition_penalty": 1, "length_penalty": 1},
    **{"num_beams": 1, "num_return_sequences": 1, "no_repeat_ngram_size": 0},
    **{"diversity_penalty": 0, "min_length": 0},
}
LOOKBACK = 2  # tokens beyond the length of a stop text, which may be tokenised differently


class SharedPrefixLM(HFLM):
    """The harness's transformers model with forward passes of our own.

    It tokenises, truncates and parses answers as the harness does. The choices of a question, and the
    questions of a task, share prefixes: here they are one pass over a prefix tree, where the harness
    computes each prefix again. Answers are generated in slots, without padding, and each stops at its end,
    where the harness goes on until the longest of a batch has ended. But for rounding, the figures are
    those of the harness when it asks one question at a time.
    """

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Score continuations without a progress bar for each call."""
        scores: list[tuple[float, bool]] = super().loglikelihood(
            requests, disable_tqdm=disable_tqdm
        )
        return scores

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether it is the greedy one."""
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
        """Return the ids of prompts and answers, padded: ``[rows, tokens]``."""
        supported = {"attention_mask", "do_sample", "temperature"}
        is_greedy = not settings.get("do_sample") and not settings.get("temperature")
        is_greedy = is_greedy and set(settings) <= supported
        mask = settings["attention_mask"].bool()
        if not is_greedy or not mask.any(dim=1).all() or self._slots_refusal:
            output: Tensor = super()._model_generate(context, max_length, stop, **settings)
            return output
        lookback = {text: len(self.tok_encode(text)) + LOOKBACK for text in stop}

        eos_ids = causal_of(self.model).generation_config.eos_token_id
        stop_ids = [eos_ids] if isinstance(eos_ids, int) else list(eos_ids or [])

        def ends(ids: list[int]) -> bool:
            return ids[-1] in stop_ids or any(
                text in self.tokenizer.decode(ids[-count:]) for text, count in lookback.items()
            )

        answers = SlotGenerator(self.model).generate(
            [row[kept].tolist() for row, kept in zip(context, mask, strict=True)],
            stop_ids=[],  # the harness keeps the stop token, which may not be a special token
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
    def _slots_refusal(self) -> str:
        """Say why the model cannot generate in slots and does it as the harness would; "" where it can."""
        config = causal_of(self.model).generation_config.to_diff_dict()
        unsupported = {
            name
            for name, value in config.items()
            if name not in HARMLESS and value not in (None, False) and value != NEUTRAL.get(name)
        }
        refusal = (
            f"its generation config sets {', '.join(sorted(unsupported))}"
            if unsupported
            else slots_refusal(self.model)
        )
        if refusal:
            print(f"benchmarks: generating in padded batches: {refusal}", file=sys.stderr)
        return refusal

    def get_model_info(self) -> dict[str, Any]:
        """Return nothing: the report names the model."""
        return {}
