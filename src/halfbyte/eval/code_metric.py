"""Owns the scoring of programs that models write for benchmarks: each runs in the sandbox, or not at all."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from halfbyte.eval.sandbox import run_program

TIMEOUT_S = 3.0  # of a program, as in the harness


class SandboxedCode:
    """Stands in for the metric ``code_eval``, which would run programs unbound in this process's children."""

    def compute(
        self, references: list[str], predictions: list[list[str]], k: list[int], **_: Any
    ) -> tuple[dict[str, float], dict[int, list[bool]]]:
        """Chance that at least one of k answers passes its tests (Chen et al. 2021, equation 1)."""
        passed = {
            number: [
                run_program(f"{answer}\n{test}", timeout_s=TIMEOUT_S).end == "passed"
                for answer in answers
            ]
            for number, (test, answers) in enumerate(zip(references, predictions, strict=True))
        }
        rates = {
            f"pass@{size}": float(np.mean([_pass_at(size, own) for own in passed.values()]))
            for size in k
            if all(len(own) >= size for own in passed.values())
        }
        return rates, passed


def _pass_at(k: int, passed: list[bool]) -> float:
    wrong = len(passed) - sum(passed)
    return 1 - math.comb(wrong, k) / math.comb(len(passed), k)


@contextlib.contextmanager
def sandboxed_code() -> Iterator[None]:
    """While tasks load, those that ask ``evaluate`` for ``code_eval`` are given halfbyte's sandbox."""
    import evaluate

    own = evaluate.load

    def load(path: str, *arguments: Any, **options: Any) -> Any:
        return SandboxedCode() if path == "code_eval" else own(path, *arguments, **options)

    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = own


def is_held(task: Any) -> bool:
    """Whether a task runs no programs, or by the metric that stands for ``code_eval`` alone.

    A function's own module holds the metric it calls.
    """
    if not getattr(task, "UNSAFE_CODE", False):
        return True
    metrics = [entry["metric"] for entry in task.config.metric_list or ()]
    functions = [metric for metric in metrics if callable(metric)]
    return bool(functions) and all(
        any(isinstance(value, SandboxedCode) for value in function.__globals__.values())
        for function in functions
    )
