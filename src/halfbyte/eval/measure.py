"""Owns the measurement of one model: its answers, their scores, the held-out loss and its speed."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from halfbyte.config import Run
from halfbyte.data.conversation import Row
from halfbyte.data.questions import Question
from halfbyte.data.render import Renderer
from halfbyte.data.thoughts import message_thoughts
from halfbyte.data.tokenise import plain_ids
from halfbyte.eval.base_opponents import likeliest
from halfbyte.eval.energy import Meter
from halfbyte.eval.harness import BenchmarkResult
from halfbyte.eval.intervals import mean_interval, ratio_interval
from halfbyte.eval.variants import Contender
from halfbyte.forward.scoring import ROWS_PER_SCORED, row_scores
from halfbyte.generate.batched import Answer, generate
from halfbyte.generate.continuous import SlotGenerator, Spent, slots_refusal
from halfbyte.generate.grammar import Grammars
from halfbyte.llamacpp.model import GgufModel
from halfbyte.model.cpu_speed import unpack_for_speed
from halfbyte.scoring.numbers import read_number
from halfbyte.scoring.rows import answer_scores, count_differences, parse_answers

MAX_LABELLED_TOKENS = 128  # of a row whose logits are all held at once


@dataclass
class Variant:
    """The answers of one variant and what was measured on them."""

    name: str
    what: str
    answers: list[str] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    lengths: list[int] = field(
        default_factory=list
    )  # tokens of each answer, its stop token included
    thoughts: list[int | None] = field(default_factory=list)  # tokens of each answer's, None: none
    thoughts_wanted: int = 0  # rows whose wanted answer has thoughts
    unread: list[str] = field(default_factory=list)  # why numeric_match read no number, by answer
    call_differences: dict[str, int] = field(default_factory=dict)  # from the wanted calls
    scores: dict[str, list[float]] = field(default_factory=dict)
    losses: list[tuple[float, int]] = field(default_factory=list)  # nats and tokens of each row
    benchmarks: dict[str, BenchmarkResult] = field(default_factory=dict)
    weights_bytes: int = 0
    disk_bytes: int = 0
    watts: float | None = None  # mean power during the measurement; None: not counted here
    prompt_tokens_per_s: float | None = None  # None: not measured
    tokens_per_s: float | None = None
    row_seconds: float | None = None  # for a row's prompt and answer, batched
    seconds: float = 0.0

    def loss_columns(self) -> tuple[list[float], list[int]]:
        """Return the rows' summed losses and their token counts."""
        return [loss for loss, _ in self.losses], [count for _, count in self.losses]

    def as_json(self, run: Run) -> dict[str, Any]:
        """Return the variant's entry in report.json."""
        settings = run.eval
        estimates = score_intervals(self.scores, run)
        loss = None
        if self.losses:  # an opponent without a model has none
            sums, counts = self.loss_columns()
            loss = ratio_interval(sums, counts, settings.confidence, settings.resamples, run.seed)
        reasons = {reason: self.finish_reasons.count(reason) for reason in ("stop", "length")}
        return {
            "name": self.name,
            "what": self.what,
            **estimates,
            "held_out_loss": loss and loss.value,
            "held_out_loss_interval": loss and loss.as_json(),
            "weights_bytes": self.weights_bytes,
            "disk_bytes": self.disk_bytes,
            "prompt_tokens_per_s": _rounded(self.prompt_tokens_per_s, 2),
            "tokens_per_s": _rounded(self.tokens_per_s, 2),
            "seconds_per_1000_rows": _rounded(self.row_seconds and 1000 * self.row_seconds, 1),
            "watts": _rounded(self.watts, 1),
            "watt_hours_per_1000_rows": _rounded(
                self.row_seconds and self.watts and self.row_seconds * self.watts / 3.6, 3
            ),
            "finish_reasons": reasons,
            "lengths": {
                "answers": _percentiles(self.lengths),
                "wanted": _percentiles([count for _, count in self.losses]),
                "thoughts": _percentiles([size for size in self.thoughts if size is not None]),
            },
            "thoughts": sum(size is not None for size in self.thoughts),
            "thoughts_wanted": self.thoughts_wanted,
            "call_differences": self.call_differences,
            "unread": dict(Counter(filter(None, self.unread))),
            "seconds": round(self.seconds, 1),
        }


