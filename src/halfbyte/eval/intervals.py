"""Owns uncertainty: intervals for a variant's score and for the paired difference of two."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

GAIN, NO_GAIN, LOSS = "gain", "no gain", "loss"
POWER = 0.8  # of the comparisons that would find a difference, where rows are counted


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval; ``n`` rows."""

    value: float
    ci_low: float
    ci_high: float
    n: int

    def as_json(self) -> dict[str, float | int]:
        """For report.json."""
        return asdict(self)


def mean_interval(scores: list[float], confidence: float, resamples: int, seed: int) -> Estimate:
    """Mean of row scores with an interval.

    Scores of 0 and 1 get Wilson's interval, which stays honest at 0 of n and n of n; others a BCa
    bootstrap (Efron 1987).
    """
    values = np.asarray(scores, dtype=np.float64)
    if np.isin(values, (0.0, 1.0)).all():
        found = stats.binomtest(int(values.sum()), len(values)).proportion_ci(
            confidence_level=confidence, method="wilson"
        )
        return Estimate(float(values.mean()), float(found.low), float(found.high), len(values))
    if np.ptp(values) == 0 and 0 <= values[0] <= 1:
        # Equal scores have no spread to resample: as far from 0 and 1 as n successes of n leave room.
        value, share = float(values[0]), _agreement(len(values), confidence)
        return Estimate(value, value * share, 1 - (1 - value) * share, len(values))
    return _bootstrap(values, confidence, resamples, seed)


def paired_difference(
    ours: list[float], theirs: list[float], confidence: float, resamples: int, seed: int
) -> Estimate:
    """Mean of ours - theirs over the same rows, with a BCa bootstrap interval over rows."""
    assert len(ours) == len(theirs)
    values = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    return _bootstrap(values, confidence, resamples, seed)


def ratio_interval(
    sums: list[float], counts: list[int], confidence: float, resamples: int, seed: int
) -> Estimate:
    """Sum of ``sums`` over sum of ``counts``, such as a loss per token, with a BCa interval over rows."""
    totals, weights = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    value = float(totals.sum() / weights.sum())
    if np.ptp(totals / weights) == 0:
        return Estimate(value, *_constant_interval(value, len(totals), confidence), len(totals))
    low, high = _resampled([totals, weights], _ratio, confidence, resamples, seed)
    return Estimate(value, low, high, len(totals))


def _ratio(
    totals: npt.NDArray[np.float64], weights: npt.NDArray[np.float64], axis: int = -1
) -> npt.NDArray[np.float64]:
    quotient: npt.NDArray[np.float64] = totals.sum(axis=axis) / weights.sum(axis=axis)
    return quotient


