"""What training cost on general benchmarks: signs, corrections, and sentences that claim no more than the rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from halfbyte.config.evaluation import Benchmark, Eval
from halfbyte.eval.benchmarks import LoadedBenchmark
from halfbyte.eval.forgetting import benchmark_entries, forgetting_line
from halfbyte.eval.harness import BenchmarkResult


@dataclass
class Settings:
    """As much of a config as is read here."""

    eval: Eval = field(default_factory=lambda: Eval(resamples=400))
    seed: int = 0


@dataclass
class Entrant:
    """A variant with its results."""

    name: str
    benchmarks: dict[str, BenchmarkResult]


def asked(task: str, n: int, *, higher: bool = True) -> LoadedBenchmark:
    questions = [(task, number) for number in range(n)]
    return LoadedBenchmark(Benchmark(task=task), {}, questions, "acc,none", higher)


def entrant(name: str, **scores: list[float]) -> Entrant:
    return Entrant(
        name,
        {
            task: BenchmarkResult({"acc,none": values}, {}, [], 1.0)
            for task, values in scores.items()
        },
    )


def entries(benchmarks: list[LoadedBenchmark], *entrants: Entrant) -> list[dict[str, Any]]:
    run: Any = Settings()
    return benchmark_entries(run, benchmarks, entrants, entrants[-1])


def test_losses_and_gains_are_told_apart_and_the_rest_is_not_claimed() -> None:
    found = entries(
        [asked("math", 40), asked("law", 40), asked("art", 40), asked("same", 40)],
        entrant("base-full", math=[1.0] * 40, law=[0.0] * 40, art=[1.0, 0.0] * 20, same=[1.0] * 40),
        entrant(
            "adapter",
            math=[0.0] * 20 + [1.0] * 20,
            law=[1.0] * 30 + [0.0] * 10,
            art=[1.0, 1.0, 0.0, 0.0] * 10,
            same=[1.0] * 40,
        ),
    )
    verdicts = {entry["task"]: entry["differences"]["base-full"]["verdict"] for entry in found}
    assert verdicts == {
        "math": "forgets",
        "law": "better",
        "art": "no difference shown",
        "same": "no difference shown",
    }
    line = forgetting_line(found, "base-full")
    assert "forgets math (-0.500)" in line
    assert "better on law (+0.750)" in line
    assert "art (40 questions, enough to show a difference of 0." in line
    assert "same (40 questions, the same difference on each)" in line
    assert forgetting_line(found, "base-nf4") == ""


def test_where_less_is_better_a_rise_is_a_loss() -> None:
    (entry,) = entries(
        [asked("errors", 30, higher=False)],
        entrant("base-full", errors=[0.0] * 30),
        entrant("adapter", errors=[1.0] * 30),
    )
    assert entry["differences"]["base-full"]["value"] == -1
    assert entry["differences"]["base-full"]["verdict"] == "forgets"


def test_chances_are_corrected_for_the_number_of_benchmarks() -> None:
    weak = [0.0] * 6 + [1.0] * 34  # six of six differing questions lost: p = 1/32
    alone = entries(
        [asked("a", 40)], entrant("base-full", a=[1.0] * 40), entrant("adapter", a=weak)
    )
    assert alone[0]["differences"]["base-full"]["verdict"] == "forgets"
    names = ("a", "b", "c")
    several = entries(
        [asked(name, 40) for name in names],
        entrant("base-full", **{name: [1.0] * 40 for name in names}),
        entrant("adapter", a=weak, b=[1.0] * 40, c=[1.0] * 40),
    )
    told = several[0]["differences"]["base-full"]
    assert told["p_value"] == pytest.approx(1 / 32)
    assert told["p_holm"] == pytest.approx(3 / 32)
    assert told["verdict"] == "no difference shown"


def test_models_that_were_not_asked_are_left_out() -> None:
    (entry,) = entries(
        [asked("a", 4)],
        entrant("gguf-q8_0"),
        entrant("base-full", a=[1.0] * 4),
        entrant("adapter", a=[1.0, 1.0, 1.0, 0.0]),
    )
    assert set(entry["variants"]) == {"base-full", "adapter"}
    assert set(entry["differences"]) == {"base-full"}
