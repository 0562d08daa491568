"""Owns what the routes share: models by name, and the conversion of requests into jobs for an engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from halfbyte.serve.chat_codec import ChatCodec
from halfbyte.serve.engine import Engine
from halfbyte.serve.jobs import Event, Job
from halfbyte.serve.limits import Limits
from halfbyte.serve.metrics import Metrics
from halfbyte.serve.refusal import RefusedError
from halfbyte.serve.sampling import Sampler, Sampling
from halfbyte.serve.schema import ChatRequest, GenerationRequest
from halfbyte.serve.text import TextStream

MAX_CHARS_PER_TOKEN = 64  # texts that exceed the context even at this ratio are refused untokenised
TOO_LONG = "context_length_exceeded"
MAX_LOGPROBS = 200_000  # in the reply to one request
EventQueue = asyncio.Queue[tuple[int, Event]]  # with the number of the answer


@dataclass(frozen=True)
class ServedModel:
    """A model that is served.

    Attributes:
        name: the name that requests use.
        engine: the engine that computes it.
        codec: its tokens and chat template.
        adapter: name of its adapter in the engine, or None for the base.
        parent: name of the base that it adapts.
    """

    name: str
    engine: Engine
    codec: ChatCodec
    adapter: str | None = None
    parent: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True)
class PromptRequest:
    """A prompt, and how the text of each of its answers comes about.

    Attributes:
        ids: the prompt.
        stream: makes the text of an answer.
        matchers: the state of each answer's grammar; empty for free text.
    """

    ids: list[int]
    stream: Callable[[], TextStream]
    matchers: Sequence[Any] = ()


class Service:
    """The models, the limits, and whether new requests are accepted.

    Args:
        served: the models in the order in which they are listed.
        limits: the limits of every request.
    """

    def __init__(self, served: list[ServedModel], limits: Limits) -> None:
        self.served = {model.name: model for model in served}
        self.limits = limits
        self.engines = list({id(model.engine): model.engine for model in served}.values())
        self.metrics = Metrics(self.engines)
        self.draining = False

    @property
    def is_idle(self) -> bool:
        """Whether no answer is in progress or waiting."""
        # A job moves from waiting to running, so the two are checked in this order.
        return not any(engine.num_waiting or engine.num_running for engine in self.engines)

    def check_accepting(self) -> None:
        """Raise RefusedError if the server is stopping."""
        if self.draining:
            raise RefusedError(503, "the server is stopping")

    def get_model(self, name: str) -> ServedModel:
        """Return the model with this name, or raise RefusedError."""
        if name not in self.served:
            available = ", ".join(self.served)
            raise RefusedError(
                404,
                f"model {name[:200]!r} does not exist; available models: {available}",
                "model",
                "model_not_found",
            )
        return self.served[name]

    @property
    def first_model(self) -> ServedModel:
        """The first model in the list, where a request names none."""
        return next(iter(self.served.values()))

    def tokenizer_info(self) -> dict[str, Any]:
        """Return what lm-evaluation-harness asks of a server whose tokenizer it uses.

        Where models have different templates, none is given.
        """
        tokenizers = [model.codec.renderer.tokenizer for model in self.served.values()]
        first = tokenizers[0]
        templates = {tokenizer.chat_template for tokenizer in tokenizers}
        return {
            "tokenizer_class": type(first).__name__,
            "bos_token": first.bos_token,
            "eos_token": first.eos_token,
            "pad_token": first.pad_token,
            "chat_template": first.chat_template if len(templates) == 1 else None,
        }

    def max_context(self, model: ServedModel) -> int:
        """Return the largest number of tokens of a prompt and its answer."""
        return model.engine.backend.max_context

    def check_length(self, num_chars: int, model: ServedModel, param: str) -> None:
        """Refuse a text that cannot fit into the context, before it is tokenised."""
        if num_chars > MAX_CHARS_PER_TOKEN * self.max_context(model):
            raise RefusedError(
                400,
                f"{num_chars} characters cannot fit into the context of {self.max_context(model)} tokens",
                param,
                TOO_LONG,
            )

    def submit(
        self,
        body: GenerationRequest,
        model: ServedModel,
        requests: Sequence[PromptRequest],
        max_tokens: int | None,
        top_logprobs: int | None,
        *,
        echo: bool = False,
    ) -> tuple[list[Job], EventQueue]:
        """Queue the jobs of each prompt; the queue gets each job's events with the job's number.

        Args:
            body: the request.
            model: that answers it.
            requests: one for each prompt.
            max_tokens: of an answer; None and -1 for what the context has room for.
            top_logprobs: of the likeliest tokens to report in each place; None for no log-probabilities.
            echo: whether the prompts are scored too.

        Raises:
            RefusedError: there is no room in the context or the queue, or the server is stopping.
        """
        self.check_accepting()
        events: EventQueue = asyncio.Queue()
        deadline = time.monotonic() + self.limits.answer_seconds
        sampling = _sampling(body, top_logprobs)
        check_vocabulary(model, sampling.logit_bias, "logit_bias")
        jobs: list[Job] = []
        budgets = [
            self._token_budget(body, model, len(prompt.ids), max_tokens) for prompt in requests
        ]
        num_echoed = sum(len(prompt.ids) for prompt in requests) if echo else 0
        per_token = 0 if top_logprobs is None else top_logprobs + 1
        self._check_logprobs((sum(budgets) + num_echoed) * (body.n or 1) * per_token)
        observe_first_token = self.metrics.first_token_observer(model.name)
        stop_ids = _stop_ids(body, model)
        for prompt, budget in zip(requests, budgets, strict=True):
            for answer in range(body.n or 1):
                number = len(jobs)
                seed = None if sampling.seed is None else sampling.seed + number
                matcher = prompt.matchers[answer] if prompt.matchers else None
                job = Job(
                    prompt=prompt.ids,
                    adapter=model.adapter,
                    sampler=Sampler(replace(sampling, seed=seed), matcher, prompt.ids),
                    stream=prompt.stream(),
                    max_tokens=budget,
                    stop_ids=stop_ids,
                    emit=_emitter(events, number, observe_first_token),
                    deadline=deadline,
                    scores_prompt=top_logprobs if echo else None,
                )
                jobs.append(job)
        self._queue(model, jobs)
        return jobs, events

    def _check_logprobs(self, count: int) -> None:
        if count > MAX_LOGPROBS:
            raise RefusedError(
                400,
                f"the reply could contain {count} log-probabilities (tokens x answers x"
                f" log-probabilities per token), but at most {MAX_LOGPROBS} are allowed. Reduce max_tokens",
                "max_tokens",
            )

    def _queue(self, model: ServedModel, jobs: list[Job]) -> None:
        if model.engine.failure:
            raise RefusedError(503, f"the model failed: {model.engine.failure}")
        if not model.engine.submit(jobs):
            num_waiting = model.engine.num_waiting
            raise RefusedError(
                429,
                f"{num_waiting} requests are already waiting (the limit is {self.limits.max_waiting}); try"
                " again later",
            )

    def _token_budget(
        self,
        body: GenerationRequest,
        model: ServedModel,
        num_prompt_tokens: int,
        max_tokens: int | None,
    ) -> int:
        """Return how many tokens an answer may have."""
        room = self.max_context(model) - num_prompt_tokens
        if max_tokens == 0 and room == 0:
            return 0
        if room < 1:
            raise RefusedError(
                400,
                f"the prompt has {num_prompt_tokens} tokens, but the context of {self.max_context(model)}"
                " tokens must hold the prompt and an answer",
                "messages" if isinstance(body, ChatRequest) else "prompt",
                TOO_LONG,
            )
        if max_tokens is not None and max_tokens > room:
            raise RefusedError(
                400,
                f"max_tokens is {max_tokens}, but after the {num_prompt_tokens} tokens of the prompt there is"
                f" only room for {room}",
                "max_tokens",
            )
        return room if max_tokens is None or max_tokens < 0 else max_tokens


def _emitter(
    events: EventQueue, number: int, observe_first_token: Callable[[float], None]
) -> Callable[[Event], None]:
    loop = asyncio.get_running_loop()
    start, has_begun = time.monotonic(), False

    def emit(event: Event) -> None:
        nonlocal has_begun
        if event.tokens and not has_begun:
            has_begun = True
            observe_first_token(time.monotonic() - start)
        # Nobody waits on a loop that has closed.
        if not loop.is_closed():
            loop.call_soon_threadsafe(events.put_nowait, (number, event))

    return emit


def check_vocabulary(model: ServedModel, ids: Iterable[int], param: str) -> None:
    """Refuse tokens that the model does not have."""
    largest = max(ids, default=0)
    if largest >= model.codec.vocab_size:
        raise RefusedError(
            400,
            f"{param}: token {largest} is outside the vocabulary of {model.codec.vocab_size} tokens",
            param,
        )


def _stop_ids(body: GenerationRequest, model: ServedModel) -> frozenset[int]:
    own = frozenset() if body.ignore_eos else model.codec.stop_ids
    return own | frozenset(body.stop_token_ids or ())


def _sampling(body: GenerationRequest, top_logprobs: int | None) -> Sampling:
    penalty = body.repetition_penalty or body.repeat_penalty
    return Sampling(
        temperature=body.temperature or 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        seed=None if body.seed == -1 else body.seed,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        repetition_penalty=penalty or 1.0,
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
        top_logprobs=top_logprobs,
    )