def p_value(ours: list[float], theirs: list[float], resamples: int, seed: int) -> float:
    """Chance of so large a mean difference of pairs, either way, if both were equally good.

    Where every row is right or wrong it is McNemar's exact test, the sign test on the rows that differ;
    else a permutation test that swaps the two answers of rows.
    """
    values = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    differing = values[values != 0]
    if not len(differing):
        return 1.0
    if np.isin(differing, (-1.0, 1.0)).all():
        return float(stats.binomtest(int((differing > 0).sum()), len(differing)).pvalue)
    found = stats.permutation_test(
        (differing,),
        np.mean,
        permutation_type="samples",
        n_resamples=resamples,
        vectorized=True,
        batch=256,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def holm(p_values: list[float]) -> list[float]:
    """P-values corrected for their number (Holm 1979): each at most its level with all of them together."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[at]))
        corrected[at] = highest
    return corrected


def rows_needed(ours: list[float], theirs: list[float], confidence: float) -> int | None:
    """Rows that would show a difference as large as this one, in ``POWER`` of such comparisons.

    ((z of the level + z of the power)·s / d)² for a mean difference d with standard deviation s of rows;
    None if there is no difference.
    """
    mean, spread = _moments(ours, theirs)
    if mean == 0:
        return None
    return max(2, math.ceil((_reach(confidence) * spread / mean) ** 2))


def smallest_shown(ours: list[float], theirs: list[float], confidence: float) -> float | None:
    """The mean difference that so many rows, so spread, would show in ``POWER`` of such comparisons.

    None where the rows do not differ, which says nothing of their spread.
    """
    _, spread = _moments(ours, theirs)
    return _reach(confidence) * spread / math.sqrt(len(ours)) if spread else None


def _reach(confidence: float) -> float:
    return float(stats.norm.ppf((1 + confidence) / 2) + stats.norm.ppf(POWER))


def _moments(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """Mean and standard deviation of the rows' differences."""
    values = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0


def evidence(
    ours: list[float], theirs: list[float], confidence: float, resamples: int, seed: int
) -> dict[str, Any]:
    """What so many rows show of a difference: its chance if there were none, and what they can show."""
    return {
        "p_value": p_value(ours, theirs, resamples, seed),
        "smallest_shown": smallest_shown(ours, theirs, confidence),
        "rows_needed": rows_needed(ours, theirs, confidence),
    }


def judge_together(
    found: list[dict[str, Any]], confidence: float, better: str, worse: str, unknown: str
) -> list[dict[str, Any]]:
    """Differences with ``value`` and ``p_value``, each with ``p_holm`` and its verdict in these words."""
    told = []
    for difference, chance in zip(found, holm([one["p_value"] for one in found]), strict=True):
        verdict = unknown
        if chance < 1 - confidence:
            verdict = better if difference["value"] > 0 else worse
        told.append({**difference, "p_holm": chance, "verdict": verdict})
    return told


def judge(difference: Estimate, ours: list[float], theirs: list[float], confidence: float) -> str:
    """``gain`` or ``loss`` if the interval leaves out zero, else ``no gain``.

    Where every row is right or wrong, the exact sign test on the rows that differ (McNemar) must
    agree: with few of them a bootstrap interval is too narrow.
    """
    values = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    differing = values[values != 0]
    if len(differing) and np.isin(differing, (-1.0, 1.0)).all():
        p_value = stats.binomtest(int((differing > 0).sum()), len(differing)).pvalue
        if p_value >= 1 - confidence:
            return NO_GAIN
    if difference.ci_low > 0:
        return GAIN
    return LOSS if difference.ci_high < 0 else NO_GAIN


def _bootstrap(
    values: npt.NDArray[np.float64], confidence: float, resamples: int, seed: int
) -> Estimate:
    mean = float(values.mean())
    if np.ptp(values) == 0:
        return Estimate(mean, *_constant_interval(mean, len(values), confidence), len(values))
    low, high = _resampled([values], np.mean, confidence, resamples, seed)
    return Estimate(mean, low, high, len(values))


def _resampled(
    data: list[npt.NDArray[np.float64]],
    statistic: Callable[..., Any],
    confidence: float,
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """BCa interval of a statistic of rows, or the percentile interval where BCa gives none."""
    methods: tuple[Literal["BCa", "percentile"], ...] = ("BCa", "percentile")
    for method in methods:
        with warnings.catch_warnings():
            # BCa warns on degenerate jackknife values and returns NaN.
            warnings.simplefilter("ignore")
            found = stats.bootstrap(
                data,
                statistic,
                paired=len(data) > 1,
                confidence_level=confidence,
                n_resamples=resamples,
                method=method,
                rng=np.random.default_rng(seed),
                batch=256,
            ).confidence_interval
        if np.isfinite([found.low, found.high]).all():
            break
    return float(found.low), float(found.high)


def _constant_interval(value: float, n: int, confidence: float) -> tuple[float, float]:
    """Interval of ``n`` equal values, which have no spread to resample.

    They are n agreements in sign of n: Wilson's lower bound on the share p of rows that agree, the
    others opposed, gives value·(2p - 1). Few rows say little.
    """
    if value == 0:
        return 0.0, 0.0
    bound = value * (2 * _agreement(n, confidence) - 1)
    return min(value, bound), max(value, bound)


def _agreement(n: int, confidence: float) -> float:
    """Wilson's lower bound of a share after ``n`` agreements of ``n``."""
    found = stats.binomtest(n, n).proportion_ci(confidence_level=confidence, method="wilson")
    return float(found.low)
