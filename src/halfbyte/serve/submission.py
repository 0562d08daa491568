"""Owns the way of a request to the engine: its prompts, how its answers may look, and what it says in vain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool

from halfbyte.serve.chat_codec import ChatPrompt
from halfbyte.serve.conversation import chosen_name, conversation_of
from halfbyte.serve.ignored import account
from halfbyte.serve.jobs import Job
from halfbyte.serve.refusal import RefusedError
from halfbyte.serve.schema import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    NamedTool,
    TokenizeRequest,
)
from halfbyte.serve.service import EventQueue, PromptRequest, ServedModel, Service, check_vocabulary
from halfbyte.serve.text import AnswerStream, TextStream

COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens; a chat defaults to the rest of the context
ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True)
class PendingChat:
    """A chat whose answers are under way.

    Attributes:
        prompt: what is answered.
        submitted: the jobs and their events.
        ignored: keys of the request without effect.
    """

    prompt: ChatPrompt
    submitted: tuple[list[Job], EventQueue]
    ignored: list[str]


@dataclass(frozen=True)
class PendingCompletion:
    """Completions that are under way.

    Attributes:
        echoed: the text of the prompt of each answer, if it is wanted.
        submitted: the jobs and their events.
        ignored: keys of the request without effect.
    """

    echoed: list[str]
    submitted: tuple[list[Job], EventQueue]
    ignored: list[str]


async def submit_chat(
    service: Service, model: ServedModel, body: ChatRequest, ignored: Sequence[str] | None = None
) -> PendingChat:
    """Queue the answers to a chat.

    Args:
        service: the models and limits.
        model: that is to answer.
        body: the request.
        ignored: keys without effect, of a request in another format that ``body`` was made of.

    Raises:
        RefusedError: the request contradicts itself, or cannot be honoured.
        DataError: the chat template refuses the conversation.
    """
    named = account(body) if ignored is None else ignored
    _check_stream_options(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise RefusedError(400, "top_logprobs requires logprobs to be true", "top_logprobs")
    service.check_accepting()
    conversation = conversation_of(body, model.codec.renderer)
    service.check_length(conversation.num_chars, model, "messages")
    prompt = await run_in_threadpool(model.codec.encode_chat, conversation)
    matchers = await run_in_threadpool(_matchers, body, model, prompt)
    one = PromptRequest(prompt.ids, _answer_stream(body, model, prompt), matchers)
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    submitted = service.submit(body, model, [one], _max_tokens(body), top_logprobs)
    return PendingChat(prompt, submitted, [*named, *conversation.ignored])


async def submit_completion(
    service: Service, model: ServedModel, body: CompletionRequest
) -> PendingCompletion:
    """Queue the answers to a request for completions.

    Raises:
        RefusedError: the request contradicts itself, or cannot be honoured.
    """
    named = account(body)
    _check_stream_options(body)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RefusedError(
            400, "best_of: is not supported here; send n and choose by logprobs", "best_of"
        )
    if body.max_tokens == 0 and not body.echo:
        raise RefusedError(
            400, "max_tokens: 0 gives nothing without echo; send at least 1", "max_tokens"
        )
    service.check_accepting()
    prompts = await run_in_threadpool(_prompt_ids, body, model, service)
    stops = _stops(body)
    requests = [PromptRequest(ids, _text_stream(model, stops, ids)) for ids in prompts]
    max_tokens = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    submitted = service.submit(
        body, model, requests, max_tokens, body.logprobs, echo=bool(body.echo)
    )
    echoed: list[str] = []
    if body.echo:
        fields = body.prompt if isinstance(body.prompt, list) else [body.prompt]
        texts = [
            field if isinstance(field, str) else model.codec.decode_all(ids)
            for field, ids in zip(
                fields if len(fields) == len(prompts) else prompts, prompts, strict=True
            )
        ]
        echoed = [text for text in texts for _ in range(body.n or 1)]
    return PendingCompletion(echoed, submitted, named)


def tokens_of(
    service: Service, model: ServedModel, body: TokenizeRequest
) -> tuple[list[int], list[str]]:
    """Return the tokens of a text or a conversation, and the keys without effect.

    Raises:
        RefusedError: the request has neither or both, or cannot be honoured.
    """
    named = account(body)
    text = body.prompt if body.prompt is not None else body.content
    if (text is None) == (body.messages is None):
        raise RefusedError(400, "send either prompt (or content) or messages", "prompt")
    if text is not None:
        service.check_length(len(text), model, "prompt")
        special = (body.add_special_tokens, body.add_special)
        return model.codec.encode_text(text, add_special_tokens=False not in special), named
    conversation = conversation_of(body, model.codec.renderer)
    service.check_length(conversation.num_chars, model, "messages")
    return model.codec.encode_chat(conversation).ids, [*named, *conversation.ignored]


def _check_stream_options(body: GenerationRequest) -> None:
    if body.stream_options is not None and not body.stream:
        raise RefusedError(400, "stream_options requires stream to be true", "stream_options")


def _max_tokens(body: ChatRequest) -> int | None:
    """Return the smaller of the two names of one limit; -1 is none."""
    limits = [one for one in (body.max_tokens, body.max_completion_tokens) if one not in (None, -1)]
    return min((one for one in limits if one is not None), default=None)


def _stops(body: GenerationRequest) -> tuple[str, ...]:
    return (body.stop,) if body.stop and isinstance(body.stop, str) else tuple(body.stop or ())


def _text_stream(
    model: ServedModel, stops: tuple[str, ...], prompt: list[int]
) -> Callable[[], TextStream]:
    # A chat's answer is a new text, a completion continues its prompt.
    return lambda: TextStream(model.codec.decode, stops, prompt)


def _answer_stream(
    body: ChatRequest, model: ServedModel, prompt: ChatPrompt
) -> Callable[[], TextStream]:
    codec, stops, one_call = model.codec, _stops(body), body.parallel_tool_calls is False
    decode = codec.renderer.decode_markup
    return lambda: AnswerStream(decode, stops, codec.reader(prompt), one_call=one_call)


def _matchers(body: ChatRequest, model: ServedModel, prompt: ChatPrompt) -> list[Any]:
    """Return a grammar's state for each answer; none if the answers are free text."""
    grammars, num_answers = model.codec.grammars, body.n or 1
    form = body.response_format
    must_call = prompt.tools and (
        body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)
    )
    if must_call:
        parallel = body.parallel_tool_calls is not False
        name = chosen_name(body)
        matcher = grammars.of_calls(prompt.tools, name, parallel=parallel, closer=prompt.closer)
        return [matcher.deep_copy() for _ in range(num_answers)]
    if form is None or form.type == "text":
        return []
    if prompt.tools:
        raise RefusedError(
            400,
            "response_format: an answer that may call tools cannot follow a schema; send tool_choice none or required,"
            " or leave one of the two out",
            "response_format",
        )
    schema = form.json_schema.json_schema if form.json_schema else form.flat_schema
    if schema is None and form.type == "json_schema":
        raise RefusedError(400, "json_schema.schema is required", "response_format")
    matcher = grammars.of_schema(schema or ANY_OBJECT, closer=prompt.closer)
    return [matcher.deep_copy() for _ in range(num_answers)]


def _prompt_ids(body: CompletionRequest, model: ServedModel, service: Service) -> list[list[int]]:
    """Return the token ids of each prompt."""
    field = body.prompt
    prompts = field if isinstance(field, list) and not isinstance(field[0], int) else [field]
    ids_of_prompts: list[list[int]] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            service.check_length(len(prompt), model, "prompt")
            ids = model.codec.encode_text(prompt)
            if not ids:
                raise RefusedError(400, "the prompt must not be empty", "prompt")
        else:
            ids = [int(token) for token in prompt]
            check_vocabulary(model, ids, "prompt")
        ids_of_prompts.append(ids)
    return ids_of_prompts
