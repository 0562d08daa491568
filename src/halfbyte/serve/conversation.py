"""Owns the way of a chat request into the prompt: messages, tools and template options, as training renders them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from halfbyte.data.call_format import json_or_none
from halfbyte.data.conversation import Message, ToolCall
from halfbyte.data.fields import JSON, SURROGATES
from halfbyte.data.render import Renderer
from halfbyte.serve.refusal import RefusedError
from halfbyte.serve.schema import (
    Call,
    ChatMessage,
    ChatRequest,
    Content,
    NamedTool,
    TokenizeRequest,
    Tool,
)

ROLES = {"developer": "system", "function": "tool"}  # newer and older names
TEXT_PARTS = ("text", "input_text", "output_text")
THINKING_SWITCHES = ("enable_thinking", "thinking")  # names that templates give it
NOT_THINKING = ("none", "minimal")


@dataclass(frozen=True)
class Conversation:
    """What a prompt is rendered from.

    Attributes:
        messages: the turns.
        tools: JSON text of the tools that may be called; "" for none.
        options: further variables of the chat template.
        ignored: keys of the request without effect.
    """

    messages: tuple[Message, ...]
    tools: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    @property
    def num_chars(self) -> int:
        """Number of characters of all that is to be read."""
        return len(self.tools) + sum(len(message.text) for message in self.messages)


def conversation_of(body: ChatRequest | TokenizeRequest, renderer: Renderer) -> Conversation:
    """Return what the prompt of a request is rendered from.

    Raises:
        RefusedError: a part is no text, a tool is no function, or calls cannot be read.
    """
    ignored: list[str] = []
    calls: dict[str, str] = {}  # id of a call -> name of its tool
    messages = [_message(message, calls, ignored) for message in body.messages or []]
    tools = _tools(body.tools or [])
    if isinstance(body, ChatRequest):
        tools = _chosen(body, tools)
    has_calls = any(message.tool_calls for message in messages)
    if has_calls and renderer.answer_format.calls is None:
        raise RefusedError(
            400,
            "messages.tool_calls: this model's chat template writes no calls, so that it would not see them; write them"
            " into the content",
            "messages",
        )
    if tools and renderer.answer_format.calls is None:
        raise RefusedError(
            400,
            "tools: this model's chat template has no tools, or calls them in a way that cannot be read back; leave"
            " tools out (tool_choice none does, too) and describe them in the system message",
            "tools",
        )
    for name in (tool["function"]["name"] for tool in tools):
        if renderer.special_tokens.pattern.search(name):
            raise RefusedError(
                400, f"tools: {name[:100]!r} holds a special token; rename it", "tools"
            )
    text = _json_text(tools, "tools") if tools else ""
    options = _options(body, renderer, ignored)
    return Conversation(tuple(messages), text, options, tuple(ignored))


def _message(message: ChatMessage, calls: dict[str, str], ignored: list[str]) -> Message:
    role = ROLES.get(message.role, message.role)
    made: tuple[ToolCall, ...] = ()
    reasoning = None
    content = _text_of(message.content)
    if role == "assistant":
        older = [Call(function=message.function_call)] if message.function_call else []
        made = tuple(_call(call) for call in message.tool_calls or older)
        calls.update({call.id: call.name for call in made if call.id})
        reasoning = message.reasoning_content or message.reasoning or None
        content = content or message.refusal or ""
    else:
        for key in ("tool_calls", "function_call", "reasoning_content", "reasoning", "refusal"):
            if getattr(message, key):
                ignored.append(f"messages.{key}")
    name = message.name if role == "tool" else None
    if message.name and name is None:
        ignored.append("messages.name")
    if role == "tool" and name is None and message.tool_call_id:
        name = calls.get(message.tool_call_id)
    return Message(
        role,
        content,
        reasoning,
        made,
        message.tool_call_id if role == "tool" else None,
        name,
    )


def _text_of(content: Content | None) -> str:
    """Return the text of a message's content.

    Raises:
        RefusedError: a part is no text.
    """
    if not isinstance(content, list):
        return content or ""
    for part in content:
        if part.type not in (*TEXT_PARTS, "refusal"):
            raise RefusedError(
                400,
                f"messages.content: a part of the type {part.type!r}: only text is read here; send parts of the type"
                " text alone",
                "messages",
            )
        if part.text is None and part.refusal is None:
            raise RefusedError(
                400, f"messages.content: a part of the type {part.type} lacks text", "messages"
            )
    return "".join(part.text or part.refusal or "" for part in content)


def _call(call: Call) -> ToolCall:
    arguments = call.function.arguments
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    elif isinstance(arguments, str):
        arguments = json_or_none(arguments)
    if not isinstance(arguments, dict):
        raise RefusedError(
            400,
            f"messages.tool_calls: the arguments of {call.function.name} are not the JSON text of an object",
            "messages",
        )
    return ToolCall(call.function.name, _json_text(arguments, "messages"), call.id)


def _json_text(value: Any, field: str) -> str:
    """Return a value as JSON; refuse what is none, or no text."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        raise RefusedError(
            400, f"{field}: holds NaN, infinity or too deep a nesting", field
        ) from None
    if SURROGATES.search(text):
        raise RefusedError(400, f"{field}: contains half a character (a lone surrogate)", field)
    return text


