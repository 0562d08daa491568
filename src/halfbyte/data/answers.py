"""Owns where answers lie in the text of a template: each in the context that generation would see."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from halfbyte.data.chat_format import ChatFormat
from halfbyte.data.conversation import Message
from halfbyte.data.fields import RowError
from halfbyte.data.thoughts import MARKS

MARK = re.compile(r"<[^<>\s]+>|\[/?THINK\]")
THINK_OPENER = re.compile(f"({'|'.join(map(re.escape, MARKS))})\\s*$")  # at the end of a prompt


@dataclass(frozen=True)
class Span:
    """An assistant's answer in a text, half-open in characters, with its stop token.

    Attributes:
        start: where its generation prompt ends.
        end: behind its stop token.
        learnt: whether this text is the one in which it is learnt.
    """

    start: int
    end: int
    learnt: bool


@dataclass(frozen=True)
class Sample:
    """A text with answers to learn.

    Attributes:
        text: what the template writes, up to the end of the last answer to learn.
        spans: every answer in it.
    """

    text: str
    spans: list[Span]


def samples_of(
    form: ChatFormat, messages: tuple[Message, ...], learnt: Sequence[int], place: str, tools: str
) -> list[Sample]:
    """Render a conversation so that each answer is learnt in the context that generation would see.

    Many templates leave the thoughts of earlier answers out, so that no one text has all answers as they
    are generated. Then a conversation becomes several texts; in each, the earlier answers are context.

    Args:
        form: the template.
        messages: the conversation, escaped.
        learnt: the numbers of the answers to learn, in order.
        place: where the row comes from.
        tools: JSON text of its tools, escaped.

    Returns:
        one text or more, that with the last answer first.

    Raises:
        RowError: an answer does not begin with its generation prompt, or has no stop token.
    """
    prompts = _prompts(form, messages, place, tools)
    texts: list[tuple[str, dict[int, tuple[int, int]]]] = []
    for number in reversed(learnt):
        rendered = form.template.render(messages[: number + 1], place, tools)
        text, start, end = _answer(form, rendered, prompts[number], messages[number], place, number)
        if texts and texts[-1][0].startswith(text[:end]):
            texts[-1][1][number] = (start, end)
        else:
            texts.append((text[:end], {number: (start, end)}))
    return [Sample(text, _spans(form, text, prompts, learnt)) for text, learnt in texts]


def context_spans(
    form: ChatFormat, text: str, messages: tuple[Message, ...], place: str, tools: str
) -> list[Span]:
    """Return the earlier answers in the text of a generation prompt, where ``samples_of`` has them too."""
    return _spans(form, text, _prompts(form, messages, place, tools), {})


def _prompts(
    form: ChatFormat, messages: tuple[Message, ...], place: str, tools: str
) -> dict[int, str]:
    """Return the generation prompt of each answer, by its number."""
    return {
        number: form.template.prompt(messages[:number], place, tools)
        for number, message in enumerate(messages)
        if message.role == "assistant"
    }


def _spans(
    form: ChatFormat,
    text: str,
    prompts: dict[int, str],
    learnt: dict[int, tuple[int, int]],
) -> list[Span]:
    """Return the answers of a text: those to learn, and those that follow their generation prompt."""
    numbers = list(prompts)
    spans = []
    for number, following in zip_longest(numbers, numbers[1:]):
        if number in learnt:
            spans.append(Span(*learnt[number], learnt=True))
            continue
        start = len(prompts[number])
        limit = len(text) if following is None else len(prompts[following])
        if text.startswith(prompts[number]) and start < len(text):
            # Within another answer, a stop token may be left out.
            end = form.end_of_answer(text, start)
            if end is not None and end <= limit:
                spans.append(Span(start, end, learnt=False))
    return spans


def _answer(
    form: ChatFormat, text: str, prompt: str, message: Message, place: str, number: int
) -> tuple[str, int, int]:
    """Return a text that ends with an answer, and where the answer starts and ends.

    Raises:
        RowError: the answer does not follow its generation prompt, or has no stop token.
    """
    if not text.startswith(prompt):
        continued = _after_block(form, text, prompt, message) or _think_after(text, prompt, message)
        if continued is None:
            raise RowError(
                place,
                "an answer that does not follow its generation prompt",
                "the chat template renders the conversation differently from the prompt for its answer"
                f" {number}: {text[: len(prompt)][-40:]!r} against {prompt[-40:]!r}. Training and"
                " generation would see different text",
            )
        text = continued
    text = form.with_stop(text, message)
    end = form.end_of_answer(text, len(prompt))
    if end is None:
        raise RowError(
            place,
            "an answer without a stop token",
            f"the chat template writes no {form.stops[0]} after answer {number}",
        )
    if not form.is_over(text, end):
        raise RowError(
            place,
            "an answer that goes on behind its stop token",
            f"the chat template writes {text[len(prompt) : end][-20:]!r} within answer {number}, and generation"
            f" would stop there, before {text[end:][:40]!r}; set data.chat_template to one that ends an answer"
            " once",
        )
    return text, len(prompt), end


def _after_block(form: ChatFormat, text: str, prompt: str, message: Message) -> str | None:
    """Return the text of an answer whose prompt ends with an empty block of thoughts that the answer lacks.

    Gemma 4's prompt ends with ``<|channel>thought<channel|>`` where it is not to think, and its template writes
    no such block into the answer. What the model generates behind the block is the rest of the answer.

    Returns:
        the prompt and what follows it, or None if this is not what the template does.
    """
    shorter = min(len(text), len(prompt))
    same = next((n for n in range(shorter) if text[n] != prompt[n]), shorter)
    for match in form.special_tokens.pattern.finditer(prompt):
        if match.start() < same < match.end():
            same = match.start()  # both begin with a part of this token
    block, body = prompt[same:], text[same:]
    marks = MARK.findall(block)
    if message.reasoning or len(marks) != 2 or not block.rstrip().endswith(marks[1]):
        return None
    if body.startswith(marks[0]):
        return None  # the answer has thoughts
    if body.startswith(marks[1]):  # DeepSeek-V3.2 repeats the end of the block
        body = body[len(marks[1]) :]
    return prompt + body


def _think_after(text: str, prompt: str, message: Message) -> str | None:
    """Return the text of an answer whose prompt opens thoughts that the template leaves out of the answer.

    DeepSeek-R1's prompt ends with ``<think>``, and its template writes of an answer only what follows
    ``</think>``. What the model generates, and so has to learn, are the thoughts, their end, and the rest.

    Returns:
        the prompt and what follows it, or None if this is not what the template does.
    """
    opener = THINK_OPENER.search(prompt)
    if opener is None or not text.startswith(prompt[: opener.start()]):
        return None
    mark, close = opener.group(1), MARKS[opener.group(1)]
    body = text[opener.start() :]
    if body.lstrip().startswith(close):
        # GLM-4.7 writes no more than the end of what the prompt opens.
        return None if mark in message.content else prompt + body
    if body.startswith(mark):  # an empty block, with other space in it than the prompt leaves
        return prompt + body[len(mark) :].lstrip()
    found = re.match(
        rf"\s*(?:{re.escape(mark)})?(.*?)\s*{re.escape(close)}", message.content, re.DOTALL
    )
    thoughts = (message.reasoning or (found.group(1) if found else "")).strip()
    return f"{prompt}{thoughts}\n{close}\n\n{body.lstrip()}"
