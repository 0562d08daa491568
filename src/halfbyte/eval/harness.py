"""Owns standard benchmarks: lm-evaluation-harness's own tasks, asked of a model that is in memory.

The harness makes the prompts, reads the answers and scores them. Drawn here, once for all variants: which
questions are asked. Rehearsed here, before any model is loaded: that each task loads, runs and scores.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from halfbyte.config import Run
from halfbyte.config.evaluation import Benchmark
from halfbyte.errors import ConfigError, RunError, UserError, last_line
from halfbyte.eval.code_metric import is_held, sandboxed_code

# lm-evaluation-harness's own defaults: with them the prompts are those of its command line.
RANDOM_SEED, NUMPY_SEED, TORCH_SEED, FEWSHOT_SEED = 0, 1234, 1234, 1234
BOOTSTRAP = 100  # resamples of the harness's standard errors where it has no formula

Question = tuple[str, int]  # task and number of the question in it


@dataclass(frozen=True)
class LoadedBenchmark:
    """A benchmark that is ready to be asked.

    Attributes:
        settings: of the config.
        tasks: the harness's, by name; a group has several.
        questions: in the order of their scores.
        metric: ``metric,filter`` that decides.
        higher_is_better: whether more of it is better.
    """

    settings: Benchmark
    tasks: dict[str, Any]
    questions: list[Question]
    metric: str
    higher_is_better: bool

    def described(self, run: Run) -> dict[str, Any]:
        """What was asked, for the report: enough to ask it again."""
        chat = run.eval.benchmark_chat
        return {
            "task": self.settings.task,
            "n": len(self.questions),
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "max_new_tokens": self.settings.max_new_tokens,
            "chat_template": chat,
            "tasks": {
                name: {
                    "version": task.VERSION,
                    "fewshot": task.config.num_fewshot,
                    "questions": [number for own, number in self.questions if own == name],
                }
                for name, task in self.tasks.items()
            },
        }


@dataclass(frozen=True)
class Answered:
    """What one model got in a benchmark.

    Attributes:
        scores: for each ``metric,filter`` the score of every question.
        harness: the harness's own figures with their standard errors, for each task.
        samples: what was answered, for each question.
        seconds: it took.
    """

    scores: dict[str, list[float]]
    harness: dict[str, dict[str, float]]
    samples: list[dict[str, Any]]
    seconds: float


def load_benchmarks(run: Run) -> list[LoadedBenchmark]:
    """Every benchmark of the config, its questions drawn, rehearsed without a model.

    Raises:
        ConfigError: a task is unknown, lacks its data, runs code that is not allowed, or has not what is
            asked of it.
        UserError: lm-evaluation-harness is not installed, or programs cannot be run here.
    """
    if not run.eval.benchmarks:
        return []
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UserError(
            "eval.benchmarks need lm-evaluation-harness: pip install 'halfbyte[bench]'"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    _hide_bars()
    manager = _task_manager([benchmark.task for benchmark in run.eval.benchmarks])
    return [_load(benchmark, manager, run) for benchmark in run.eval.benchmarks]


def ask(asked: LoadedBenchmark, model: nn.Module, tokenizer: Any, run: Run) -> Answered:
    """Ask a model that knows ``token_loss`` the questions of a benchmark.

    Raises:
        RunError: a question got no score, such as from a model that gives NaN.
    """
    from halfbyte.eval.harness_model import SharedPrefixLM

    training = model.training
    answers = SharedPrefixLM(pretrained=model, tokenizer=tokenizer, batch_size=run.eval.batch_size)
    start = time.perf_counter()
    found = _evaluate(asked.tasks, asked.questions, answers, run)
    model.train(training)
    told = _collect(asked.tasks, found, asked.questions, time.perf_counter() - start)
    if asked.metric not in told.scores:
        raise RunError(
            f"eval.benchmarks: {asked.settings.task}: {asked.metric} is no finite number for some of the"
            " questions, so that this model cannot be compared on it"
        )
    return told


def _task_manager(names: list[str]) -> Any:
    """The harness's index of the folders that mention these names; the whole takes it a minute to read."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    texts = {
        path: path.read_text(encoding="utf-8", errors="replace") for path in root.rglob("*.yaml")
    }
    folders: set[Path] = set()
    is_known = True
    for name in names:
        # As a task, a group or a tag, or in a list of them.
        line = rf"""^\s*(?:-|["']?(?:task|group|tag)["']?:)\s*["']?{re.escape(name)}["']?\s*$"""
        mentions = re.compile(line, re.M)
        found = {
            path.relative_to(root).parts[0] for path, text in texts.items() if mentions.search(text)
        }
        folders |= {root / part for part in found}
        is_known &= bool(found)
    quick = lm_eval.tasks.TaskManager(include_path=sorted(folders), include_defaults=False)
    if not is_known or all(_is_whole(quick, name) for name in names):
        return quick
    return lm_eval.tasks.TaskManager()


