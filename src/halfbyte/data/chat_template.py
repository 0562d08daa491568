"""Owns the text that a chat template writes: of conversations, of prompts, and where its answers lie."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.config.paths import TEMPLATE_NAMES
from halfbyte.data.rows import Message
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_template(name: str) -> str:
    """Return the Jinja text of a named template or of a file.

    Raises:
        DataError: the file cannot be read.
    """
    if name in TEMPLATE_NAMES:
        return (
            resources.files("halfbyte.data").joinpath(f"templates/{name}.jinja").read_text("utf-8")
        )
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"data.chat_template: {name} cannot be read: {error.strerror}") from None


def require_template(tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """Check that a conversation can be rendered at all.

    Raises:
        DataError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"{place}: a conversation, but the model has no chat template. Set"
            f" data.chat_template to {', '.join(TEMPLATE_NAMES)} or a .jinja file"
        )


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: tuple[Message, ...],
    place: str,
    *,
    generation_prompt: bool = False,
) -> str:
    """Return the text of a conversation, with ``generation_prompt`` up to where the next answer begins.

    Raises:
        DataError: the template rejects the conversation.
    """
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text: Any = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=generation_prompt
        )
    except Exception as error:  # Jinja's errors and the template's raise_exception
        raise DataError(f"{place}: the chat template rejects it: {error}") from error
    return str(text)


def render_prompts(
    tokenizer: PreTrainedTokenizerBase, messages: tuple[Message, ...], place: str
) -> Iterator[str]:
    """Yield the generation prompt of each answer of a conversation."""
    for number, message in enumerate(messages):
        if message.role == "assistant":
            yield render(tokenizer, messages[:number], place, generation_prompt=True)


def render_all(
    tokenizer: PreTrainedTokenizerBase, messages: tuple[Message, ...], place: str
) -> Iterator[str]:
    """Yield the text of a conversation, then the generation prompt of each of its answers."""
    yield render(tokenizer, messages, place)
    yield from render_prompts(tokenizer, messages, place)


def answer_spans(
    messages: tuple[Message, ...], text: str, prompts: Iterator[str], stop_token: str, place: str
) -> list[tuple[int, int]]:
    """Return half-open character spans of the answers in ``text``, each with its stop token.

    Raises:
        DataError: an answer does not follow its generation prompt, or has no stop token.
    """
    spans = []
    numbers = (n for n, message in enumerate(messages) if message.role == "assistant")
    for number, prompt in zip(numbers, prompts, strict=True):
        if not text.startswith(prompt):
            raise DataError(
                f"{place}: the chat template renders the conversation differently from the prompt"
                f" for its answer {number}: {text[: len(prompt)][-60:]!r} against {prompt[-60:]!r}."
                " Training and generation would see different text"
            )
        stop = text.find(stop_token, len(prompt))
        if stop < 0:
            raise DataError(
                f"{place}: the chat template writes no {stop_token} after answer {number}"
            )
        spans.append((len(prompt), stop + len(stop_token)))
    return spans


def stop_token_after(text: str, answer: str, special_tokens: re.Pattern[str]) -> str:
    """Return the special token that ends an answer in ``text``.

    Raises:
        DataError: none does.
    """
    after = text[text.index(answer) + len(answer) :]
    stop = special_tokens.match(after.lstrip())
    if stop is None:
        raise DataError(
            f"chat template: an assistant turn ends with {after!r}, which holds no special token"
            " of this tokenizer, so the model could not learn to stop. Name another"
            f" data.chat_template ({', '.join(TEMPLATE_NAMES)}) or add {{{{ eos_token }}}}"
        )
    return stop.group()
