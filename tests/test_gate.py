"""The gate of a comparison: requirements, their outcome by intervals, exit codes and JUnit."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from halfbyte.errors import ConfigError
from halfbyte.eval.gate import (
    MET,
    MISSED,
    TOO_FEW,
    as_junit,
    check_requirements,
    decide,
    read_requirements,
    worst,
)
from halfbyte.eval.intervals import mean_interval


def figure(value: float, low: float, high: float) -> dict[str, Any]:
    return {"value": value, "ci_low": low, "ci_high": high, "n": 200}


class FakeReport:
    """What the gate reads of a report."""

    run = "toy"
    metrics = ("exact_match",)

    def __init__(self, scores: dict[str, dict[str, Any]], **rest: Any) -> None:
        self.variants = [
            {"name": name, "exact_match": score, "held_out_loss_interval": score}
            for name, score in scores.items()
        ]
        self.differences = rest.get("differences", {})
        self.benchmarks = rest.get("benchmarks", [])


@pytest.mark.parametrize(
    "text", ["exact_match", "exact_match>0.5", "exact_match=>0.5", ">=0.5", "a>=b", "a>=1..2", ""]
)
def test_what_cannot_be_read_is_an_error_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read; allowed: METRIC"):
        read_requirements([text])


@pytest.mark.parametrize(
    "text", ["chrf>=0.5", "other.exact_match>=0.5", "gain.nobody>=0", "forgetting<=0.02"]
)
def test_what_a_comparison_will_not_have_is_an_error_before_it(text: str) -> None:
    with pytest.raises(ConfigError, match="will not have"):
        check_requirements(read_requirements([text]), ["exact_match"], ["adapter"], [])


def test_what_it_will_have_is_no_error() -> None:
    texts = ["exact_match>=0.5", "adapter.held_out_loss<=1", "gain>=0", "gain.base-full>=0"]
    texts += ["forgetting<=0.02", "forgetting.mmlu<=0.02"]
    check_requirements(
        read_requirements(texts), ["exact_match"], ["adapter", "base-full"], ["mmlu"]
    )


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("exact_match>=0.5", MET),
        ("exact_match>=0.6", TOO_FEW),
        ("exact_match>=0.8", MISSED),
        ("exact_match<=0.8", MET),
        ("exact_match<=0.6", TOO_FEW),
        ("exact_match<=0.5", MISSED),
        ("base-full.exact_match<=0.3", MET),
        ("gain>=0.2", TOO_FEW),
        ("gain.base-full>=0.2", MET),
        ("forgetting<=0.05", MET),
        ("forgetting<=0.01", TOO_FEW),
        ("forgetting<=-0.03", MISSED),
    ],
)
def test_the_whole_interval_decides(text: str, outcome: str) -> None:
    scores = {"base-full": figure(0.2, 0.1, 0.3), "adapter": figure(0.62, 0.52, 0.72)}
    gains = {"base-full": figure(0.4, 0.3, 0.5), "linear": figure(0.2, 0.1, 0.3)}
    kept = {"task": "mmlu", "differences": {"base-full": figure(0.0, -0.02, 0.02)}}
    report = FakeReport(scores, differences=gains, benchmarks=[kept])
    (decision,) = decide(report, read_requirements([text]))  # type: ignore[arg-type]
    assert decision.outcome == outcome
    assert decision.requirement.text in decision.as_text()


def test_one_that_is_missed_decides_over_one_that_is_not_known() -> None:
    report = FakeReport({"adapter": figure(0.62, 0.52, 0.72)})
    texts = ["exact_match>=0.5", "exact_match>=0.6", "exact_match>=0.9"]
    decisions = decide(report, read_requirements(texts))  # type: ignore[arg-type]
    assert [decision.outcome for decision in decisions] == [MET, TOO_FEW, MISSED]
    assert [worst(decisions[:n]) for n in (1, 2, 3)] == [MET, TOO_FEW, MISSED]
    suite = ElementTree.fromstring(as_junit("toy", decisions))
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("3", "1", "1")
    assert [[inner.tag for inner in case] for case in suite] == [[], ["error"], ["failure"]]


def test_of_400_comparisons_a_wrong_outcome_is_rare() -> None:
    """Acceptance: with 400 rows, a true pass is refused, and a true fail passed, in at most 5 % each."""
    rng = np.random.default_rng(0)
    bound = 0.5
    wrong = {"refused": 0, "passed": 0}
    requirements = read_requirements([f"exact_match>={bound}"])
    for number in range(400):
        truth = bound + (1 if number % 2 else -1) * rng.uniform(0.0, 0.1)
        scores = (rng.random(400) < truth).astype(float)
        estimate = mean_interval(scores.tolist(), 0.95, 400, number)
        interval = figure(estimate.value, estimate.ci_low, estimate.ci_high)
        (decision,) = decide(FakeReport({"adapter": interval}), requirements)  # type: ignore[arg-type]
        wrong["refused"] += truth >= bound and decision.outcome == MISSED
        wrong["passed"] += truth < bound and decision.outcome == MET
    assert wrong["refused"] <= 10
    assert wrong["passed"] <= 10
