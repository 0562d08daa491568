"""Owns what one model is measured by: its answers, their scores, the held-out loss, its speed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from halfbyte.config import Run
from halfbyte.data.questions import Question
from halfbyte.data.render import IGNORED
from halfbyte.data.rows import Row
from halfbyte.eval.energy import Meter
from halfbyte.eval.harness import Answered
from halfbyte.eval.intervals import mean_interval, ratio_interval
from halfbyte.eval.metrics import scorer
from halfbyte.eval.variants import Contender
from halfbyte.forward.scoring import ROWS_PER_SCORED, row_scores
from halfbyte.generate.batched import Answer, generate
from halfbyte.generate.continuous import SlotGenerator, Spent, slots_refusal
from halfbyte.llamacpp.model import GgufModel
from halfbyte.model.cpu_speed import unpack_for_speed

LOSS_METRIC = "held_out_loss"
MOST_WANTED = 64  # labelled tokens of a row whose logits are held all at once


@dataclass
class Variant:
    """What one variant answered and what that is worth."""

    name: str
    what: str
    answers: list[str] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    lengths: list[int] = field(
        default_factory=list
    )  # tokens of each answer, its stop token included
    scores: dict[str, list[float]] = field(default_factory=dict)
    losses: list[tuple[float, int]] = field(default_factory=list)  # nats and tokens of each row
    benchmarks: dict[str, Answered] = field(default_factory=dict)
    weights_bytes: int = 0
    disk_bytes: int = 0
    watts: float | None = None  # mean power while it was measured; None: not counted here
    prompt_tokens_per_s: float | None = None  # None: not measured
    tokens_per_s: float | None = None
    row_seconds: float | None = None  # for prompt and answer of a row, batched
    seconds: float = 0.0

    def loss_columns(self) -> tuple[list[float], list[int]]:
        """Summed losses and token counts of the rows."""
        return [loss for loss, _ in self.losses], [count for _, count in self.losses]

    def as_json(self, run: Run) -> dict[str, Any]:
        """The variant's entry in report.json."""
        settings = run.eval
        estimates = score_intervals(self.scores, run)
        loss = ratio_interval(
            *self.loss_columns(), settings.confidence, settings.resamples, run.seed
        )
        reasons = {reason: self.finish_reasons.count(reason) for reason in ("stop", "length")}
        return {
            "name": self.name,
            "what": self.what,
            **estimates,
            "held_out_loss": loss.value,
            "held_out_loss_interval": loss.as_json(),
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
                "answers": _deciles(self.lengths),
                "wanted": _deciles([count for _, count in self.losses]),
            },
            "seconds": round(self.seconds, 1),
        }


