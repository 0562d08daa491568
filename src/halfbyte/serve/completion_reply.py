"""Owns replies to completions: the text that continues a prompt, perhaps behind the prompt and its scores."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from halfbyte.serve.jobs import Event, Job
from halfbyte.serve.replies import ChoicesBuilder, CollectedAnswer
from halfbyte.serve.sampling import SampledToken
from halfbyte.serve.service import ServedModel


class CompletionReplyBuilder(ChoicesBuilder):
    """Build ``text_completion`` objects.

    Args:
        model: that answers.
        echoed: the text of each prompt that the reply begins with, by the number of the answer; empty for none.
        wants_logprobs: as in ``ChoicesBuilder``.
        with_usage: as in ``ChoicesBuilder``.
    """

    object = "text_completion"
    chunk = "text_completion"

    def __init__(
        self,
        model: ServedModel,
        echoed: Sequence[str] = (),
        *,
        wants_logprobs: bool,
        with_usage: bool,
    ) -> None:
        super().__init__(model, wants_logprobs=wants_logprobs, with_usage=with_usage)
        self._echoed = dict(enumerate(echoed))
        self._decoders: dict[int, _Offsets] = {}  # by the number of the answer
        self._jobs: Sequence[Job] = ()

    def whole(self, answers: Sequence[CollectedAnswer], jobs: Sequence[Job]) -> dict[str, Any]:
        """As ``ReplyBuilder.whole``."""
        self._jobs = jobs
        return super().whole(answers, jobs)

    def opening(self, jobs: Sequence[Job]) -> list[str]:
        """As ``ReplyBuilder.opening``; a prompt comes with the first event, which follows its scores."""
        self._jobs = jobs
        return []

    def choice(self, number: int, answer: CollectedAnswer) -> dict[str, Any]:
        """As ``ChoicesBuilder.choice``."""
        return self._object(number, answer.text, answer.tokens, answer.finish_reason)

    def delta(self, number: int, event: Event) -> dict[str, Any] | None:
        """As ``ChoicesBuilder.delta``."""
        adds = event.text or (event.tokens and self.wants_logprobs) or number in self._echoed
        if not adds and event.finish_reason is None:
            return None
        return self._object(number, event.text, event.tokens, event.finish_reason)

    def _object(
        self, number: int, text: str, tokens: Sequence[SampledToken], reason: str | None
    ) -> dict[str, Any]:
        if number in self._echoed:
            text = self._echoed.pop(number) + text
            job = self._jobs[number]
            # Nothing predicts the first token.
            tokens = [SampledToken(job.prompt[0]), *job.prompt_tokens, *tokens]
        return {
            "index": number,
            "text": text,
            "logprobs": self._logprobs(number, tokens) if tokens else None,
            "finish_reason": reason,
        }

    def _logprobs(self, number: int, tokens: Sequence[SampledToken]) -> dict[str, Any] | None:
        if not self.wants_logprobs:
            return None

        def piece(token: int) -> str:
            return self.model.codec.piece(token)[0]

        decoder = self._decoders.setdefault(number, _Offsets())
        return {
            "tokens": [piece(sampled.token) for sampled in tokens],
            "token_logprobs": [sampled.logprob for sampled in tokens],
            "top_logprobs": [
                None
                if sampled.logprob is None
                # Of two tokens with the same text, the likelier one.
                else {piece(token): logprob for token, logprob in reversed(sampled.top)}
                for sampled in tokens
            ],
            "text_offset": [decoder.add(self._content(sampled.token)) for sampled in tokens],
        }

    def _content(self, token: int) -> bytes:
        """Return the bytes of a token; none for one that begins every text, which no text shows."""
        codec = self.model.codec
        is_bos = token == codec.renderer.tokenizer.bos_token_id
        return b"" if is_bos and codec.renderer.has_bos else codec.piece(token)[1]


class _Offsets:
    """Counts the characters of a text that comes in pieces of bytes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        self._count = 0

    def add(self, content: bytes) -> int:
        """Add a piece and return where it begins; within a character, where that one does."""
        start = self._count
        self._count += len(self._decoder.decode(content))
        return start
