"""Opponents without a model: what training answers alone give, scored as models are."""

from __future__ import annotations

import random

import pytest
from toys import OPENS_THOUGHTS, chatml_tokenizer

from halfbyte.config import model_run
from halfbyte.data.chat_template import load_template
from halfbyte.data.conversation import Message, Row
from halfbyte.data.render import Renderer
from halfbyte.eval.likeness import Examples, Likeness, is_closed_set
from halfbyte.eval.opponents import opponents


def row(prompt: str, answer: str, reasoning: str | None = None) -> Row:
    messages = (Message("user", prompt), Message("assistant", answer, reasoning=reasoning))
    return Row(prompt, messages)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(chatml_tokenizer(), load_template("hermes"))


def scores(train: list[Row], held: list[Row], renderer: Renderer, *keys: str) -> dict[str, float]:
    run = model_run("org/tiny", list(keys))
    metric = run.eval.metrics[0]
    likeness = Likeness(Examples.of(train, renderer), Examples.of(held, renderer))
    found, _ = opponents(likeness, renderer, run)
    return {one.name: sum(one.scores[metric]) / len(held) for one in found}


COLOURS = {"sky sea": "blue", "leaf grass": "green", "blood rose": "red"}


def labelled(count: int, seed: int) -> list[Row]:
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        words, colour = draw.choice(list(COLOURS.items()))
        rows.append(row(f"{draw.choice(words.split())}, please, {number % 3}", colour))
    return rows


def test_a_closed_set_is_chosen_from_by_words(renderer: Renderer) -> None:
    found = scores(labelled(90, 0), labelled(30, 1), renderer)
    assert list(found) == ["majority", "nearest", "linear"]
    assert found["nearest"] == found["linear"] == 1.0
    assert 0.2 < found["majority"] < 0.6
    assert found == scores(labelled(90, 0), labelled(30, 1), renderer)


def test_thoughts_are_no_part_of_the_answers(renderer: Renderer) -> None:
    train = [
        row(f"{a} {n}", b, reasoning=f"It is {n}.") for n in range(20) for a, b in COLOURS.items()
    ]
    assert scores(train, [row("sky sea", "blue", reasoning="Well.")], renderer)["linear"] == 1.0


def test_spans_of_the_prompt_are_copied(renderer: Renderer) -> None:
    names = [
        f"{first}{last}" for first in ("Ana", "Bo", "Cy", "Di") for last in ("ra", "le", "mi", "to")
    ]
    rows = [row(f"On day {n} my name is {name}, I said.", name) for n, name in enumerate(names * 3)]
    held = [row("On day 7 my name is Zoltan, I said.", "Zoltan"), row("My name is Eve, Bo!", "Eve")]
    found = scores(rows, held, renderer)
    assert found["copy"] == 1.0 > found["nearest"]


def test_answers_close_the_thoughts_that_the_prompt_opens() -> None:
    renderer = Renderer(chatml_tokenizer(), OPENS_THOUGHTS)
    names = ("Anara", "Bole", "Cymi", "Dito", "Eva", "Fred", "Gus", "Hal")
    rows = [row(f"On day {n} my name is {name}, I said.", name) for n, name in enumerate(names)]
    held = [row("On day 7 my name is Zoltan, I said.", "Zoltan")]
    assert scores(rows, held, renderer)["copy"] == 1.0
    found = scores(labelled(90, 0), labelled(30, 1), renderer)
    assert found["nearest"] == found["linear"] == 1.0


@pytest.mark.parametrize(
    "prompts",
    [["", " ", "\n"], ["🙂", "?", "。"], ["x" * 10_000] * 3, ["a"]],
    ids=["blank", "signs", "long", "one"],
)
def test_odd_prompts_are_answered(renderer: Renderer, prompts: list[str]) -> None:
    train = [row(prompt, f"answer {n}") for n, prompt in enumerate(prompts)]
    found = scores(train, [row("", "answer 0"), row("what?", "b")], renderer)
    assert list(found) == ["majority", "nearest"]


def test_opponents_can_be_left_out(renderer: Renderer) -> None:
    found = scores(labelled(30, 0), labelled(9, 1), renderer, "eval.opponents=[linear]")
    assert list(found) == ["linear"]


@pytest.mark.parametrize(
    ("answers", "closed"),
    [
        (["yes", "no"] * 30, True),
        (["A", "B", "C", "D"] * 20, True),
        ([str(n) for n in range(50)], False),
        (["5"] * 40 + [str(n) for n in range(60)], False),
        (["same"] * 30, False),
        ([], False),
    ],
)
def test_a_closed_set_is_told_by_answers_that_came_once(answers: list[str], closed: bool) -> None:
    assert is_closed_set(answers) is closed
