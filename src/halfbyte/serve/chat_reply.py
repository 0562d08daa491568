"""Owns replies to chats: thoughts, text and tool calls of each answer, whole or as deltas."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from halfbyte.data.answer_format import AnswerReader, Piece
from halfbyte.data.conversation import ToolCall
from halfbyte.serve.chat_codec import ChatPrompt
from halfbyte.serve.jobs import Event, Job
from halfbyte.serve.replies import ChoicesBuilder, CollectedAnswer, sse
from halfbyte.serve.sampling import SampledToken
from halfbyte.serve.service import ServedModel

ID_CHARS = 9  # of a call's id, all letters and digits: Mistral's templates refuse others


class AnswerParts:
    """Reads the answers of a request in their parts; calls get an id.

    Args:
        model: that answers.
        prompt: that is answered.
        one_call: whether only the first call of an answer counts, where one list has several.
    """

    def __init__(self, model: ServedModel, prompt: ChatPrompt, *, one_call: bool = False) -> None:
        self._model, self._prompt, self._one_call = model, prompt, one_call
        self._readers: dict[int, AnswerReader] = {}

    def read(self, number: int, text: str, *, ended: bool) -> list[Piece]:
        """Return what new text of an answer adds to its parts.

        Args:
            number: of the answer.
            text: what it goes on with.
            ended: whether that is its end.
        """
        if number not in self._readers:
            self._readers[number] = self._model.codec.reader(self._prompt)
        reader = self._readers[number]
        pieces = reader.push(text) if text else []
        if ended:
            pieces += reader.flush()
        if self._one_call:
            pieces = pieces[: next((n for n, one in enumerate(pieces, 1) if one.call), len(pieces))]
        return [
            piece._replace(call=replace(piece.call, id=uuid.uuid4().hex[:ID_CHARS]))
            if piece.call
            else piece
            for piece in pieces
        ]

    def finish_reason(self, number: int, reason: str | None) -> str | None:
        """Return ``tool_calls`` for an answer that ended by itself and called tools, else the reason."""
        reader = self._readers.get(number)
        calls = reader is not None and reader.num_calls > 0 and not reader.malformed
        return "tool_calls" if calls and reason == "stop" else reason


class ChatReplyBuilder(ChoicesBuilder):
    """Build ``chat.completion`` objects and their chunks.

    Args:
        model: that answers.
        prompt: that is answered.
        wants_logprobs: as in ``ChoicesBuilder``.
        with_usage: as in ``ChoicesBuilder``.
        one_call: as in ``AnswerParts``.
    """

    object = "chat.completion"
    chunk = "chat.completion.chunk"

    def __init__(
        self,
        model: ServedModel,
        prompt: ChatPrompt,
        *,
        wants_logprobs: bool,
        with_usage: bool,
        one_call: bool,
    ) -> None:
        super().__init__(model, wants_logprobs=wants_logprobs, with_usage=with_usage)
        self._parts = AnswerParts(model, prompt, one_call=one_call)
        self._num_calls: Counter[int] = Counter()

    def opening(self, jobs: Sequence[Job]) -> list[str]:
        """Begin each answer with its role."""
        first = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
        return [
            sse(
                {
                    **self.head(stream=True),
                    "choices": [{"index": number, **first, "finish_reason": None}],
                }
            )
            for number in range(len(jobs))
        ]

    def choice(self, number: int, answer: CollectedAnswer) -> dict[str, Any]:
        """As ``ChoicesBuilder.choice``."""
        message = self._message(self._parts.read(number, answer.text, ended=True))
        content = message.pop("content", "")
        calls = message.get("tool_calls")
        return {
            "index": number,
            "message": {
                "role": "assistant",
                "content": content or None if calls else content,
                **message,
            },
            "logprobs": self._logprobs(answer.tokens),
            "finish_reason": self._parts.finish_reason(number, answer.finish_reason),
        }

    def delta(self, number: int, event: Event) -> dict[str, Any] | None:
        """As ``ChoicesBuilder.delta``."""
        pieces = self._parts.read(number, event.text, ended=event.finish_reason is not None)
        delta = self._message(pieces)
        for call in delta.get("tool_calls", ()):
            call["index"] = self._num_calls[number]
            self._num_calls[number] += 1
        has_logprobs = bool(event.tokens) and self.wants_logprobs
        if not (delta or event.finish_reason or has_logprobs):
            return None
        return {
            "index": number,
            "delta": delta,
            "logprobs": self._logprobs(event.tokens) if event.tokens else None,
            "finish_reason": self._parts.finish_reason(number, event.finish_reason),
        }

    def _message(self, pieces: list[Piece]) -> dict[str, Any]:
        """Return pieces as the fields of a message."""
        message: dict[str, Any] = {}
        for piece in pieces:
            if piece.call is not None:
                message.setdefault("tool_calls", []).append(call_object(piece.call))
            else:
                key = "reasoning_content" if piece.kind == "thoughts" else "content"
                message[key] = message.get(key, "") + piece.text
        return message

    def _logprobs(self, tokens: Sequence[SampledToken]) -> dict[str, Any] | None:
        if not self.wants_logprobs:
            return None
        content = [
            {
                **self._token_object(sampled.token, sampled.logprob),
                "top_logprobs": [self._token_object(*pair) for pair in sampled.top],
            }
            for sampled in tokens
        ]
        return {"content": content, "refusal": None}

    def _token_object(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, content = self.model.codec.piece(token)
        return {"token": text, "logprob": logprob, "bytes": list(content)}


def call_object(call: ToolCall) -> dict[str, Any]:
    """Return a tool call as OpenAI's chats write it."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}
