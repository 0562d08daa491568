"""Owns questions with choices: each choice gets a letter, and the letter of the right one is learnt."""

from __future__ import annotations

from string import ascii_uppercase
from typing import Any

from halfbyte.data.conversation import Message
from halfbyte.data.fields import RowError, has_value, json_value, quoted, valid_text


def question_with_choices(place: str, values: dict[str, Any]) -> tuple[Message, Message]:
    """Return a question with its choices, each with its letter, and the letter of the right one.

    Raises:
        RowError: there are no choices, or the answer is none of them.
    """
    question = valid_text(place, "question", values["question"])
    choices = json_value(place, "choices", values["choices"])
    labels: Any = None
    if isinstance(choices, dict):  # as ARC and CommonsenseQA write them
        labels, choices = choices.get("label"), choices.get("text")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(ascii_uppercase):
        detail = f"choices is {quoted(values['choices'])}; a list of 2 to 26 texts is expected"
        raise RowError(place, "choices are no list", detail)
    texts = [
        valid_text(place, f"choices[{number}]", _as_text(choice))
        for number, choice in enumerate(choices)
    ]
    letters = ascii_uppercase[: len(texts)]
    number = _number_of_choice(place, values["answer"], texts, labels, letters)
    lines = [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)]
    question = "\n".join([question, *lines])
    return Message("user", question), Message("assistant", letters[number])


def _number_of_choice(place: str, answer: Any, texts: list[str], labels: Any, letters: str) -> int:
    """Return the number of the right choice, from 0, which may be given as number, label, letter or text.

    Raises:
        RowError: the answer is none of the choices.
    """
    written = str(_as_text(answer)).strip()
    named = [str(label) for label in labels] if isinstance(labels, list) else []
    numbers = [
        names.index(written)
        for names in (named, list(letters), [str(n) for n in range(len(texts))], texts)
        if names.count(written) == 1 and len(names) == len(texts)
    ]
    if isinstance(answer, str) and not named and len(set(numbers)) > 1:
        detail = f"answer is {quoted(answer)}, the name of one choice and the text of another; give its letter"
        raise RowError(place, "an answer that names two choices", detail)
    if numbers:
        return numbers[0]
    detail = f"answer is {quoted(answer)}; one of {letters[0]} to {letters[-1]}, 0 to {len(texts) - 1}, or"
    raise RowError(place, "answer is no choice", f"{detail} the text of a choice is expected")


def _as_text(value: Any) -> Any:
    """Return a number as its digits, as a CSV file would hold it; any other value as it is."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number and has_value(value) else value
