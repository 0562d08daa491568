"""Owns the questions put to every variant: a run's held-out rows, with or without examples."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from halfbyte.data.conversation import OPENING_ROLES, Message, Row, row_from_json
from halfbyte.data.encoded import IGNORED
from halfbyte.data.ledger import Ledger
from halfbyte.data.render import Renderer
from halfbyte.errors import RunError
from halfbyte.run_dir import RunDir, check_files, read_jsonl

MAX_KEPT_ROWS = 20_000  # of the training, for opponents without a model


@dataclass(frozen=True)
class Question:
    """A held-out row as token ids.

    Raw text has an empty prompt and labels on every token.

    Attributes:
        row: the row.
        prompt: ids of its prompt.
        ids: ids of the whole row.
        labels: labels of the row, on its last answer alone.
    """

    row: Row
    prompt: list[int]
    ids: list[int]
    labels: list[int]

    @property
    def labelled(self) -> list[int]:
        """The labelled tokens, which are the wanted answer."""
        return [label for label in self.labels if label != IGNORED]


def held_out_rows(folder: RunDir, num_rows: int, seed: int) -> list[Row]:
    """Return a seeded sample of the test rows, or of the validation rows if there is no test set.

    A conversation that calls tools on its way is also one that ends with each of these calls.

    Raises:
        RunError: the run held out no rows.
    """
    rows = _first_rows(folder, ("test", "validation"))
    if not rows:
        raise RunError(
            f"{folder.path}: no rows were held out; train with data.test, data.test_frac or"
            " data.validation_frac"
        )
    rows = [one for row in rows for one in (*_up_to_calls(row), row)]
    return random.Random(seed).sample(rows, min(num_rows, len(rows)))


def _up_to_calls(row: Row) -> list[Row]:
    """Return a row up to each answer before its last one that calls tools."""
    return [
        replace(row, messages=row.messages[:number], place=f"{row.place}, turn {number}")
        for number, message in enumerate(row.messages[:-1], start=1)
        if message.tool_calls
    ]


def measuring_rows(folder: RunDir, num_rows: int, seed: int) -> list[Row]:
    """Return a seeded sample of held-out rows, or else of training rows, to compare two models on."""
    rows = _first_rows(folder, ("test", "validation", "fewshot"))
    return random.Random(seed).sample(rows, min(num_rows, len(rows)))


def _first_rows(folder: RunDir, names: tuple[str, ...]) -> list[Row]:
    """Return the rows of the first of these files in the run folder's data that has any."""
    for name in names:
        rows = _kept_rows(folder, f"{name}.jsonl")
        if rows:
            return rows
    return []


def _kept_rows(folder: RunDir, name: str) -> list[Row]:
    """Return the rows of a file in the run folder's data.

    Raises:
        RunError: it is missing, or not the one that the training wrote.
    """
    path = folder.need(folder.data / name, "halfbyte train CONFIG")
    if folder.ledger.is_file():
        known = Ledger.read(folder.ledger).files_sha256
        written = {name: known[name]} if name in known else {}
        remedy = "Put it back, or train again with train.existing=replace"
        check_files(folder.data, written, "the file that the training wrote", remedy)
    return [row_from_json(record) for record in read_jsonl(path)]


def fewshot_examples(folder: RunDir, count: int, seed: int) -> tuple[Message, ...]:
    """Return the turns of ``count`` training rows, without their system messages.

    Raises:
        RunError: the run kept fewer training rows.
    """
    rows = training_examples(folder)
    if len(rows) < count:
        raise RunError(f"eval.fewshot is {count}, but the run kept {len(rows)} training examples")
    chosen = random.Random(seed).sample(rows, count)
    return turns_of(chosen)


def turns_of(rows: Sequence[Row]) -> tuple[Message, ...]:
    """Return the turns of rows, without their system messages."""
    return tuple(turn for row in rows for turn in row.messages if turn.role not in OPENING_ROLES)


def training_examples(folder: RunDir) -> list[Row]:
    """Return the training rows that a run keeps for use after training."""
    return _kept_rows(folder, "fewshot.jsonl")


def training_rows(folder: RunDir) -> list[Row]:
    """Return the training rows that a run keeps for its opponents; a run of an older version kept few."""
    if not (folder.data / "train.jsonl").is_file():
        return training_examples(folder)
    return _kept_rows(folder, "train.jsonl")


def questions(
    rows: list[Row], renderer: Renderer, examples: tuple[Message, ...] = ()
) -> list[Question]:
    """Render rows for evaluation, with ``examples`` between the system message and the conversation."""
    return questions_after(rows, renderer, [examples] * len(rows))


def questions_after(
    rows: Sequence[Row], renderer: Renderer, examples: Sequence[tuple[Message, ...]]
) -> list[Question]:
    """Render rows for evaluation, each after examples of its own."""
    longer = [after_examples(*pair) for pair in zip(rows, examples, strict=True)]
    prompts = [
        []
        if row.text is not None
        else renderer.encode_prompt(row.messages[:-1], row.place, row.tools)
        for row in longer
    ]
    rendered = []
    for row, prompt, encoded in zip(rows, prompts, renderer.encode_rows(longer), strict=True):
        labels = [IGNORED] * len(prompt) + encoded.labels[len(prompt) :]
        rendered.append(Question(row, prompt, encoded.ids, labels))
    return rendered


def after_examples(row: Row, examples: tuple[Message, ...]) -> Row:
    """Return a row with ``examples`` after its system message, whose last answer is to be predicted."""
    if row.text is not None:
        return row
    num_system = int(row.messages[0].role in OPENING_ROLES)
    # What is asked is the last answer, whether or not it was to be learnt.
    answer = replace(row.messages[-1], learnt=True)
    messages = (*row.messages[:num_system], *examples, *row.messages[num_system:-1], answer)
    return replace(row, messages=messages)