def _tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Return tools as chat templates take them."""
    written = []
    for tool in tools:
        if tool.type != "function" or tool.function is None:
            raise RefusedError(
                400,
                f"tools: a tool of the type {tool.type!r}: only functions are called here; send {{type: function,"
                " function: {name, description, parameters}}",
                "tools",
            )
        function: dict[str, Any] = {"name": tool.function.name}
        if tool.function.description is not None:
            function["description"] = tool.function.description
        parameters = tool.function.parameters or {"properties": {}}
        if parameters.get("type", "object") != "object":
            raise RefusedError(
                400,
                f"tools: the parameters of {tool.function.name} must be of the type object",
                "tools",
            )
        function["parameters"] = {"type": "object", **parameters}
        written.append({"type": "function", "function": function})
    return written


def _chosen(body: ChatRequest, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the tools to render: none if none may be called; refuse a choice that cannot be made."""
    choice = body.tool_choice
    if choice == "none":
        return []
    names = [tool["function"]["name"] for tool in tools]
    if choice == "required" and not tools:
        raise RefusedError(400, "tool_choice: required needs tools", "tool_choice")
    if isinstance(choice, NamedTool) and chosen_name(body) not in names:
        raise RefusedError(
            400,
            f"tool_choice: names {chosen_name(body) or 'no function'}; it must be one of tools: {', '.join(names)[:200]}",
            "tool_choice",
        )
    return tools


def chosen_name(body: ChatRequest) -> str | None:
    """Return the name of the function that must be called, if one is named."""
    choice = body.tool_choice
    return choice.function.name if isinstance(choice, NamedTool) and choice.function else None


def _options(
    body: ChatRequest | TokenizeRequest, renderer: Renderer, ignored: list[str]
) -> dict[str, Any]:
    """Return the variables for the chat template; those that it does not read are ignored."""
    options = {}
    for key, value in (body.chat_template_kwargs or {}).items():
        if renderer.reads(key):
            options[key] = JSON.decode(_json_text(value, "chat_template_kwargs"))
        else:
            ignored.append(f"chat_template_kwargs.{key}")
    if not isinstance(body, ChatRequest):
        return options
    effort = body.reasoning_effort or (body.reasoning.effort if body.reasoning else None)
    if effort is None and body.enable_thinking is not None:
        effort = "medium" if body.enable_thinking else "none"
    if effort is None:
        return options
    switches = [name for name in THINKING_SWITCHES if renderer.reads(name)]
    if renderer.reads("reasoning_effort"):
        options.setdefault("reasoning_effort", effort)
    for name in switches:
        options.setdefault(name, effort not in NOT_THINKING)
    if not switches and "reasoning_effort" not in options:
        ignored.append("reasoning_effort")
    return options
