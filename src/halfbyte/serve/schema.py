"""Owns what may be asked: OpenAI's request bodies, with every number bounded and no wish ignored in silence."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from halfbyte.data.rows import SURROGATES

MAX_MESSAGES = 256
MAX_FIELDS = 64
MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_TOP_LOGPROBS = 20
MAX_N = 8
MAX_PROMPTS = 16
MAX_TOKENS = 1 << 17


def _whole(text: str) -> str:
    if SURROGATES.search(text):
        raise ValueError("holds half a character (a lone surrogate)")
    return text


Text = Annotated[str, AfterValidator(_whole)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None
# The first fault of a list is enough: a body can hold hundreds of thousands of them.
Ids = Annotated[
    list[Annotated[int, Field(ge=0, lt=1 << 31)]],
    Field(min_length=1, max_length=MAX_TOKENS, fail_fast=True),
]


def _few(given: Any) -> Any:
    """Each unknown field would be an error of its own."""
    if isinstance(given, dict) and len(given) > MAX_FIELDS:
        raise ValueError(f"has {len(given)} fields; at most {MAX_FIELDS} are read")
    return given


def _empty(given: Any) -> Any:
    if given:
        raise ValueError("is not supported here; leave it out or empty")
    return given


# What clients send though they do not use it. It may be there as long as it says nothing.
NoList = Annotated[list[Any], AfterValidator(_empty), Field(json_schema_extra={"maxItems": 0})]
NoDict = Annotated[
    dict[str, Any], AfterValidator(_empty), Field(json_schema_extra={"maxProperties": 0})
]
Label = Annotated[str, Field(max_length=256)]


class Strict(BaseModel):
    """Numbers are no strings, NaN is no number, and unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _bounded(cls, given: Any) -> Any:
        return _few(given)


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="developer is another word for system."
    )
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=64, fail_fast=True)]
    name: Annotated[str, Field(max_length=64)] | None = Field(
        None, description="Accepted; templates have no place for it."
    )
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: NoList | None = None
    annotations: NoList | None = None


class SchemaFormat(Strict):
    """A JSON schema by name."""

    name: Annotated[str, Field(max_length=64)]
    description: Annotated[str, Field(max_length=1000)] | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """``text``, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None


class StreamOptions(Strict):
    """Whether a stream ends with the usage."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="Accepted; nothing is padded.")


class Generation(Strict):
    """What chat and completion have in common."""

    model: Name
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="0, the default here, is greedy: what evaluation measured."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    seed: int | None = None
    stop: Stops = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: NoDict | None = None
    user: Label | None = Field(None, description="Accepted, neither used nor logged.")


class ChatRequest(Generation):
    """Body of /v1/chat/completions."""

    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: NoList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: NoList | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = Field(None, max_length=1)
    reasoning_effort: Literal["none"] | None = None
    store: Literal[False] | None = None
    metadata: Annotated[dict[str, Label], BeforeValidator(_few), Field(max_length=16)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None


class CompletionRequest(Generation):
    """Body of /v1/completions; ids go in as they are."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class ErrorBody(BaseModel):
    """What is wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """An error."""

    error: ErrorBody


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class ModelCard(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    parent: str | None = None


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: dict[str, Any]
    logprobs: dict[str, Any] | None
    finish_reason: str


class ChatReply(BaseModel):
    """Answers of a chat."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str


class TextReply(BaseModel):
    """Continuations of prompts."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
