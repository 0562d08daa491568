"""Owns how a model in memory answers lm-evaluation-harness: what questions share is computed once."""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM

from halfbyte.data.render import IGNORED
from halfbyte.model.passes import row_scores


class SharedPrefixLM(HFLM):
    """The harness's own transformers model, but for log-likelihoods.

    It tokenises, truncates and generates as the harness does. The choices of a question, and the
    questions of a task, begin alike: they lie in one pass as a tree, where the harness computes each
    beginning anew. The figures are the same but for rounding.
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
        num_rows = override_bs or int(self.batch_size)
        return [(-loss, all(hits)) for loss, hits in row_scores(self.model, rows, num_rows)]

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: the report says which model it is."""
        return {}
