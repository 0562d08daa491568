"""Owns standard benchmarks: each found, configured, drawn from and rehearsed before a model is loaded, then asked."""

from __future__ import annotations

import contextlib
import logging
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from halfbyte.config import Run
from halfbyte.config.evaluation import Benchmark
from halfbyte.errors import ConfigError, RunError, UserError, last_line
from halfbyte.eval.code_metric import is_sandboxed, sandboxed_code
from halfbyte.eval.harness import (
    BenchmarkResult,
    Question,
    collect_scores,
    evaluate_tasks,
)
from halfbyte.libraries import hide_harness_bars


@dataclass(frozen=True)
class LoadedBenchmark:
    """A benchmark that is ready to run.

    Attributes:
        settings: the benchmark's entry in the config.
        tasks: the harness's tasks by name; a group has several.
        questions: the drawn questions, in the order of their scores.
        metric: the deciding metric, as ``metric,filter``.
        higher_is_better: whether a higher value of it is better.
    """

    settings: Benchmark
    tasks: dict[str, Any]
    questions: list[Question]
    metric: str
    higher_is_better: bool

    def as_json(self, run: Run) -> dict[str, Any]:
        """Describe the benchmark for the report, with all that is needed to repeat it."""
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
                    "questions": [
                        n for question_task, n in self.questions if question_task == name
                    ],
                }
                for name, task in self.tasks.items()
            },
        }


def load_benchmarks(run: Run) -> list[LoadedBenchmark]:
    """Load every benchmark of the config, draw its questions and rehearse it without a model.

    Raises:
        ConfigError: a task is unknown, lacks its data, runs code that is not allowed, or does not support a
            setting.
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
    hide_harness_bars()
    manager = _task_manager([benchmark.task for benchmark in run.eval.benchmarks])
    return [_load(benchmark, manager, run) for benchmark in run.eval.benchmarks]


def ask(benchmark: LoadedBenchmark, model: nn.Module, tokenizer: Any, run: Run) -> BenchmarkResult:
    """Ask a model that has ``token_loss`` the questions of a benchmark.

    Raises:
        RunError: a question got no score, for example because the model gave NaN.
    """
    from halfbyte.eval.harness_model import SharedPrefixLM

    training = model.training
    lm = SharedPrefixLM(pretrained=model, tokenizer=tokenizer, batch_size=run.eval.batch_size)
    start = time.perf_counter()
    results = evaluate_tasks(benchmark.tasks, benchmark.questions, lm, run)
    model.train(training)
    seconds = time.perf_counter() - start
    result = collect_scores(benchmark.tasks, results, benchmark.questions, seconds)
    if benchmark.metric not in result.scores:
        raise RunError(
            f"eval.benchmarks: {benchmark.settings.task}: {benchmark.metric} is not a finite number for some"
            " of the questions, so this model cannot be compared on it"
        )
    return result


def _task_manager(names: list[str]) -> Any:
    """Index only the harness's folders that mention these names; indexing all of them takes a minute."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    texts = {
        path: path.read_text(encoding="utf-8", errors="replace") for path in root.rglob("*.yaml")
    }
    folders: set[Path] = set()
    all_known = True
    for name in names:
        # The name as that of a task, a group or a tag, or in a list of them.
        line = rf"""^\s*(?:-|["']?(?:task|group|tag)["']?:)\s*["']?{re.escape(name)}["']?\s*$"""
        mentions = re.compile(line, re.M)
        matching = {
            path.relative_to(root).parts[0] for path, text in texts.items() if mentions.search(text)
        }
        folders |= {root / folder for folder in matching}
        all_known &= bool(matching)
    manager = lm_eval.tasks.TaskManager(include_path=sorted(folders), include_defaults=False)
    if not all_known or all(_is_complete(manager, name) for name in names):
        return manager
    return lm_eval.tasks.TaskManager()


def _is_complete(manager: Any, name: str) -> bool:
    """Return whether the index has a name and everything that belongs to it."""
    entry = manager.task_index.get(name)
    return entry is not None and all(_is_complete(manager, child) for child in _children(entry))


def _children(entry: Any) -> list[str]:
    """Return the names that a group or a tag stands for."""
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    return list(_task_names((entry.cfg or {}).get("task"))) if entry.kind.name == "GROUP" else []


