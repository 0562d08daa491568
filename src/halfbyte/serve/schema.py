"""Owns the schema of OpenAI-style requests: the fields that are understood, and their bounds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from halfbyte.serve.fields import (
    Biases,
    Body,
    Label,
    MaxTokens,
    Name,
    Options,
    Stops,
    Text,
    TokenId,
    TokenIds,
)

MAX_MESSAGES = 1024
MAX_PARTS = 64
MAX_TOP_LOGPROBS = 20
MAX_N = 8
MAX_PROMPTS = 128
MAX_TOOLS = 128

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class MessagePart(Body):
    """A part of a message; one that is no text is refused by name."""

    type: Annotated[str, Field(max_length=64)] = "text"
    text: Text | None = None
    refusal: Text | None = None


class CalledFunction(Body):
    """The function of a tool call."""

    name: Annotated[Text, Field(min_length=1, max_length=256)]
    arguments: Text | dict[str, Any] | None = None


class Call(Body):
    """A tool call of an earlier answer."""

    id: Label | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


Content = Text | Annotated[list[MessagePart], Field(max_length=MAX_PARTS, fail_fast=True)]
Calls = Annotated[list[Call], Field(max_length=MAX_TOOLS, fail_fast=True)]


class ChatMessage(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"] = Field(
        description="developer is a synonym for system, function for tool."
    )
    content: Content | None = None
    name: Annotated[Text, Field(max_length=256)] | None = Field(
        None, description="Of a tool; ignored elsewhere."
    )
    tool_calls: Calls | None = None
    tool_call_id: Label | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    function_call: CalledFunction | None = Field(None, description="An older form of tool_calls.")
    refusal: Text | None = None


class Function(Body):
    """What a function does, and a JSON schema of its arguments."""

    name: Annotated[Text, Field(min_length=1, max_length=256, pattern=r"^[^\s]+$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool that may be called; only functions are."""

    type: Annotated[str, Field(max_length=64)] = "function"
    function: Function | None = None


class NamedFunction(Body):
    """The name of a function."""

    name: Annotated[str, Field(max_length=256)]


class NamedTool(Body):
    """The tool that must be called."""

    type: Annotated[str, Field(max_length=64)] = "function"
    function: NamedFunction | None = None


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool


class SchemaFormat(Body):
    """A named JSON schema."""

    name: Annotated[str, Field(max_length=64)] | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    # LM Studio's documentation writes it as text.
    strict: bool | Literal["true", "false"] | None = None


class ResponseFormat(Body):
    """Plain text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None
    # As llama.cpp and Together take it.
    flat_schema: dict[str, Any] | None = Field(None, alias="schema")


class Reasoning(Body):
    """How much is to be thought."""

    effort: Effort | None = None


class StreamOptions(Body):
    """Options of a stream, such as whether it ends with the usage."""

    include_usage: bool | None = None


class SampledRequest(Body):
    """The fields that all requests for answers have in common."""

    model: Name
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="0, the default here, is greedy, as in the evaluation."
    )
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = Field(
        None, description="0 and -1: all tokens."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: int | None = Field(None, description="-1 is none, as llama.cpp has it.")
    stop: Stops | Literal[""] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=10)] | None = Field(
        None, description="As repetition_penalty."
    )
    logit_bias: Biases | None = None
    user: Any = Field(None, description="Taken and not used; never logged.")


class GenerationRequest(SampledRequest):
    """The fields that chat and completion requests have in common."""

    max_tokens: MaxTokens | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None


class ChatRequest(GenerationRequest):
    """The body of /v1/chat/completions."""

    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    reasoning: Reasoning | None = Field(None, description="As reasoning_effort.")
    enable_thinking: bool | None = Field(None, description="As in chat_template_kwargs.")
    chat_template_kwargs: Options | None = None


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions; token ids are used as they are."""

    # With ``echo``, 0 asks for the log-probabilities of the prompt alone.
    max_tokens: MaxTokens | Literal[0] | None = None
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None


class TokenizeRequest(Body):
    """The body of /tokenize: a text, or a conversation as for a chat."""

    model: Name | None = None
    prompt: Text | None = None
    content: Text | None = Field(None, description="As prompt.")
    messages: (
        Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
        | None
    ) = None
    tools: Tools | None = None
    chat_template_kwargs: Options | None = None
    add_special_tokens: bool | None = Field(None, description="Of a text; true by default.")
    add_special: bool | None = Field(None, description="As add_special_tokens.")
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """The body of /detokenize."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1 << 17, fail_fast=True)]
