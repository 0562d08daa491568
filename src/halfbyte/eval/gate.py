"""Owns the gate: requirements such as ``exact_match>=0.5``, decided on a report's intervals, for CI.

A requirement is met or missed only where the whole interval says so; else there are too few rows to tell. With
intervals of 95 %, a model that meets it is refused, and one that misses it passes, in at most one of forty
comparisons each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from halfbyte.errors import ConfigError
from halfbyte.eval.report_record import Report, estimate_of
from halfbyte.eval.variants import BASE_FULL, is_trained, trained_name

MET, MISSED, TOO_FEW = "met", "missed", "too few rows to tell"
EXIT_CODES = {MET: 0, MISSED: 3, TOO_FEW: 4}
GAIN, FORGETTING = "gain", "forgetting"
PATTERN = re.compile(
    r"\s*(?P<what>[\w.+-]+?)\s*(?P<sign>>=|<=)\s*(?P<bound>[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?)\s*"
)
ALLOWED = (
    "METRIC, VARIANT.METRIC, gain (over the strongest other variant), gain.VARIANT, forgetting (on the worst"
    " benchmark) or forgetting.TASK, then >= or <=, then a number"
)


@dataclass(frozen=True)
class Requirement:
    """What a model must reach.

    Attributes:
        text: as it was written.
        what: the figure.
        at_least: whether the bound is the least value, else the largest.
        bound: the value.
    """

    text: str
    what: str
    at_least: bool
    bound: float


@dataclass(frozen=True)
class Decision:
    """What a report says of a requirement; ``low`` and ``high`` are the ends of the interval.

    Attributes:
        requirement: that was decided.
        outcome: ``met``, ``missed`` or ``too few rows to tell``.
        subject: whose figure it is.
        value: the figure.
        low: lower end of its interval.
        high: upper end.
        n: rows that it rests on.
    """

    requirement: Requirement
    outcome: str
    subject: str
    value: float
    low: float
    high: float
    n: int

    def as_text(self) -> str:
        """Return the decision in one line."""
        return (
            f"{self.outcome}: {self.requirement.text}: {self.subject} is {self.value:.4g}"
            f" [{self.low:.4g}, {self.high:.4g}] on {self.n} rows"
        )

    def as_json(self) -> dict[str, Any]:
        """Return the decision for a program."""
        figures = {name: getattr(self, name) for name in ("outcome", "subject", "value", "n")}
        return {
            "require": self.requirement.text,
            **figures,
            "ci_low": self.low,
            "ci_high": self.high,
        }


def read_requirements(texts: Sequence[str]) -> list[Requirement]:
    """Read requirements.

    Raises:
        ConfigError: one cannot be read.
    """
    requirements, faults = [], []
    for text in texts:
        match = PATTERN.fullmatch(text)
        if match is None:
            faults.append(f"--require {text!r} cannot be read; allowed: {ALLOWED}")
            continue
        at_least, bound = match["sign"] == ">=", float(match["bound"])
        requirements.append(Requirement(text, match["what"], at_least, bound))
    if faults:
        raise ConfigError(faults)
    return requirements


def check_requirements(
    requirements: Sequence[Requirement],
    metrics: Sequence[str],
    variants: Sequence[str],
    tasks: Sequence[str],
) -> None:
    """Check, before anything is measured, that a comparison will have what is required.

    Raises:
        ConfigError: a metric, variant or benchmark will not be there.
    """
    known = {*metrics, "held_out_loss"}
    faults = []
    for requirement in requirements:
        subject, metric = _parts(requirement.what)
        has = {
            GAIN: not metric or metric in variants,
            FORGETTING: bool(tasks) and (not metric or metric in tasks),
        }.get(subject, metric in known and (not subject or subject in variants))
        if not has:
            faults.append(
                f"--require {requirement.text!r}: the comparison will not have {requirement.what}; metrics:"
                f" {', '.join(sorted(known))}; variants: {', '.join(variants)}; benchmarks (eval.benchmarks):"
                f" {', '.join(tasks) or 'none'}"
            )
    if faults:
        raise ConfigError(faults)


def decide(report: Report, requirements: Sequence[Requirement]) -> list[Decision]:
    """Decide requirements by the intervals of a report.

    Raises:
        ConfigError: the report does not have the figure.
    """
    return [_decide(report, requirement) for requirement in requirements]


def _decide(report: Report, requirement: Requirement) -> Decision:
    decisions = [
        Decision(requirement, _outcome(requirement, low, high), subject, value, low, high, n)
        for subject, value, low, high, n in _figures(report, requirement)
    ]
    if not decisions:
        raise ConfigError([f"--require {requirement.text!r}: the report has no {requirement.what}"])
    order = (MISSED, TOO_FEW, MET)
    sign = 1 if requirement.at_least else -1
    return min(decisions, key=lambda d: (order.index(d.outcome), sign * d.value))


def _outcome(requirement: Requirement, low: float, high: float) -> str:
    bound = requirement.bound
    if low >= bound if requirement.at_least else high <= bound:
        return MET
    if high < bound if requirement.at_least else low > bound:
        return MISSED
    return TOO_FEW


def _parts(what: str) -> tuple[str, str]:
    """Return variant and metric, or ``gain`` or ``forgetting`` and what it is held against."""
    for subject in (GAIN, FORGETTING):
        if what == subject or what.startswith(f"{subject}."):
            return subject, what[len(subject) + 1 :]
    variant, _, metric = what.rpartition(".")
    return variant, metric


def _figures(
    report: Report, requirement: Requirement
) -> list[tuple[str, float, float, float, int]]:
    """Return subject, value, ends of the interval and number of rows of each figure that must be so."""
    subject, other = _parts(requirement.what)
    if subject == GAIN:
        return [
            (f"gain over {name}", *_interval(entry))
            for name, entry in report.differences.items()
            if (other == name) or (not other and not is_trained(name))
        ]
    if subject == FORGETTING:
        losses = [
            (benchmark["task"], benchmark["differences"][BASE_FULL])
            for benchmark in report.benchmarks
            if BASE_FULL in benchmark["differences"] and other in ("", benchmark["task"])
        ]
        return [
            (f"forgetting on {task}", -value, -high, -low, n)
            for task, (value, low, high, n) in ((task, _interval(entry)) for task, entry in losses)
        ]
    by_name = {entry["name"]: entry for entry in report.variants}
    name = subject or trained_name(by_name)
    if name not in by_name or other not in {*report.metrics, "held_out_loss"}:
        return []
    return [(f"{name}'s {other}", *_interval(estimate_of(by_name[name], other)))]


def _interval(entry: dict[str, Any]) -> tuple[float, float, float, int]:
    return entry["value"], entry["ci_low"], entry["ci_high"], entry["n"]


def worst(decisions: Sequence[Decision]) -> str:
    """Return the outcome of all decisions together: missed, if one is, else undecided, if one is."""
    outcomes = {decision.outcome for decision in decisions}
    return next(outcome for outcome in (MISSED, TOO_FEW, MET) if outcome in outcomes)


def as_junit(run: str, decisions: Sequence[Decision]) -> str:
    """Return the decisions as JUnit's XML: a test for each, an error where there are too few rows."""
    counts = {outcome: sum(d.outcome == outcome for d in decisions) for outcome in EXIT_CODES}
    suite = ElementTree.Element(
        "testsuite",
        name=f"halfbyte compare {run}",
        tests=str(len(decisions)),
        failures=str(counts[MISSED]),
        errors=str(counts[TOO_FEW]),
    )
    for decision in decisions:
        case = ElementTree.SubElement(
            suite, "testcase", classname=run, name=decision.requirement.text
        )
        if decision.outcome != MET:
            tag = "failure" if decision.outcome == MISSED else "error"
            ElementTree.SubElement(case, tag, message=decision.as_text(), type=decision.outcome)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
