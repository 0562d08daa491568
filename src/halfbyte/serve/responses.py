"""Owns OpenAI's Responses: its requests as chats, and the answers to them in its format."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from halfbyte.data.answer_format import Piece
from halfbyte.serve.chat_codec import ChatPrompt
from halfbyte.serve.chat_reply import AnswerParts
from halfbyte.serve.fields import Body, Label, MaxTokens, Name, Options, Text
from halfbyte.serve.jobs import Event, Job
from halfbyte.serve.refusal import RefusedError
from halfbyte.serve.replies import CollectedAnswer, ReplyBuilder, sse, usage
from halfbyte.serve.schema import (
    MAX_MESSAGES,
    MAX_TOOLS,
    MAX_TOP_LOGPROBS,
    ChatRequest,
    Content,
    Effort,
)
from halfbyte.serve.service import ServedModel


class InputItem(Body):
    """A turn of the conversation: a message, a call, what a tool said, or thoughts of an earlier answer."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Content | None = None
    id: Label | None = None
    call_id: Label | None = None
    name: Annotated[Text, Field(max_length=256)] | None = None
    arguments: Text | None = None
    output: Content | None = None
    summary: Content | None = None


class ResponseTool(Body):
    """A tool, written flat."""

    type: Annotated[str, Field(max_length=64)] = "function"
    name: Annotated[Text, Field(min_length=1, max_length=256, pattern=r"^[^\s]+$")] | None = None
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedResponseTool(Body):
    """The function that must be called."""

    type: Annotated[str, Field(max_length=64)] = "function"
    name: Annotated[str, Field(max_length=256)] | None = None


