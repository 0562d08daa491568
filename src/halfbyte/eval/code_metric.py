"""Owns scoring the programs that models write for benchmarks: each runs in the sandbox or not at all."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from halfbyte.eval.sandbox import run_program

TIMEOUT_S = 3.0  # for one program, as in the harness


class SandboxedCode:
    """Replaces the metric ``code_eval``, which would run programs in unconfined child processes."""

    def compute(
        self, references: list[str], predictions: list[list[str]], k: list[int], **_: Any
    ) -> tuple[dict[str, float], dict[int, list[bool]]]:
        """Return pass@k: the chance that one of k answers passes its tests (Chen et al. 2021, equation 1)."""
        passed = {
            number: [
                run_program(f"{answer}\n{test}", timeout_s=TIMEOUT_S).end == "passed"
                for answer in answers
            ]
            for number, (test, answers) in enumerate(zip(references, predictions, strict=True))
        }
        rates = {
            f"pass@{size}": float(np.mean([_pass_at(size, results) for results in passed.values()]))
            for size in k
            if all(len(results) >= size for results in passed.values())
        }
        return rates, passed


def _pass_at(k: int, passed: list[bool]) -> float:
    """Estimate pass@k of one problem from whether each of its answers passed."""
    wrong = len(passed) - sum(passed)
    return 1 - math.comb(wrong, k) / math.comb(len(passed), k)


@contextlib.contextmanager
def sandboxed_code() -> Iterator[None]:
    """Give halfbyte's sandbox to tasks that load the metric ``code_eval`` from ``evaluate`` meanwhile."""
    import evaluate

    load_original = evaluate.load

    def load(path: str, *arguments: Any, **options: Any) -> Any:
        if path == "code_eval":
            return SandboxedCode()
        return load_original(path, *arguments, **options)

    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = load_original


def is_sandboxed(task: Any) -> bool:
    """Return whether a task runs no programs, or runs them only by the metric that replaces ``code_eval``.

    The metric that a function calls is a global of the function's module.
    """
    if not getattr(task, "UNSAFE_CODE", False):
        return True
    metrics = [entry["metric"] for entry in task.config.metric_list or ()]
    functions = [metric for metric in metrics if callable(metric)]
    return bool(functions) and all(
        any(isinstance(value, SandboxedCode) for value in function.__globals__.values())
        for function in functions
    )
