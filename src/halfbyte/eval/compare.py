"""Owns the comparison: every variant on the same rows with the same renderer and greedy decoding."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from halfbyte.config import Run
from halfbyte.data.questions import fewshot_examples, held_out_rows, questions
from halfbyte.data.rows import Row
from halfbyte.errors import RunError
from halfbyte.eval.harness import Answered, Asked, ask
from halfbyte.eval.intervals import mean_interval, ratio_interval
from halfbyte.eval.metrics import scorer
from halfbyte.eval.variants import (
    ADAPTER,
    BASE_FULL,
    BASE_NF4,
    FEWSHOT,
    MERGED,
    Contender,
    Trained,
    contenders,
    is_artefact,
)
from halfbyte.model.artefact import read_artefact
from halfbyte.model.generate import generate
from halfbyte.model.llama_cpp import GgufModel
from halfbyte.model.passes import row_losses
from halfbyte.model.resolve import resolve_base
from halfbyte.model.trained import same_compute, saved_renderer, trained_base
from halfbyte.run_dir import RunDir

LOSS_METRIC = "held_out_loss"


@dataclass
class Variant:
    """What one variant answered and what that is worth."""

    name: str
    what: str
    answers: list[str] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)
    losses: list[tuple[float, int]] = field(default_factory=list)  # nats and tokens of each row
    benchmarks: dict[str, Answered] = field(default_factory=dict)
    weights_bytes: int = 0
    tokens_per_s: float = 0.0
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
            "tokens_per_s": round(self.tokens_per_s, 2),
            "finish_reasons": reasons,
            "seconds": round(self.seconds, 1),
        }


def compare(folder: RunDir, run: Run, benchmarks: Sequence[Asked] = ()) -> list[Variant]:
    """Measure every variant of ``eval.variants`` and ``eval.baselines``, in that order.

    Benchmarks are asked of every model but those in llama.cpp; of the base once, not again with examples.

    Raises:
        RunError: the run is not trained, or not merged while ``merged`` is asked for.
    """
    folder.trained()
    wanted = list(run.eval.variants)
    if MERGED in wanted:
        folder.need(
            folder.merged / "merge_report.json",
            f"python train/merge.py {folder.path} (or leave it out with eval.variants)",
        )
    for name in wanted:
        if is_artefact(name):
            read_artefact(folder, name)
    base = trained_base(folder, run)
    renderer = saved_renderer(folder, run, base)
    rows = held_out_rows(folder, run.eval.rows, run.seed)
    check_answers(rows, run)
    asked = questions(rows, renderer)
    if FEWSHOT in wanted:
        fewshot_examples(folder, run.eval.fewshot, run.seed)
    for baseline in run.eval.baselines:
        resolve_base(baseline.model, baseline.revision)
    trained = Trained(folder, run, base, same_compute(folder), asked, renderer)

    found = {}
    for contender in contenders(trained):
        found[contender.name] = variant = measure(contender, run)
        if contender.name != FEWSHOT and not isinstance(contender.model, GgufModel):
            for asked_of_all in benchmarks:
                task = asked_of_all.settings.task
                print(f"{contender.name}: {task}", file=sys.stderr, flush=True)
                variant.benchmarks[task] = ask(
                    asked_of_all, contender.model, contender.renderer.tokenizer, run
                )
        # The next model is loaded only when nothing holds this one any more.
        del contender
    order = [*wanted, *(baseline.name for baseline in run.eval.baselines)]
    return [found[name] for name in order]


def check_answers(rows: list[Row], run: Run) -> None:
    """Whether the metrics can score these rows, before any model is loaded.

    Raises:
        RunError: raw text is to be scored by its answers, or no answer could ever be right.
        UserError: a metric needs a library that is not installed.
    """
    metrics = [metric for metric in run.eval.metrics if metric != LOSS_METRIC]
    if any(row.text is not None for row in rows):
        if metrics or FEWSHOT in run.eval.variants:
            raise RunError(
                "the run's rows are raw text, which has no answers to score: use"
                f" eval.metrics=[{LOSS_METRIC}] and leave {FEWSHOT} out of eval.variants, such as"
                f" eval.variants=[{BASE_FULL},{BASE_NF4},{ADAPTER},{MERGED}]"
            )
        return
    for metric in metrics:
        score = scorer(metric, run.eval.answer_pattern)
        for row in rows:
            if metric in ("exact_match", "field_match") and score(row.answer, row.answer) != 1:
                what = (
                    f"matches eval.answer_pattern {run.eval.answer_pattern!r} nowhere"
                    if metric == "exact_match"
                    else "is no JSON object"
                )
                raise RunError(
                    f"{row.place}: the wanted answer {row.answer[:60]!r} {what}, so that {metric} could"
                    " never count it as right; change eval.metrics or eval.answer_pattern"
                )


def measure(contender: Contender, run: Run) -> Variant:
    """Answers, scores, held-out loss and speed of one model on its questions."""
    variant = Variant(contender.name, contender.what, weights_bytes=contender.num_bytes)
    asked, _renderer = contender.asked, contender.renderer
    start = time.perf_counter()
    if not any(question.row.text for question in asked):
        _answer(variant, contender, run)
    rows = [(question.ids, question.labels) for question in asked]
    if isinstance(contender.model, GgufModel):
        variant.losses = contender.model.losses(rows)
    else:
        variant.losses = row_losses(contender.model, rows, max(1, run.eval.batch_size // 4))
    variant.seconds = time.perf_counter() - start
    return variant


def _answer(variant: Variant, contender: Contender, run: Run) -> None:
    """Let the model answer every question, and score the answers."""
    asked, renderer = contender.asked, contender.renderer
    start = time.perf_counter()
    prompts = [question.prompt for question in asked]
    progress = _progress(contender.name, len(asked))
    if isinstance(contender.model, GgufModel):
        made = contender.model.answers(
            prompts,
            stop_ids=renderer.stop_ids,
            max_new_tokens=run.eval.max_new_tokens,
            progress=progress,
        )
    else:
        made = generate(
            contender.model,
            prompts,
            stop_ids=renderer.stop_ids,
            pad_id=renderer.pad_id,
            max_new_tokens=run.eval.max_new_tokens,
            batch_rows=run.eval.batch_size,
            progress=progress,
        )
    num_tokens = sum(len(answer.ids) + (answer.finish_reason == "stop") for answer in made)
    variant.tokens_per_s = num_tokens / (time.perf_counter() - start)
    variant.answers = [renderer.decode(answer.ids) for answer in made]
    variant.finish_reasons = [answer.finish_reason for answer in made]
    variant.scores = row_scores(variant.answers, [question.row for question in asked], run)


def row_scores(answers: list[str], rows: list[Row], run: Run) -> dict[str, list[float]]:
    """The score of each answer by each metric of the run but the loss."""
    scores: dict[str, list[float]] = {}
    for metric in run.eval.metrics:
        if metric != LOSS_METRIC:
            score = scorer(metric, run.eval.answer_pattern)
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


def _progress(name: str, total: int) -> Callable[[int], None]:
    def show(done: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{name}: {done} of {total} rows", end=end, file=sys.stderr, flush=True)

    return show
