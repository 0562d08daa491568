"""Owns the requests of OpenAI's Responses, and how each is one for a chat."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from halfbyte.serve.fields import Body, Label, MaxTokens, Options, Text
from halfbyte.serve.refusal import RefusedError
from halfbyte.serve.schema import (
    MAX_MESSAGES,
    MAX_TOOLS,
    ChatRequest,
    Content,
    Reasoning,
    SampledRequest,
)


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


class ResponsesRequest(SampledRequest):
    """The body of /v1/responses."""

    input: (
        Text
        | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    )
    instructions: Text | None = None
    max_output_tokens: MaxTokens | None = None
    text: TextSettings | None = None
    reasoning: Reasoning | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedResponseTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: Options | None = None


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
    fields = {name: getattr(body, name) for name in SampledRequest.model_fields}
    fields |= {
        "messages": messages,
        "max_tokens": body.max_output_tokens,
        "response_format": response_format,
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
        "tools": [_tool(tool) for tool in body.tools or []],
        "tool_choice": choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "chat_template_kwargs": body.chat_template_kwargs,
    }
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        fault = error.errors()[0]
        raise RefusedError(400, f"input: {fault['msg']}", "input") from None


def _add_item(messages: list[dict[str, Any]], item: InputItem) -> None:
    """Add an item to the messages; thoughts, text and calls of one answer are one message."""
    if item.type == "function_call_output":
        if item.call_id is None:
            raise RefusedError(400, "input: a function_call_output lacks its call_id", "input")
        output = _content(item.output)
        messages.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
        return
    thoughts = _thoughts(item)
    if item.type == "reasoning" and not thoughts:
        return
    role = item.role if item.type == "message" else "assistant"
    if role is None:
        raise RefusedError(400, "input: a message lacks its role", "input")
    if role != "assistant":
        messages.append({"role": role, "content": _content(item.content)})
        return
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if last is not None and item.type != "function_call":
        is_over = last.get("content") or last.get("tool_calls")
        last = (
            None if is_over or (item.type == "reasoning" and "reasoning_content" in last) else last
        )
    if last is None:
        last = {"role": "assistant", "content": ""}
        messages.append(last)
    if item.type == "function_call":
        last.setdefault("tool_calls", []).append(_call(item))
    elif item.type == "reasoning":
        last["reasoning_content"] = thoughts
    else:
        last["content"] = _content(item.content)


def _call(item: InputItem) -> dict[str, Any]:
    """Return a call as a chat's message has it."""
    if not item.name:
        raise RefusedError(400, "input: a function_call lacks its name", "input")
    function = {"name": item.name, "arguments": item.arguments or "{}"}
    return {"id": item.call_id or item.id, "type": "function", "function": function}


def _thoughts(item: InputItem) -> str:
    """Return the text of an item of thoughts, or of its summary."""
    parts = item.content or item.summary or ""
    return parts if isinstance(parts, str) else "".join(part.text or "" for part in parts)


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
