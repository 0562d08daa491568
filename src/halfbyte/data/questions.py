"""Owns what every variant is asked: the held-out rows of a run, and the same rows with examples."""

from __future__ import annotations

import random
from dataclasses import dataclass

from halfbyte.data.render import IGNORED, Renderer
from halfbyte.data.rows import Message, Row, row_from_json
from halfbyte.errors import RunError
from halfbyte.run_dir import RunDir, read_jsonl


@dataclass(frozen=True)
class Question:
    """A held-out row: its prompt's ids, and ids with labels on its last answer alone.

    Raw text has an empty prompt and labels on every token.
    """

    row: Row
    prompt: list[int]
    ids: list[int]
    labels: list[int]


def held_out_rows(folder: RunDir, num_rows: int, seed: int) -> list[Row]:
    """A seeded sample of the test rows, or of the validation rows of a run without a test set.

    Raises:
        RunError: the run held nothing out.
    """
    rows = _first_rows(folder, ("test", "validation"))
    if not rows:
        raise RunError(
            f"{folder.path}: no rows were held out; train with data.test, data.test_frac or"
            " data.validation_frac"
        )
    return random.Random(seed).sample(rows, min(num_rows, len(rows)))


def measuring_rows(folder: RunDir, num_rows: int, seed: int) -> list[Row]:
    """Rows of any kind on which two models are compared: held out, or else from training."""
    rows = _first_rows(folder, ("test", "validation", "fewshot"))
    return random.Random(seed).sample(rows, min(num_rows, len(rows)))


def _first_rows(folder: RunDir, names: tuple[str, ...]) -> list[Row]:
    """The rows of the first file in the run folder's data that holds any."""
    for name in names:
        path = folder.need(folder.data / f"{name}.jsonl", "accelerate launch train/sft.py CONFIG")
        rows = [row_from_json(record) for record in read_jsonl(path)]
        if rows:
            return rows
    return []


def fewshot_examples(folder: RunDir, count: int, seed: int) -> tuple[Message, ...]:
    """The turns of ``count`` training rows, without their system messages.

    Raises:
        RunError: the training set is smaller than that.
    """
    rows = training_examples(folder)
    if len(rows) < count:
        raise RunError(f"eval.fewshot is {count}, but the run kept {len(rows)} training examples")
    chosen = random.Random(seed).sample(rows, count)
    return tuple(turn for row in chosen for turn in row.messages if turn.role != "system")


def training_examples(folder: RunDir) -> list[Row]:
    """The training rows that a run keeps for use after the training."""
    path = folder.need(folder.data / "fewshot.jsonl", "accelerate launch train/sft.py CONFIG")
    return [row_from_json(record) for record in read_jsonl(path)]


def questions(
    rows: list[Row], renderer: Renderer, examples: tuple[Message, ...] = ()
) -> list[Question]:
    """Render rows for evaluation, with ``examples`` between system message and conversation."""
    return [_question(row, renderer, examples) for row in rows]


def _question(row: Row, renderer: Renderer, examples: tuple[Message, ...]) -> Question:
    if row.text is not None:
        whole = renderer.encode_row(row)
        return Question(row, [], whole.ids, whole.labels)
    lead = 1 if row.messages[0].role == "system" else 0
    messages = (*row.messages[:lead], *examples, *row.messages[lead:])
    prompt = renderer.encode_prompt(messages[:-1], row.place)
    encoded = renderer.encode_row(Row(row.place, messages))
    labels = [IGNORED] * len(prompt) + encoded.labels[len(prompt) :]
    return Question(row, prompt, encoded.ids, labels)