def _is_whole(manager: Any, name: str) -> bool:
    """Whether a name and all that belongs to it are in the index."""
    entry = manager.task_index.get(name)
    return entry is not None and all(_is_whole(manager, child) for child in _children(entry))


def _children(entry: Any) -> list[str]:
    """Names that a group or a tag stands for."""
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    return list(_named((entry.cfg or {}).get("task"))) if entry.kind.name == "GROUP" else []


def _named(part: Any) -> Iterator[str]:
    """Task names of a group's list, in which groups may stand written out."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, dict):
        yield from _named(part.get("task"))
    elif isinstance(part, list):
        for inner in part:
            yield from _named(inner)


def _leaves(manager: Any, name: str) -> Iterator[Any]:
    """The index's entries of the tasks that belong to a name."""
    entry = manager.task_index[name]
    children = _children(entry)
    if not children:
        yield entry
    for child in children:
        yield from _leaves(manager, child)


def _load(benchmark: Benchmark, manager: Any, run: Run) -> LoadedBenchmark:
    where = f"eval.benchmarks: {benchmark.task}"
    if not _is_whole(manager, benchmark.task):
        raise ConfigError(
            [f"{where}: lm-evaluation-harness has no such task; its list: lm-eval ls tasks"]
        )
    leaves = list(_leaves(manager, benchmark.task))
    if any("score" in (leaf.yaml_path or Path()).parts for leaf in leaves):
        raise ConfigError(
            [
                f"{where}: reads answers by sympy's parser, which runs them as Python; take another task"
            ]
        )
    if any((leaf.cfg or {}).get("unsafe_code") for leaf in leaves) and not run.eval.run_code:
        raise ConfigError(
            [f"{where}: runs programs that the model writes; allow it with eval.run_code=true"]
        )
    data = Path(run.eval.benchmark_data) if run.eval.benchmark_data else None
    if data is not None:
        paths = [(leaf.cfg or {}).get("dataset_path") for leaf in leaves]
        needed = {str(path) for path in paths if path}
        lacking = sorted(name for name in needed if not (data / name).is_dir())
        if lacking:
            raise ConfigError(
                [f"{where}: eval.benchmark_data has no {', '.join(lacking)} in {data}"]
            )
    try:
        with contextlib.chdir(data or Path.cwd()), sandboxed_code():
            tasks: dict[str, Any] = dict(manager.load([benchmark.task])["tasks"])
    except UserError:
        raise
    except Exception as error:  # the Hub's, a dataset's, a missing package's: each has its own
        raise ConfigError([f"{where}: cannot be loaded: {last_line(str(error))}"]) from error
    for task in tasks.values():
        if not is_held(task):
            raise ConfigError(
                [
                    f"{where}: runs programs by means of its own, which nothing holds; it cannot be asked"
                ]
            )
        _configure(task, benchmark, where)
    questions = _draw(tasks, benchmark, run.seed)
    tasks = {name: task for name, task in tasks.items() if name in {own for own, _ in questions}}
    metric, higher = _rehearse(tasks, questions, benchmark, run)
    return LoadedBenchmark(benchmark, tasks, questions, metric, higher)


def _configure(task: Any, benchmark: Benchmark, where: str) -> None:
    """Settings of the config on a task, as the harness's command line sets them."""
    own = task.config.num_fewshot
    if benchmark.fewshot is not None and own == 0 and benchmark.fewshot != 0:
        raise ConfigError(
            [f"{where}: fewshot has no effect: the task itself asks without examples"]
        )
    if benchmark.fewshot is not None or own is None:
        task.set_config(key="num_fewshot", value=benchmark.fewshot or 0)
    if benchmark.max_new_tokens is None:
        return
    if task.config.output_type != "generate_until":
        raise ConfigError([f"{where}: max_new_tokens has no effect: the task generates nothing"])
    limit = {"max_gen_toks": benchmark.max_new_tokens}
    task.set_config(key="generation_kwargs", value=limit, update=True)


def _draw(tasks: dict[str, Any], benchmark: Benchmark, seed: int) -> list[Question]:
    """A seeded sample over all tasks of a benchmark, in the harness's order."""
    every = [(name, i) for name, task in tasks.items() for i in range(len(task.eval_docs))]
    if benchmark.limit is None or benchmark.limit >= len(every):
        return every
    chosen = random.Random(f"{seed} {benchmark.task}").sample(range(len(every)), benchmark.limit)
    return [every[i] for i in sorted(chosen)]


