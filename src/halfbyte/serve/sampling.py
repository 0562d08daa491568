"""Owns the choice of the next token: temperature, nucleus, penalties, a grammar; and its log-probability."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

SEEDS = 1 << 63  # that a generator takes


class GrammarError(Exception):
    """A grammar that cannot be followed any further."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, in the words of OpenAI's interface.

    Attributes:
        temperature: 0 is greedy.
        top_p: the smallest set of tokens with so much probability is chosen from.
        seed: of this answer; None: drawn anew.
        frequency_penalty: taken off a token's logit for each time it was generated.
        presence_penalty: taken off once.
        top_logprobs: so many of the likeliest tokens are told; None: no log-probabilities at all.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Choice:
    """A chosen token; log-probabilities are the model's own, before temperature and penalties."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Sampler:
    """The state of one answer."""

    settings: Sampling
    matcher: Any = None  # llguidance's, where the answer has a form
    seen: Counter[int] = field(default_factory=Counter)
    _random: torch.Generator | None = None

    def choose(self, logits: torch.Tensor) -> Choice:
        """A token by logits (V,), fp32."""
        settings = self.settings
        scores = logits
        if self.seen and (settings.frequency_penalty or settings.presence_penalty):
            tokens = torch.tensor(list(self.seen))
            counts = torch.tensor(list(self.seen.values()), dtype=scores.dtype)
            scores = scores.clone()
            scores[tokens] -= settings.presence_penalty + settings.frequency_penalty * counts
        if self.matcher is not None:
            scores = self._allowed(scores)
        token = int(scores.argmax()) if settings.temperature == 0 else self._draw(scores)
        if not torch.isfinite(logits[token]):
            raise ArithmeticError("the model gives NaN or infinity")
        self.seen[token] += 1
        if self.matcher is not None:
            self.matcher.consume_token(token)
            self._check_grammar()
        if settings.top_logprobs is None:
            return Choice(token)
        log_probs = torch.log_softmax(logits, dim=-1)
        best = log_probs.topk(settings.top_logprobs)
        top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return Choice(token, float(log_probs[token]), tuple(top))

    def _draw(self, scores: torch.Tensor) -> int:
        if self._random is None:
            self._random = torch.Generator()
            if self.settings.seed is None:
                self._random.seed()
            else:
                self._random.manual_seed(self.settings.seed % SEEDS)
        # The likeliest token keeps a score of 0, however small the temperature.
        temperature = max(self.settings.temperature, torch.finfo(scores.dtype).tiny)
        probs = torch.softmax((scores - scores.max()) / temperature, dim=-1)
        if self.settings.top_p < 1:
            ordered, places = probs.sort(descending=True)
            outside = ordered.cumsum(0) - ordered >= self.settings.top_p
            outside[0] = False
            ordered[outside] = 0
            return int(places[ordered.multinomial(1, generator=self._random)])
        return int(probs.multinomial(1, generator=self._random))

    def _allowed(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores with tokens that the grammar forbids at minus infinity."""
        # Not llguidance.torch, which compiles C++ for this.
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        self._check_grammar()
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: len(scores)]).bool()
        masked = torch.full_like(scores, float("-inf"))
        masked[: len(allowed)][allowed] = scores[: len(allowed)][allowed]
        return masked

    def _check_grammar(self) -> None:
        if self.matcher.is_error():
            raise GrammarError(str(self.matcher.get_error())[:300])
