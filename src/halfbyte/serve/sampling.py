"""Owns sampling: temperature, nucleus, penalties and grammars choose a token and its log-probability."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from halfbyte.generate.grammar import consume, masked

NUM_SEEDS = 1 << 63  # a generator takes seeds below this


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled, with the parameter names of OpenAI's API.

    Attributes:
        temperature: 0 is greedy.
        top_p: sample from the smallest set of tokens with at least this probability; 0 is the likeliest alone.
        top_k: sample from so many of the likeliest tokens; 0 is all.
        min_p: sample from tokens at least so likely as this share of the likeliest one's probability.
        seed: the answer's seed; None draws a new one.
        frequency_penalty: subtracted from a token's logit once for each time the token was generated.
        presence_penalty: subtracted once from the logit of each token that was generated.
        repetition_penalty: positive logits of tokens in the prompt and the answer are divided by it, negative ones
            multiplied (CTRL, Keskar et al. 2019, §4.1).
        logit_bias: added to the logits of tokens, by id.
        top_logprobs: how many of the likeliest tokens are reported; None reports no log-probabilities.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None


@dataclass(frozen=True)
class SampledToken:
    """A sampled token; log-probabilities are the model's, before temperature and penalties."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def scored_tokens(logits: torch.Tensor, tokens: list[int], num_top: int) -> list[SampledToken]:
    """Return tokens with their log-probabilities, and those of the likeliest ones in their place.

    Args:
        logits: (N, V), fp32.
        tokens: N of them.
        num_top: number of the likeliest ones.
    """
    log_probs = torch.log_softmax(logits, dim=-1)  # (N, V)
    likeliest = log_probs.topk(num_top, dim=-1)  # (N, num_top)
    chosen = log_probs.gather(1, torch.tensor(tokens)[:, None])[:, 0]  # (N,)
    rows = zip(
        tokens,
        chosen.tolist(),
        likeliest.indices.tolist(),
        likeliest.values.tolist(),
        strict=True,
    )
    return [
        SampledToken(token, value, tuple(zip(ids, top, strict=True)))
        for token, value, ids, top in rows
    ]


@dataclass
class Sampler:
    """The sampling state of one answer.

    Attributes:
        matcher: llguidance's state, if the answer must follow a grammar.
        prompt: ids of the prompt, whose repetition is penalised.
    """

    settings: Sampling
    matcher: Any = None
    prompt: Sequence[int] = ()
    token_counts: Counter[int] = field(default_factory=Counter)
    _generator: torch.Generator | None = None

    def sample(self, logits: torch.Tensor) -> SampledToken:
        """Choose a token from logits (V,) in fp32.

        Raises:
            ArithmeticError: the token's logit is NaN or infinite.
            GrammarError: the grammar cannot be followed any further.
        """
        settings = self.settings
        scores = self._penalised(logits)
        if self.matcher is not None:
            scores = masked(self.matcher, scores)
        token = int(scores.argmax()) if settings.temperature == 0 else self._draw(scores)
        if not torch.isfinite(logits[token]):
            raise ArithmeticError("the model returned NaN or infinity")
        self.token_counts[token] += 1
        if self.matcher is not None:
            consume(self.matcher, token)
        if settings.top_logprobs is None:
            return SampledToken(token)
        return scored_tokens(logits[None], [token], settings.top_logprobs)[0]

    def _penalised(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits (V,) with penalties and biases."""
        settings, scores = self.settings, logits
        if settings.repetition_penalty != 1:
            seen = torch.tensor(sorted({*self.prompt, *self.token_counts}))
            scores = scores.clone()
            before = scores[seen]
            penalty = settings.repetition_penalty
            scores[seen] = torch.where(before > 0, before / penalty, before * penalty)
        if self.token_counts and (settings.frequency_penalty or settings.presence_penalty):
            tokens = torch.tensor(list(self.token_counts))
            counts = torch.tensor(list(self.token_counts.values()), dtype=scores.dtype)
            scores = scores.clone()
            scores[tokens] -= settings.presence_penalty + settings.frequency_penalty * counts
        if settings.logit_bias:
            biased = torch.tensor(list(settings.logit_bias))
            scores = scores.clone()
            scores[biased] += torch.tensor(list(settings.logit_bias.values()), dtype=scores.dtype)
        return scores

    def _draw(self, scores: torch.Tensor) -> int:
        if self._generator is None:
            self._generator = torch.Generator()
            if self.settings.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.settings.seed % NUM_SEEDS)
        # The likeliest token keeps a score of 0, however small the temperature.
        temperature = max(self.settings.temperature, torch.finfo(scores.dtype).tiny)
        probs = torch.softmax((scores - scores.max()) / temperature, dim=-1)
        settings = self.settings
        if settings.top_p < 1 or settings.top_k or settings.min_p:
            sorted_probs, tokens = probs.sort(descending=True)
            if settings.top_k:
                sorted_probs[settings.top_k :] = 0
            sorted_probs[sorted_probs < settings.min_p * sorted_probs[0]] = 0
            outside = sorted_probs.cumsum(0) - sorted_probs >= settings.top_p * sorted_probs.sum()
            outside[0] = False
            sorted_probs[outside] = 0
            return int(tokens[sorted_probs.multinomial(1, generator=self._generator)])
        return int(probs.multinomial(1, generator=self._generator))
