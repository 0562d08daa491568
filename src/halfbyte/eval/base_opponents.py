"""Owns the opponents with the base: retrieved examples, the allowed answers in the prompt, ranked answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from halfbyte.config import Run
from halfbyte.data.conversation import OPENING_ROLES, Message, Row, system_in_question
from halfbyte.data.encoded import IGNORED
from halfbyte.data.questions import (
    Question,
    after_examples,
    questions,
    questions_after,
    turns_of,
)
from halfbyte.data.render import Renderer
from halfbyte.errors import DataError
from halfbyte.eval.intervals import Scores
from halfbyte.eval.likeness import Likeness, is_closed_set
from halfbyte.forward.scoring import row_losses
from halfbyte.generate.batched import until_stop
from halfbyte.generate.grammar import Grammars
from halfbyte.model.load import load_config
from halfbyte.model.resolve import Base
from halfbyte.scoring.rows import mean_score

RETRIEVAL, CHOICES = "base-full-retrieval", "base-full-choices"
INSTRUCTED = "base-full-instructed"
MAX_CONTEXT = 1 << 20  # tokens, of a base without positions
MAX_LISTED_CHARS = 8_000  # of a set of answers that a prompt names
NUM_TUNING = 32  # training rows on which the way to rank answers is chosen
QUESTIONS_PER_CALL = 32  # whose choices are scored together
NEEDS = {
    "linear": "the training answers are no closed set",
    "copy": "fewer than nine of ten training answers stand in their prompts",
    "base-full-choices": "the training answers are no closed set of texts",
    "base-full-instructed": "the training answers are no closed set of few characters, and there is no eval.json_schema",
}

# Makes the grammar of answers, given what closes open thoughts.
Allowed = Callable[[Grammars, str | None], Any]


@dataclass(frozen=True)
class Choices:
    """Answers to rank by their likelihood.

    Attributes:
        texts: the C answers.
        forms: as the chat template would have them written.
        ids: their tokens.
        tuning: questions on training rows.
    """

    texts: list[str]
    forms: list[str]
    ids: list[list[int]]
    tuning: list[Question]

    @property
    def num_tokens(self) -> int:
        """The number of tokens to compute for a question: common beginnings count once."""
        return len({tuple(ids[:end]) for ids in self.ids for end in range(1, len(ids) + 1)})


@dataclass(frozen=True)
class BaseOpponent:
    """An opponent that asks the unquantised base in another way.

    Attributes:
        what: says how, for the report.
        questions: its prompts.
        choices: the answers that it ranks instead of generating one.
        allowed: makes the grammar that its answers follow.
    """

    name: str
    what: str
    questions: list[Question]
    choices: Choices | None = None
    allowed: Allowed | None = None

    @property
    def num_tokens(self) -> int:
        """About how many tokens the base reads; what all prompts begin with counts once."""
        sizes = [len(one.ids) for one in self.questions]
        if self.choices is not None:
            return (len(sizes) + len(self.choices.tuning)) * self.choices.num_tokens
        if self.allowed is not None:  # the set of answers stands at the beginning
            prompts = [len(one.prompt) for one in self.questions]
            return max(prompts) + sum(sizes) - sum(prompts)
        return sum(sizes)


def base_opponents(
    likeness: Likeness, plain: list[Question], renderer: Renderer, run: Run, context: int
) -> tuple[list[BaseOpponent], list[str]]:
    """Return the opponents with the base that apply to these rows, and a note for each that is left out.

    Args:
        likeness: the training rows that the run kept, one at least, and the rows of the comparison.
        plain: the questions of the base.
        renderer: of the base.
        run: the config.
        context: the most tokens that the base reads.
    """
    growth = None if run.eval.opponents is not None else run.eval.max_opponent_growth
    room = math.inf if growth is None else growth * sum(len(one.ids) for one in plain)
    ways: dict[str, Callable[[], BaseOpponent | None]] = {
        RETRIEVAL: lambda: _with_retrieved(likeness, plain, renderer, run, context, room),
        CHOICES: lambda: _choices(likeness, plain, renderer),
        INSTRUCTED: lambda: _instructed(likeness, plain, renderer, run),
    }
    opponents: list[BaseOpponent] = []
    notes = []
    for name, way in ways.items():
        if name not in run.eval.allowed_opponents:
            continue
        try:
            opponent = way()
        except DataError as error:  # the template or the grammar takes no such prompt or answer
            notes.append(f"{name} was left out: {error}")
            continue
        if opponent is None:
            notes += not_applying({name}, run)
            continue
        # Constrained answers take long for what is read, and were never the strongest where we measured them
        # (docs/evaluate.md): they get what the others leave.
        others = opponents if name == INSTRUCTED else []
        num_tokens = sum(one.num_tokens for one in [*others, opponent])
        if num_tokens <= room:
            opponents.append(opponent)
        else:
            together = f"with {' and '.join(one.name for one in others)} " if others else ""
            notes.append(
                f"{name} was left out: {together}it reads {num_tokens:,} tokens, more than {growth:g} times those of the rows"
                " (eval.max_opponent_growth); named in eval.opponents, it takes part."
            )
    return opponents, notes


def context_of(base: Base) -> int:
    """Return the most tokens that a base reads."""
    text = load_config(base).get_text_config()
    return int(getattr(text, "max_position_embeddings", None) or MAX_CONTEXT)


def not_applying(names: Collection[str], run: Run) -> list[str]:
    """Return a note for each of these opponents that was named, and does not apply to the rows."""
    named = run.eval.opponents or []
    return [f"{name} was left out: {NEEDS[name]}." for name in named if name in names]


def _with_retrieved(
    likeness: Likeness,
    plain: list[Question],
    renderer: Renderer,
    run: Run,
    context: int,
    room: float,
) -> BaseOpponent | None:
    """Put the most similar training rows into each prompt, the most similar one last, as far as there is room."""
    wanted = min(run.eval.fewshot, len(likeness.known.rows))
    neighbours = likeness.nearest(wanted)
    longest = context - run.eval.max_new_tokens

    rows = [one.row for one in plain]
    shown = [
        [likeness.known.rows[number] for number, _ in reversed(likest)] for likest in neighbours
    ]

    def lengths() -> list[int]:
        longer = [after_examples(row, turns_of(few)) for row, few in zip(rows, shown, strict=True)]
        return [len(encoded.ids) for encoded in renderer.encode_rows(longer)]

    count, sizes = wanted, lengths()
    while count > 1 and sum(sizes) > room:
        count -= 1
        shown = [few[-count:] for few in shown]
        sizes = lengths()
    while any(size > longest and few for size, few in zip(sizes, shown, strict=True)):
        shown = [few[1:] if size > longest else few for size, few in zip(sizes, shown, strict=True)]
        sizes = lengths()
    rendered = questions_after(rows, renderer, [turns_of(few) for few in shown])
    what = f"the {count} most similar training rows in the prompt, or as many as fit"
    if count < wanted:
        what += f" (eval.max_opponent_growth leaves {wanted - count} out)"
    return BaseOpponent(RETRIEVAL, what, rendered)


def _choices(likeness: Likeness, plain: list[Question], renderer: Renderer) -> BaseOpponent | None:
    """Rank the answers of a closed set by their likelihood."""
    known = likeness.known
    if not is_closed_set(known.answers) or _has_calls(known.rows):
        return None
    form_of = dict(zip(known.texts, known.answers, strict=True))
    texts = sorted(form_of)
    ids = [_answer_ids(plain[0].row, text, renderer) for text in texts]
    step = max(1, len(known.rows) // NUM_TUNING)
    tuning = questions(known.rows[::step][:NUM_TUNING], renderer)
    choices = Choices(texts, [form_of[text] for text in texts], ids, tuning)
    return BaseOpponent(CHOICES, f"the likeliest of {len(texts)} answers", plain, choices)


def _answer_ids(row: Row, text: str, renderer: Renderer) -> list[int]:
    """Return the tokens of an answer to a row, without those that end it."""
    answered = replace(row, messages=(*row.messages[:-1], Message("assistant", text)))
    return until_stop(questions([answered], renderer)[0].labelled, set(renderer.stop_ids)).ids


def _instructed(
    likeness: Likeness, plain: list[Question], renderer: Renderer, run: Run
) -> BaseOpponent | None:
    """Name the allowed answers, or the schema of the answers, in the prompt, and allow nothing else."""
    known = likeness.known
    if run.eval.json_schema is not None:
        schema = json.loads(Path(run.eval.json_schema).read_text(encoding="utf-8"))
        instruction = f"Answer with JSON that follows this JSON Schema: {json.dumps(schema)}"
        what = "the JSON Schema in the prompt, constrained to it"

        def allowed(grammars: Grammars, closer: str | None) -> Any:
            return grammars.of_schema(schema, closer=closer)

    elif is_closed_set(known.answers) and not _has_calls(known.rows):
        texts = sorted(set(known.texts))
        if sum(map(len, texts)) > MAX_LISTED_CHARS:
            return None
        instruction = "\n".join(["Answer with one of these:", *texts])
        what = f"the {len(texts)} answers in the prompt, constrained to them"

        def allowed(grammars: Grammars, closer: str | None) -> Any:
            return grammars.of_texts(texts, closer=closer)

    else:
        return None
    # A grammar that cannot be compiled is a DataError here, before any model is loaded.
    grammars = Grammars(renderer, len(renderer.tokenizer), may_think=False)
    allowed(grammars, renderer.answer_format.closer)
    rows = [_with_instruction(one.row, instruction) for one in plain]
    try:
        longer = questions(rows, renderer)
    except DataError:  # the template has no system message
        rows = [replace(row, messages=system_in_question(row.messages)) for row in rows]
        longer = questions(rows, renderer)
    return BaseOpponent(INSTRUCTED, what, longer, allowed=allowed)


def _has_calls(rows: Sequence[Row]) -> bool:
    """Return whether any answer calls tools."""
    return any(row.messages[-1].tool_calls for row in rows)


def _with_instruction(row: Row, instruction: str) -> Row:
    """Return a row with an instruction at the end of its system message."""
    first, *others = row.messages
    if first.role not in OPENING_ROLES:
        return replace(row, messages=(Message("system", instruction), *row.messages))
    opening = replace(first, content=f"{first.content}\n{instruction}")
    return replace(row, messages=(opening, *others))


def rank(
    model: nn.Module, ranked: Sequence[Question], choices: Sequence[list[int]], num_rows: int
) -> Scores:
    """Return the log-likelihood of each answer to each question: (questions, choices), in nats.

    As lm-evaluation-harness scores multiple choice: the sum over the tokens of the answer, without its end.
    """
    scores: list[list[float]] = []
    for start in range(0, len(ranked), QUESTIONS_PER_CALL):
        block = ranked[start : start + QUESTIONS_PER_CALL]
        rows = [
            ([*one.prompt, *ids], [IGNORED] * len(one.prompt) + ids)
            for one in block
            for ids in choices
        ]
        losses = [-loss for loss, _ in row_losses(model, rows, num_rows)]
        scores += [losses[at : at + len(choices)] for at in range(0, len(losses), len(choices))]
    return np.array(scores)


def likeliest(
    model: nn.Module, opponent: BaseOpponent, choices: Choices, renderer: Renderer, run: Run
) -> tuple[str, list[str]]:
    """Return how the answers were ranked, and the first answer to each question.

    They are ranked by log-likelihood, or by that per character; which, is chosen on training rows.
    """
    lengths = np.array([max(1, len(text)) for text in choices.texts])
    num_rows = run.eval.batch_size
    tuning = rank(model, choices.tuning, choices.ids, num_rows)
    ways = {"": np.ones_like(lengths), " per character": lengths}
    rows = [one.row for one in choices.tuning]

    def score(way: str) -> float:
        texts = [choices.forms[best] for best in (tuning / ways[way]).argmax(axis=1)]
        return mean_score(texts, rows, renderer.answer_format, run)

    way = max(ways, key=score)  # the first of equal ones
    scores = rank(model, opponent.questions, choices.ids, num_rows)
    answers = [choices.forms[best] for best in (scores / ways[way]).argmax(axis=1)]
    return f" by likelihood{way}", answers
