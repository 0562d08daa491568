"""Owns the schema of OpenAI-style requests and replies: bounded numbers, and no field silently ignored."""

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

from halfbyte.data.fields import SURROGATES

MAX_MESSAGES = 256
MAX_FIELDS = 64
MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_TOP_LOGPROBS = 20
MAX_N = 8
MAX_PROMPTS = 16
MAX_TOKENS = 1 << 17


def _refuse_surrogates(text: str) -> str:
    if SURROGATES.search(text):
        raise ValueError("contains half a character (a lone surrogate)")
    return text


Text = Annotated[str, AfterValidator(_refuse_surrogates)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None
# The first error in a list is enough: a body can contain hundreds of thousands of them.
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, lt=1 << 31)]],
    Field(min_length=1, max_length=MAX_TOKENS, fail_fast=True),
]


def _limit_fields(value: Any) -> Any:
    """Refuse too many fields at once, as each unknown one would be a separate error."""
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        raise ValueError(f"has {len(value)} fields; at most {MAX_FIELDS} are accepted")
    return value


def _require_empty(value: Any) -> Any:
    if value:
        raise ValueError("is not supported here; omit it or leave it empty")
    return value


# Clients send these fields even when they do not use them. They are accepted if empty.
EmptyList = Annotated[
    list[Any], AfterValidator(_require_empty), Field(json_schema_extra={"maxItems": 0})
]
EmptyDict = Annotated[
    dict[str, Any], AfterValidator(_require_empty), Field(json_schema_extra={"maxProperties": 0})
]
Label = Annotated[str, Field(max_length=256)]


class StrictModel(BaseModel):
    """A request body without type coercion, NaN or unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _limit_model_fields(cls, value: Any) -> Any:
        return _limit_fields(value)


class TextPart(StrictModel):
    """A text part of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(StrictModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="developer is a synonym for system."
    )
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=64, fail_fast=True)]
    name: Annotated[str, Field(max_length=64)] | None = Field(
        None, description="Accepted and ignored; chat templates do not use it."
    )
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: EmptyList | None = None
    annotations: EmptyList | None = None


class SchemaFormat(StrictModel):
    """A named JSON schema."""

    name: Annotated[str, Field(max_length=64)]
    description: Annotated[str, Field(max_length=1000)] | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """Plain text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None


class StreamOptions(StrictModel):
    """Options of a stream, such as whether it ends with the usage."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(
        None, description="Accepted and ignored; nothing is padded."
    )


class GenerationRequest(StrictModel):
    """The fields that chat and completion requests have in common."""

    model: Name
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="0, the default here, is greedy, as in the evaluation."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    seed: int | None = None
    stop: Stops = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: EmptyDict | None = None
    user: Label | None = Field(None, description="Accepted and ignored; never logged.")


class ChatRequest(GenerationRequest):
    """The body of /v1/chat/completions."""

    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: EmptyList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: EmptyList | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = Field(None, max_length=1)
    reasoning_effort: Literal["none"] | None = None
    store: Literal[False] | None = None
    metadata: (
        Annotated[dict[str, Label], BeforeValidator(_limit_fields), Field(max_length=16)] | None
    ) = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions; token ids are used as they are."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class ErrorBody(BaseModel):
    """The details of an error, in OpenAI's format."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """An error reply."""

    error: ErrorBody


class Usage(BaseModel):
    """The number of tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    parent: str | None = None


class ModelList(BaseModel):
    """All models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ChatChoice(BaseModel):
    """One answer of a chat."""

    index: int
    message: dict[str, Any]
    logprobs: dict[str, Any] | None
    finish_reason: str


class ChatReply(BaseModel):
    """All answers of a chat."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(BaseModel):
    """One continuation of a prompt."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str


class TextReply(BaseModel):
    """The continuations of all prompts."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
