"""Owns the requests of OpenAI's Responses, and how each is one for a chat."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from halfbyte.serve.fields import Body, Label, MaxTokens, Name, Options, Text
from halfbyte.serve.refusal import RefusedError
from halfbyte.serve.schema import (
    MAX_MESSAGES,
    MAX_TOOLS,
    MAX_TOP_LOGPROBS,
    ChatRequest,
    Content,
    Effort,
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
