"""Owns replies in the format of OpenAI's Responses: an answer as items, whole or as events."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from halfbyte.data.answer_format import Piece
from halfbyte.serve.chat_codec import ChatPrompt
from halfbyte.serve.chat_reply import AnswerParts
from halfbyte.serve.fields import Body
from halfbyte.serve.jobs import Event, Job
from halfbyte.serve.refusal import RefusedError
from halfbyte.serve.replies import CollectedAnswer, ReplyBuilder, sse, usage
from halfbyte.serve.response_schema import ResponsesRequest
from halfbyte.serve.service import ServedModel

# Of the items that are text: how their events and parts are named, and what those have besides.
TEXT_EVENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "reasoning": ("reasoning_text", {}),
    "message": ("output_text", {"logprobs": []}),
}
PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}  # of their ids


class ResponsesReplyBuilder(ReplyBuilder):
    """Build ``response`` objects and the events of their streams.

    Args:
        model: that answers.
        prompt: that is answered.
        body: the request, whose settings the reply repeats.
    """

    def __init__(self, model: ServedModel, prompt: ChatPrompt, body: ResponsesRequest) -> None:
        super().__init__(model, "resp_")
        self._body = body
        one_call = body.parallel_tool_calls is False
        self._parts = AnswerParts(model, prompt, one_call=one_call)
        self._items: list[dict[str, Any]] = []
        self._number = 0  # of the next event
        self._reason: str | None = None

    def whole(self, answers: Sequence[CollectedAnswer], jobs: Sequence[Job]) -> dict[str, Any]:
        """As ``ReplyBuilder.whole``."""
        (answer,) = answers
        for piece in self._parts.read(0, answer.text, ended=True):
            self._add(piece)
        self._reason = answer.finish_reason
        self._end_item()
        return self._response(jobs)

    def opening(self, jobs: Sequence[Job]) -> list[str]:
        """As ``ReplyBuilder.opening``."""
        response = {**self._response(jobs), "status": "in_progress", "usage": None}
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def event(self, number: int, event: Event) -> list[str]:
        """As ``ReplyBuilder.event``."""
        events = []
        ended = event.finish_reason is not None
        for piece in self._parts.read(number, event.text, ended=ended):
            events += self._add(piece)
        if ended:
            self._reason = event.finish_reason
            events += self._end_item()
        return events

    def closing(self, jobs: Sequence[Job]) -> list[str]:
        """As ``ReplyBuilder.closing``."""
        response = self._response(jobs)
        return [self._event(f"response.{response['status']}", response=response)]

    def failure(self, error: RefusedError) -> list[str]:
        """As ``ReplyBuilder.failure``."""
        fault = error.body["error"]
        return [
            self._event("error", code=fault["type"], message=fault["message"], param=fault["param"])
        ]

    def _response(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """Return the response as far as it is."""
        body, counts = self._body, usage(jobs)
        is_cut = self._reason == "length"
        return {
            "id": self.id,
            "object": "response",
            "created_at": float(self.created),
            "status": "incomplete" if is_cut else "completed",
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "model": self.model.name,
            "output": self._items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature or 0.0,
            "text": _as_sent(body.text) or {"format": {"type": "text"}},
            "tool_choice": _as_sent(body.tool_choice) or "auto",
            "tools": [
                {"strict": False, "parameters": None, **_as_sent(tool)} for tool in body.tools or []
            ],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": {
                    **counts["prompt_tokens_details"],
                    "cache_write_tokens": 0,
                },
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counts["total_tokens"],
            },
        }

    def _event(self, kind: str, **fields: Any) -> str:
        self._number += 1
        return sse({"type": kind, "sequence_number": self._number - 1, **fields}, kind)

    def _add(self, piece: Piece) -> list[str]:
        """Add what an answer goes on with to its items, and return the events of that."""
        if piece.call is not None:
            return [*self._end_item(), *self._call(piece)]
        kind = "reasoning" if piece.kind == "thoughts" else "message"
        events = []
        if (
            not self._items
            or self._items[-1]["status"] != "in_progress"
            or self._items[-1]["type"] != kind
        ):
            events = [*self._end_item(), *self._begin(kind)]
        item = self._items[-1]
        item["content"][0]["text"] += piece.text
        name, more = TEXT_EVENTS[kind]
        where = self._where(item)
        return [*events, self._event(f"response.{name}.delta", **where, delta=piece.text, **more)]

    def _begin(self, kind: str) -> list[str]:
        item: dict[str, Any] = {"id": _identity(kind), "type": kind, "status": "in_progress"}
        name, more = TEXT_EVENTS[kind]
        part: dict[str, Any] = {"type": name, "text": "", **more}
        if kind == "reasoning":
            item |= {"summary": [], "content": []}
        else:
            item |= {"role": "assistant", "content": []}
            part["annotations"] = []
        self._items.append(item)
        where = self._where(item)
        index = where["output_index"]
        added = self._event("response.output_item.added", output_index=index, item=item)
        item["content"].append(part)
        return [added, self._event("response.content_part.added", **where, part=part)]

    def _end_item(self) -> list[str]:
        """End the text that is being written, if any is."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return []
        item = self._items[-1]
        item["status"] = "incomplete" if self._reason == "length" else "completed"
        (part,) = item["content"]
        where = self._where(item)
        name, more = TEXT_EVENTS[item["type"]]
        return [
            self._event(f"response.{name}.done", **where, text=part["text"], **more),
            self._event("response.content_part.done", **where, part=part),
            self._event("response.output_item.done", output_index=where["output_index"], item=item),
        ]

    def _call(self, piece: Piece) -> list[str]:
        call = piece.call
        assert call is not None
        item = {
            "id": _identity("function_call"),
            "type": "function_call",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
            "status": "in_progress",
        }
        index = len(self._items)
        where = {"item_id": item["id"], "output_index": index}
        added = self._event("response.output_item.added", output_index=index, item=item)
        item |= {"arguments": call.arguments, "status": "completed"}
        self._items.append(item)
        name = "response.function_call_arguments"
        return [
            added,
            self._event(f"{name}.delta", **where, delta=call.arguments),
            self._event(f"{name}.done", **where, name=call.name, arguments=call.arguments),
            self._event("response.output_item.done", output_index=index, item=item),
        ]

    def _where(self, item: dict[str, Any]) -> dict[str, Any]:
        return {
            "item_id": item["id"],
            "output_index": len(self._items) - 1,
            "content_index": 0,
        }


def _as_sent(value: Any) -> Any:
    """Return a part of the request as it was sent."""
    return value.model_dump(by_alias=True, exclude_none=True) if isinstance(value, Body) else value


def _identity(kind: str) -> str:
    return f"{PREFIXES[kind]}_{uuid.uuid4().hex}"