def measure(contender: Contender, run: Run) -> Variant:
    """Answers, scores, held-out loss and speed of one model on its questions."""
    variant = Variant(
        contender.name,
        contender.what,
        weights_bytes=contender.num_bytes,
        disk_bytes=contender.disk_bytes,
    )
    start = time.perf_counter()
    meter = Meter(contender.device, run.eval.watts)
    rows = [(question.ids, question.labels) for question in contender.asked]
    if isinstance(contender.model, GgufModel):
        _ask_gguf(variant, contender.model, contender, run)
        variant.losses = contender.model.losses(rows)
    else:
        unpack_for_speed(contender.model)
        refusal = slots_refusal(contender.model)
        if refusal or not all(map(_is_short, contender.asked)):
            size = max(1, run.eval.batch_size // ROWS_PER_SCORED)
            scored = row_scores(contender.model, rows, size)
            variant.losses = [(loss, len(hits)) for loss, hits in scored]
            known = [_known(*pair) for pair in zip(contender.asked, scored, strict=True)]
            _ask(variant, contender.model, contender, run, refusal, known)
        else:
            _ask(variant, contender.model, contender, run)
    variant.seconds, variant.watts = time.perf_counter() - start, meter.watts()
    return variant


def _ask_gguf(variant: Variant, model: GgufModel, contender: Contender, run: Run) -> None:
    """Let llama.cpp answer every question, and score the answers."""
    if any(question.row.text for question in contender.asked):
        return
    start = time.perf_counter()
    made = model.answers(
        [question.prompt for question in contender.asked],
        stop_ids=contender.renderer.stop_ids,
        max_new_tokens=run.eval.max_new_tokens,
        progress=_progress(contender.name, len(contender.asked)),
    )
    _take(variant, made, contender, run)
    _take_time(variant, made, time.perf_counter() - start)


def _ask(
    variant: Variant,
    model: nn.Module,
    contender: Contender,
    run: Run,
    refusal: str = "",
    known: list[list[int]] | None = None,
) -> None:
    """Let a model answer every question, and score the answers.

    ``refusal`` says why it cannot answer in slots. ``known`` is what each answer begins with, from the pass
    that measured the loss; without it the loss is measured here, in the pass that reads the prompt.
    """
    asked, renderer = contender.asked, contender.renderer
    if any(question.row.text for question in asked):
        return
    prompts = [question.prompt for question in asked]
    progress = _progress(contender.name, len(asked))
    if refusal:
        print(f"{contender.name}: answers in padded batches: {refusal}", file=sys.stderr)
        start = time.perf_counter()
        made = generate(
            model,
            prompts,
            stop_ids=renderer.stop_ids,
            pad_id=renderer.pad_id,
            max_new_tokens=run.eval.max_new_tokens,
            batch_rows=run.eval.batch_size,
            progress=progress,
        )
        _take_time(variant, made, time.perf_counter() - start)
    else:
        spent = Spent()
        made = SlotGenerator(model).generate(
            prompts,
            stop_ids=renderer.stop_ids,
            max_new_tokens=run.eval.max_new_tokens,
            begun=known,
            wanted=None if known else [_wanted(question) for question in asked],
            progress=progress,
            spent=spent,
        )
        if not known:
            scores = [spent.scores[number] for number in range(len(asked))]
            variant.losses = [(loss, len(hits)) for loss, hits in scores]
        _take_rates(variant, made, prompts, spent)
    _take(variant, made, contender, run)


def _wanted(question: Question) -> list[int]:
    """The labelled tokens of a row."""
    return [label for label in question.labels if label != IGNORED]


def _is_short(question: Question) -> bool:
    """Whether all that is labelled is a short answer, right behind the prompt."""
    answer = _wanted(question)
    whole = [*question.prompt, *answer]
    fits = bool(question.prompt) and 0 < len(answer) <= MOST_WANTED
    return fits and question.ids[: len(whole)] == whole


def _known(question: Question, scored: tuple[float, list[bool]]) -> list[int]:
    """The beginning of the wanted answer that is the model's own."""
    answer, hits = _wanted(question), scored[1]
    return answer[: hits.index(False)] if False in hits else answer


def _take(variant: Variant, made: list[Answer], contender: Contender, run: Run) -> None:
    variant.answers = [contender.renderer.decode(answer.ids) for answer in made]
    variant.finish_reasons = [answer.finish_reason for answer in made]
    variant.lengths = _lengths(made)
    rows = [question.row for question in contender.asked]
    variant.scores = metric_scores(variant.answers, rows, run)


def _take_time(variant: Variant, made: list[Answer], seconds: float) -> None:
    variant.tokens_per_s = sum(_lengths(made)) / seconds
    variant.row_seconds = seconds / len(made)


def _take_rates(
    variant: Variant, made: list[Answer], prompts: list[list[int]], spent: Spent
) -> None:
    """Speed from the tokens that were computed; what the rows would take from that speed."""
    variant.prompt_tokens_per_s = spent.prompt_tokens / spent.prompt_s if spent.prompt_s else None
    variant.tokens_per_s = spent.answer_tokens / spent.answer_s if spent.answer_s else None
    if variant.prompt_tokens_per_s and variant.tokens_per_s:
        seconds = sum(map(len, prompts)) / variant.prompt_tokens_per_s
        seconds += sum(_lengths(made)) / variant.tokens_per_s
        variant.row_seconds = seconds / len(made)


def _lengths(made: list[Answer]) -> list[int]:
    """Generated tokens of each answer, its stop token included."""
    return [len(answer.ids) + (answer.finish_reason == "stop") for answer in made]


def _deciles(values: list[int]) -> list[float]:
    """10th, 50th and 90th percentile."""
    return [float(at) for at in np.percentile(values, (10, 50, 90))] if values else []


def metric_scores(answers: list[str], rows: list[Row], run: Run) -> dict[str, list[float]]:
    """The score of each answer by each metric of the run but the loss."""
    scores: dict[str, list[float]] = {}
    for metric in run.eval.metrics:
        if metric != LOSS_METRIC:
            score = scorer(metric, run.eval)
            scores[metric] = [
                score(answer, row.answer) for answer, row in zip(answers, rows, strict=True)
            ]
    return scores


def score_intervals(scores: dict[str, list[float]], run: Run) -> dict[str, dict[str, Any]]:
    """Each metric's mean with its interval."""
    settings = run.eval
    return {
        metric: mean_interval(values, settings.confidence, settings.resamples, run.seed).as_json()
        for metric, values in scores.items()
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _progress(name: str, total: int) -> Callable[[int], None]:
    def show(done: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{name}: {done} of {total} rows", end=end, file=sys.stderr, flush=True)

    return show