def measure(contender: Contender, run: Run) -> Variant:
    """Measure answers, scores, held-out loss and speed of one model on its questions."""
    variant = Variant(
        contender.name,
        contender.what,
        weights_bytes=contender.num_bytes,
        disk_bytes=contender.disk_bytes,
    )
    start = time.perf_counter()
    meter = Meter(contender.device, run.eval.watts)
    rows = [(question.ids, question.labels) for question in contender.questions]
    opponent = contender.opponent
    if opponent is not None and opponent.choices is not None:
        _rank(variant, contender, run)
    elif isinstance(contender.model, GgufModel):
        _generate_gguf(variant, contender.model, contender, run)
        variant.losses = contender.model.losses(rows)
    else:
        unpack_for_speed(contender.model)
        refusal = slots_refusal(contender.model)
        if opponent is not None and opponent.allowed is not None:
            # Its loss without the grammar would say nothing about it.
            begun: list[list[int]] = [[] for _ in rows]
            _generate(variant, contender.model, contender, run, refusal, begun)
        elif refusal or not all(map(_has_short_answer, contender.questions)):
            size = max(1, run.eval.batch_size // ROWS_PER_SCORED)
            scored = row_scores(contender.model, rows, size)
            variant.losses = [(loss, len(hits)) for loss, hits in scored]
            begun = [
                _correct_prefix(*pair) for pair in zip(contender.questions, scored, strict=True)
            ]
            _generate(variant, contender.model, contender, run, refusal, begun)
        else:
            _generate(variant, contender.model, contender, run)
    variant.seconds, variant.watts = time.perf_counter() - start, meter.watts()
    return variant


def _rank(variant: Variant, contender: Contender, run: Run) -> None:
    """Let a model rank the answers of a closed set, and score the first ones."""
    opponent, renderer = contender.opponent, contender.renderer
    assert opponent is not None
    assert opponent.choices is not None
    assert isinstance(contender.model, nn.Module)
    start = time.perf_counter()
    how, answers = likeliest(contender.model, opponent, opponent.choices, renderer, run)
    variant.what += how
    variant.seconds = time.perf_counter() - start
    record_chosen(
        variant, answers, [question.row for question in contender.questions], renderer, run
    )


def _generate_gguf(variant: Variant, model: GgufModel, contender: Contender, run: Run) -> None:
    """Let llama.cpp answer every question, and score the answers."""
    if any(question.row.text for question in contender.questions):
        return
    start = time.perf_counter()
    answers = model.answers(
        [question.prompt for question in contender.questions],
        stop_ids=contender.renderer.stop_ids,
        max_new_tokens=run.eval.max_new_tokens,
        progress=_progress(contender.name, len(contender.questions)),
    )
    _record_answers(variant, answers, contender, run)
    _record_time(variant, answers, time.perf_counter() - start)


def _generate(
    variant: Variant,
    model: nn.Module,
    contender: Contender,
    run: Run,
    refusal: str = "",
    begun: list[list[int]] | None = None,
) -> None:
    """Let a model answer every question, and score the answers.

    Args:
        variant: takes the answers and what was measured.
        model: the contender's model.
        contender: has the questions and the renderer.
        run: the config.
        refusal: why the model cannot generate in slots.
        begun: the tokens that each answer begins with, from the pass that measured the loss; without it the
            loss is measured here, in the pass that reads the prompt.
    """
    questions, renderer = contender.questions, contender.renderer
    if any(question.row.text for question in questions):
        return
    prompts = [question.prompt for question in questions]
    progress = _progress(contender.name, len(questions))
    if refusal:
        print(f"{contender.name}: generating in padded batches: {refusal}", file=sys.stderr)
        if contender.opponent is not None and contender.opponent.allowed is not None:
            variant.what += f"; not constrained, as {refusal}"
        start = time.perf_counter()
        answers = generate(
            model,
            prompts,
            stop_ids=renderer.stop_ids,
            pad_id=renderer.pad_id,
            max_new_tokens=run.eval.max_new_tokens,
            batch_rows=run.eval.batch_size,
            progress=progress,
        )
        _record_time(variant, answers, time.perf_counter() - start)
    else:
        spent = Spent()
        answers = SlotGenerator(model, matcher=_matcher(model, contender)).generate(
            prompts,
            stop_ids=renderer.stop_ids,
            max_new_tokens=run.eval.max_new_tokens,
            begun=begun,
            wanted=None if begun else [question.labelled for question in questions],
            progress=progress,
            spent=spent,
        )
        if not begun:
            scores = [spent.scores[number] for number in range(len(questions))]
            variant.losses = [(loss, len(hits)) for loss, hits in scores]
        _record_rates(variant, answers, prompts, spent)
    _record_answers(variant, answers, contender, run)


def _matcher(model: Any, contender: Contender) -> Any:
    """Return the state of the grammar that a contender's answers follow; None for free answers."""
    opponent, renderer = contender.opponent, contender.renderer
    if opponent is None or opponent.allowed is None:
        return None
    vocab_size = len(model.get_output_embeddings().weight)
    grammars = Grammars(renderer, vocab_size, may_think=False)
    return opponent.allowed(grammars, renderer.answer_format.closer)


def _has_short_answer(question: Question) -> bool:
    """Return whether the labelled tokens are one short answer that directly follows the prompt."""
    answer = question.labelled
    whole = [*question.prompt, *answer]
    fits = bool(question.prompt) and 0 < len(answer) <= MAX_LABELLED_TOKENS
    return fits and question.ids[: len(whole)] == whole


def _correct_prefix(question: Question, scored: tuple[float, list[bool]]) -> list[int]:
    """Return the prefix of the wanted answer that the model would generate itself."""
    answer, hits = question.labelled, scored[1]
    return answer[: hits.index(False)] if False in hits else answer


def _record_answers(
    variant: Variant, answers: list[Answer], contender: Contender, run: Run
) -> None:
    """Record the answers of a variant and their scores."""
    variant.finish_reasons = [one.finish_reason for one in answers]
    variant.lengths = _lengths(answers)
    rows = [question.row for question in contender.questions]
    texts = [contender.renderer.decode(one.ids) for one in answers]
    record_scores(variant, texts, rows, contender.renderer, run)


def record_chosen(
    variant: Variant, answers: list[str], rows: list[Row], renderer: Renderer, run: Run
) -> None:
    """Record answers that were chosen whole in ``variant.seconds``, and their scores; as ``record_scores``."""
    variant.row_seconds = variant.seconds / len(answers)
    variant.finish_reasons = ["stop"] * len(answers)
    record_scores(variant, answers, rows, renderer, run)


def record_scores(
    variant: Variant, answers: list[str], rows: list[Row], renderer: Renderer, run: Run
) -> None:
    """Record the texts of a variant's answers, what they are made of, and their scores.

    Args:
        variant: takes them.
        answers: texts with markup of thoughts and calls.
        rows: that they answer.
        renderer: whose chat template they are written in.
        run: the config.
    """
    variant.answers = answers
    parsed = parse_answers(answers, rows, renderer.answer_format)
    variant.thoughts_wanted = sum(bool(message_thoughts(row.messages[-1])) for row in rows)
    for answer in parsed:
        thoughts = answer.thoughts
        size = None if thoughts is None else len(plain_ids(renderer.tokenizer, [thoughts])[0])
        variant.thoughts.append(size)
        if "numeric_match" in run.eval.metrics:
            variant.unread.append(read_number(answer.content).fault)
    if "tool_match" in run.eval.metrics:
        variant.call_differences = count_differences(parsed, rows)
    variant.scores = answer_scores(parsed, rows, run)


def _record_time(variant: Variant, answers: list[Answer], seconds: float) -> None:
    """Record the speed where prompts and answers are not timed separately."""
    variant.tokens_per_s = sum(_lengths(answers)) / seconds
    variant.row_seconds = seconds / len(answers)


def _record_rates(
    variant: Variant, answers: list[Answer], prompts: list[list[int]], spent: Spent
) -> None:
    """Record the speed on the tokens that were computed, and the time of a whole row at that speed."""
    variant.prompt_tokens_per_s = spent.prompt_tokens / spent.prompt_s if spent.prompt_s else None
    variant.tokens_per_s = spent.answer_tokens / spent.answer_s if spent.answer_s else None
    if variant.prompt_tokens_per_s and variant.tokens_per_s:
        seconds = sum(map(len, prompts)) / variant.prompt_tokens_per_s
        seconds += sum(_lengths(answers)) / variant.tokens_per_s
        variant.row_seconds = seconds / len(answers)


def _lengths(answers: list[Answer]) -> list[int]:
    """Return the number of generated tokens of each answer, including its stop token."""
    return [len(answer.ids) + (answer.finish_reason == "stop") for answer in answers]


def _percentiles(values: list[int]) -> list[float]:
    """Return the 10th, 50th and 90th percentile."""
    return [float(value) for value in np.percentile(values, (10, 50, 90))] if values else []


def score_intervals(scores: dict[str, list[float]], run: Run) -> dict[str, dict[str, Any]]:
    """Return each metric's mean with its confidence interval."""
    settings = run.eval
    return {
        metric: mean_interval(values, settings.confidence, settings.resamples, run.seed).as_json()
        for metric, values in scores.items()
    }


def _rounded(value: float | None, digits: int) -> float | None:
    """Round a value, if there is one."""
    return None if value is None else round(value, digits)


def _progress(name: str, total: int) -> Callable[[int], None]:
    """Return a function that shows how many rows are done."""

    def show(done: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{name}: {done} of {total} rows", end=end, file=sys.stderr, flush=True)

    return show