def _rehearse(
    tasks: dict[str, Any], questions: list[Question], benchmark: Benchmark, run: Run
) -> tuple[str, bool]:
    """Ask a dummy the first question of each task; returns the metric that decides, and its direction."""
    from lm_eval.models.dummy import DummyLM

    firsts = [next(question for question in questions if question[0] == name) for name in tasks]
    found = _evaluate(tasks, firsts, DummyLM(), run, chat=False)
    scores = _collect(tasks, found, firsts, 0).scores
    where = f"eval.benchmarks: {benchmark.task}"
    if not scores:
        raise ConfigError(
            [f"{where}: has no metric that scores every question by itself, in all of its tasks"]
        )
    metric = next(
        (
            name
            for name in scores
            if benchmark.metric
            in (None, name, name.rpartition(",")[0])  # with its filter or without
        ),
        None,
    )
    if metric is None:
        raise ConfigError([f"{where}: metric {benchmark.metric!r}; there are: {'; '.join(scores)}"])
    directions = next(iter(tasks.values())).higher_is_better()
    # A function that gives several metrics, as pass@k, is known by its own name alone.
    default = next(iter(directions.values()), True)
    return metric, bool(directions.get(metric.rpartition(",")[0], default))


def _hide_bars() -> None:
    """The harness draws a bar for each subject of a group, with no setting against it."""
    import lm_eval.api.task as api
    import lm_eval.models.dummy as rehearsed

    api.tqdm = rehearsed.tqdm = lambda items, **_: items


def _evaluate(
    tasks: dict[str, Any],
    questions: list[Question],
    model: Any,
    run: Run,
    *,
    chat: bool | None = None,
) -> dict[str, Any]:
    """The harness's own evaluation of these questions, seeded as its command line."""
    from lm_eval.evaluator import evaluate

    chat = run.eval.benchmark_chat if chat is None else chat
    random.seed(RANDOM_SEED)
    np.random.seed(NUMPY_SEED)
    torch.manual_seed(TORCH_SEED)
    for task in tasks.values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    samples = {name: [number for own, number in questions if own == name] for name in tasks}
    found: dict[str, Any] = evaluate(
        lm=model,
        task_dict={"tasks": tasks},
        samples=samples,
        bootstrap_iters=BOOTSTRAP,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        confirm_run_unsafe_code=run.eval.run_code,
    )
    return found


def _collect(
    tasks: dict[str, Any], found: dict[str, Any], questions: list[Question], seconds: float
) -> Answered:
    """Scores of each question from the harness's samples.

    Only of metrics that are the mean of them: others (perplexity, F1 of a corpus) keep for a question what
    is no score of it.
    """
    from lm_eval.utils import handle_non_serializable

    values: dict[str, dict[Question, float]] = {}
    samples: dict[Question, dict[str, Any]] = {}
    for name, told in found["samples"].items():
        for sample in told:
            question = (name, int(sample["doc_id"]))
            kept = {"task": name, "doc_id": question[1], "target": sample["target"]}
            kept["answers"] = sample["resps"]
            plain = json.loads(json.dumps(kept, default=handle_non_serializable))
            samples[question] = _finite(plain)
            for metric in sample["metrics"]:
                if _is_mean(tasks[name], metric) and isinstance(
                    sample[metric], (bool, int, float, np.number)
                ):
                    number = float(sample[metric])
                    values.setdefault(f"{metric},{sample['filter']}", {})[question] = number
    scores = {
        metric: [own[question] for question in questions]
        for metric, own in values.items()
        if len(own) == len(questions) and all(map(math.isfinite, own.values()))
    }
    harness = {
        name: {key: float(value) for key, value in figures.items() if _is_figure(key, value)}
        for name, figures in found["results"].items()
    }
    return Answered(scores, harness, [samples[question] for question in questions], seconds)


def _is_mean(task: Any, metric: str) -> bool:
    """Whether a task's metric is the mean of its questions'."""
    known = task.aggregation()
    # A function that gives several metrics, as pass@k, is known by its own name alone.
    how = known.get(metric) or next(iter(known.values()), None)
    return getattr(how, "__name__", "") in ("mean", "nanmean")


def _finite(value: Any) -> Any:
    """JSON without NaN and infinity, which become words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return value


def _is_figure(key: str, value: Any) -> bool:
    return "," in key and isinstance(value, (int, float, np.number)) and math.isfinite(value)
