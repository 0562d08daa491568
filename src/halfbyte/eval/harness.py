"""Owns a run of lm-evaluation-harness on a model that is in memory, and the figures that it gives."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from halfbyte.config import Run

# The defaults of lm-evaluation-harness, with which prompts are those of its command line.
RANDOM_SEED, NUMPY_SEED, TORCH_SEED, FEWSHOT_SEED = 0, 1234, 1234, 1234
BOOTSTRAP = 100  # resamples for the harness's standard errors where it has no formula

Question = tuple[str, int]  # task, and number of the question in it


@dataclass(frozen=True)
class BenchmarkResult:
    """The result of one model in a benchmark.

    Attributes:
        scores: the score of every question, for each ``metric,filter``.
        harness: the harness's own figures with their standard errors, for each task.
        samples: the answers to each question.
        seconds: how long it took.
    """

    scores: dict[str, list[float]]
    harness: dict[str, dict[str, float]]
    samples: list[dict[str, Any]]
    seconds: float


def evaluate_tasks(
    tasks: dict[str, Any],
    questions: list[Question],
    model: Any,
    run: Run,
    *,
    chat: bool | None = None,
) -> dict[str, Any]:
    """Let the harness evaluate these questions, seeded as its command line does."""
    from lm_eval.evaluator import evaluate

    chat = run.eval.benchmark_chat if chat is None else chat
    random.seed(RANDOM_SEED)
    np.random.seed(NUMPY_SEED)
    torch.manual_seed(TORCH_SEED)
    for task in tasks.values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    samples = {
        name: [n for question_task, n in questions if question_task == name] for name in tasks
    }
    results: dict[str, Any] = evaluate(
        lm=model,
        task_dict={"tasks": tasks},
        samples=samples,
        bootstrap_iters=BOOTSTRAP,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        confirm_run_unsafe_code=run.eval.run_code,
    )
    return results


def collect_scores(
    tasks: dict[str, Any], results: dict[str, Any], questions: list[Question], seconds: float
) -> BenchmarkResult:
    """Take the score of each question from the harness's samples.

    Only metrics that are the mean of their questions' scores are taken: for others (perplexity, F1 of a
    corpus) the value that the harness keeps for a question is not its score.
    """
    from lm_eval.utils import handle_non_serializable

    values: dict[str, dict[Question, float]] = {}
    samples: dict[Question, dict[str, Any]] = {}
    for name, task_samples in results["samples"].items():
        for sample in task_samples:
            question = (name, int(sample["doc_id"]))
            record = {"task": name, "doc_id": question[1], "target": sample["target"]}
            record["answers"] = sample["resps"]
            plain = json.loads(json.dumps(record, default=handle_non_serializable))
            samples[question] = _finite(plain)
            for metric in sample["metrics"]:
                if _is_mean(tasks[name], metric) and isinstance(
                    sample[metric], (bool, int, float, np.number)
                ):
                    number = float(sample[metric])
                    values.setdefault(f"{metric},{sample['filter']}", {})[question] = number
    scores = {
        metric: [by_question[question] for question in questions]
        for metric, by_question in values.items()
        if len(by_question) == len(questions) and all(map(math.isfinite, by_question.values()))
    }
    harness = {
        name: {key: float(value) for key, value in figures.items() if _is_figure(key, value)}
        for name, figures in results["results"].items()
    }
    return BenchmarkResult(scores, harness, [samples[question] for question in questions], seconds)


def _is_mean(task: Any, metric: str) -> bool:
    """Return whether a task's metric is the mean of its questions' scores."""
    aggregations = task.aggregation()
    # A function that yields several metrics, such as pass@k, is listed under the function's name only.
    aggregation = aggregations.get(metric) or next(iter(aggregations.values()), None)
    return getattr(aggregation, "__name__", "") in ("mean", "nanmean")


def _finite(value: Any) -> Any:
    """Return JSON in which NaN and infinity are replaced by their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return value


def _is_figure(key: str, value: Any) -> bool:
    """Return whether a result of the harness is a finite number of a ``metric,filter``."""
    return "," in key and isinstance(value, (int, float, np.number)) and math.isfinite(value)