class TextFormat(Body):
    """How the text of an answer looks."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Annotated[str, Field(max_length=64)] | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextSettings(Body):
    """Settings of the text of an answer."""

    format: TextFormat | None = None


class Reasoning(Body):
    """How much is to be thought."""

    effort: Effort | None = None


class ResponsesRequest(Body):
    """The body of /v1/responses."""

    model: Name
    input: (
        Text
        | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    )
    instructions: Text | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    stream: bool | None = None
    text: TextSettings | None = None
    reasoning: Reasoning | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedResponseTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: Options | None = None
    user: Any = Field(None, description="Taken and not used; never logged.")


def as_chat(body: ResponsesRequest) -> ChatRequest:
    """Return a request for a response as one for a chat.

    Raises:
        RefusedError: an item lacks what makes it one.
    """
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        messages.append({"role": "user", "content": body.input})
    else:
        for item in body.input:
            _add_item(messages, item)
    form = body.text.format if body.text else None
    response_format = None
    if form is not None:
        response_format = {"type": form.type}
        if form.type == "json_schema":
            response_format |= {"json_schema": {"name": form.name, "schema": form.json_schema}}  # type: ignore[dict-item]
    choice: Any = body.tool_choice
    if isinstance(choice, NamedResponseTool):
        choice = {"type": choice.type, "function": {"name": choice.name or ""}}
    return ChatRequest.model_validate(
        {
            "model": body.model,
            "messages": messages,
            "max_tokens": body.max_output_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "stream": body.stream,
            "response_format": response_format,
            "reasoning_effort": body.reasoning.effort if body.reasoning else None,
            "tools": [_tool(tool) for tool in body.tools or []],
            "tool_choice": choice,
            "parallel_tool_calls": body.parallel_tool_calls,
            "chat_template_kwargs": body.chat_template_kwargs,
        }
    )


def _add_item(messages: list[dict[str, Any]], item: InputItem) -> None:
    """Add an item to the messages; thoughts, text and calls of one answer are one message."""
    if item.type == "function_call_output":
        if item.call_id is None:
            raise RefusedError(400, "input: a function_call_output lacks its call_id", "input")
        output = _content(item.output)
        messages.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
        return
    role = item.role if item.type == "message" else "assistant"
    if role is None:
        raise RefusedError(400, "input: a message lacks its role", "input")
    if role != "assistant":
        messages.append({"role": role, "content": _content(item.content)})
        return
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if last is None or (item.type == "message" and last.get("content")):
        last = {"role": "assistant", "content": ""}
        messages.append(last)
    if item.type == "function_call":
        if not item.name:
            raise RefusedError(400, "input: a function_call lacks its name", "input")
        function = {"name": item.name, "arguments": item.arguments or "{}"}
        call = {"id": item.call_id or item.id, "type": "function", "function": function}
        last.setdefault("tool_calls", []).append(call)
    elif item.type == "reasoning":
        parts = item.content if item.content else item.summary
        texts = [part.text or "" for part in parts] if isinstance(parts, list) else [parts or ""]
        last["reasoning_content"] = "".join(texts)
    else:
        last["content"] = _content(item.content)


def _content(content: Content | None) -> Any:
    if not isinstance(content, list):
        return content or ""
    return [part.model_dump(exclude_none=True) for part in content]


def _tool(tool: ResponseTool) -> dict[str, Any]:
    if tool.type != "function" or tool.name is None:
        return {"type": tool.type}
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
    }
    return {"type": "function", "function": function}


class ResponsesReplyBuilder(ReplyBuilder):
    """Build ``response`` objects and the events of their streams.

    Args:
        model: that answers.
        prompt: that is answered.
        body: the request, whose settings the reply repeats.
    """

    def __init__(self, model: ServedModel, prompt: ChatPrompt, body: ResponsesRequest) -> None:
        super().__init__(model, "resp_")
        self._parts, self._body = AnswerParts(model, prompt), body
        self._items: list[dict[str, Any]] = []
        self._number = 0  # of the next event
        self._reason: str | None = None

    def whole(self, answers: Sequence[CollectedAnswer], jobs: Sequence[Job]) -> dict[str, Any]:
        """As ``ReplyBuilder.whole``."""
        (answer,) = answers
        for piece in self._parts.read(0, answer.text, ended=True):
            self._add(piece)
        self._end_item()
        self._reason = answer.finish_reason
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
        return [self._event("error", **error.body["error"])]

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
            "text": {"format": {"type": "text"}},
            "tool_choice": body.tool_choice if isinstance(body.tool_choice, str) else "auto",
            "tools": [
                {
                    "strict": False,
                    **tool.model_dump(include={"type", "name", "description", "parameters"}),
                }
                for tool in body.tools or []
            ],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": counts["prompt_tokens_details"],
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
        name = "reasoning_text" if kind == "reasoning" else "output_text"
        more: dict[str, Any] = {} if kind == "reasoning" else {"logprobs": []}
        where = self._where(item)
        return [*events, self._event(f"response.{name}.delta", **where, delta=piece.text, **more)]

    def _begin(self, kind: str) -> list[str]:
        if kind == "reasoning":
            item = {
                "id": _identity("rs"),
                "type": kind,
                "summary": [],
                "content": [],
                "status": "in_progress",
            }
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        else:
            item = {
                "id": _identity("msg"),
                "type": kind,
                "role": "assistant",
                "content": [],
                "status": "in_progress",
            }
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._items.append(item)
        index = len(self._items) - 1
        added = self._event("response.output_item.added", output_index=index, item=item)
        item["content"].append(part)  # type: ignore[attr-defined]
        where = self._where(item)
        return [added, self._event("response.content_part.added", **where, part=part)]

    def _end_item(self) -> list[str]:
        """End the text that is being written, if any is."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return []
        item = self._items[-1]
        item["status"] = "completed"
        (part,) = item["content"]
        where = self._where(item)
        name = "reasoning_text" if item["type"] == "reasoning" else "output_text"
        more: dict[str, Any] = {} if item["type"] == "reasoning" else {"logprobs": []}
        return [
            self._event(f"response.{name}.done", **where, text=part["text"], **more),
            self._event("response.content_part.done", **where, part=part),
            self._event("response.output_item.done", output_index=where["output_index"], item=item),
        ]

    def _call(self, piece: Piece) -> list[str]:
        call = piece.call
        assert call is not None
        item = {
            "id": _identity("fc"),
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


def _identity(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