def _task_names(part: Any) -> Iterator[str]:
    """Yield the task names in a group's list, which may contain further groups inline."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, dict):
        yield from _task_names(part.get("task"))
    elif isinstance(part, list):
        for inner in part:
            yield from _task_names(inner)


def _leaves(manager: Any, name: str) -> Iterator[Any]:
    """Yield the index entries of the tasks that belong to a name."""
    entry = manager.task_index[name]
    children = _children(entry)
    if not children:
        yield entry
    for child in children:
        yield from _leaves(manager, child)


def _load(benchmark: Benchmark, manager: Any, run: Run) -> LoadedBenchmark:
    """Load one benchmark's tasks, refuse those that cannot be run safely, and draw its questions."""
    where = f"eval.benchmarks: {benchmark.task}"
    if not _is_complete(manager, benchmark.task):
        raise ConfigError(
            [f"{where}: lm-evaluation-harness has no such task; its list: lm-eval ls tasks"]
        )
    leaves = list(_leaves(manager, benchmark.task))
    if any("score" in (leaf.yaml_path or Path()).parts for leaf in leaves):
        raise ConfigError(
            [f"{where}: parses answers with sympy, which runs them as Python; use another task"]
        )
    if any((leaf.cfg or {}).get("unsafe_code") for leaf in leaves) and not run.eval.run_code:
        raise ConfigError(
            [f"{where}: runs programs that the model writes; allow it with eval.run_code=true"]
        )
    data = Path(run.eval.benchmark_data) if run.eval.benchmark_data else None
    if data is not None:
        paths = [(leaf.cfg or {}).get("dataset_path") for leaf in leaves]
        needed = {str(path) for path in paths if path}
        missing = sorted(name for name in needed if not (data / name).is_dir())
        if missing:
            raise ConfigError(
                [f"{where}: eval.benchmark_data has no {', '.join(missing)} in {data}"]
            )
    try:
        with contextlib.chdir(data or Path.cwd()), sandboxed_code():
            tasks: dict[str, Any] = dict(manager.load([benchmark.task])["tasks"])
    except UserError:
        raise
    except Exception as error:  # the Hub, a dataset and a missing package each raise their own kind
        raise ConfigError([f"{where}: cannot be loaded: {last_line(str(error))}"]) from error
    for task in tasks.values():
        if not is_sandboxed(task):
            raise ConfigError(
                [
                    f"{where}: runs programs in its own way, outside the sandbox, so it cannot be used"
                ]
            )
        _configure(task, benchmark, where)
    questions = _draw(tasks, benchmark, run.seed)
    tasks = {name: task for name, task in tasks.items() if name in {task for task, _ in questions}}
    metric, higher = _rehearse(tasks, questions, benchmark, run)
    return LoadedBenchmark(benchmark, tasks, questions, metric, higher)


def _configure(task: Any, benchmark: Benchmark, where: str) -> None:
    """Apply the config's settings to a task, as the harness's command line does."""
    task_fewshot = task.config.num_fewshot
    if benchmark.fewshot is not None and task_fewshot == 0 and benchmark.fewshot != 0:
        raise ConfigError(
            [f"{where}: fewshot has no effect: the task itself asks without examples"]
        )
    if benchmark.fewshot is not None or task_fewshot is None:
        task.set_config(key="num_fewshot", value=benchmark.fewshot or 0)
    if benchmark.max_new_tokens is None:
        return
    if task.config.output_type != "generate_until":
        raise ConfigError([f"{where}: max_new_tokens has no effect: the task generates nothing"])
    limit = {"max_gen_toks": benchmark.max_new_tokens}
    task.set_config(key="generation_kwargs", value=limit, update=True)


def _draw(tasks: dict[str, Any], benchmark: Benchmark, seed: int) -> list[Question]:
    """Draw a seeded sample over all tasks of a benchmark, kept in the harness's order."""
    every = [(name, i) for name, task in tasks.items() for i in range(len(task.eval_docs))]
    if benchmark.limit is None or benchmark.limit >= len(every):
        return every
    chosen = random.Random(f"{seed} {benchmark.task}").sample(range(len(every)), benchmark.limit)
    return [every[i] for i in sorted(chosen)]


def _rehearse(
    tasks: dict[str, Any], questions: list[Question], benchmark: Benchmark, run: Run
) -> tuple[str, bool]:
    """Ask a dummy model the first question of each task; return the deciding metric and its direction."""
    from lm_eval.models.dummy import DummyLM

    firsts = [next(question for question in questions if question[0] == name) for name in tasks]
    results = evaluate_tasks(tasks, firsts, DummyLM(), run, chat=False)
    scores = collect_scores(tasks, results, firsts, 0).scores
    where = f"eval.benchmarks: {benchmark.task}"
    if not scores:
        raise ConfigError(
            [f"{where}: has no metric that scores each question separately in all of its tasks"]
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
    # A function that yields several metrics, such as pass@k, is listed under the function's name only.
    default = next(iter(directions.values()), True)
    return metric, bool(directions.get(metric.rpartition(",")[0], default))
