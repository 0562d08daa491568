"""Owns uncertainty: confidence intervals for a variant's score and for the paired difference of two."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from halfbyte.errors import RunError

Scores = npt.NDArray[np.float64]

GAIN, NO_GAIN, LOSS = "gain", "no gain", "loss"
POWER = 0.8  # share of comparisons that should find a difference, for counts of rows


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` rows with its confidence interval."""

    value: float
    ci_low: float
    ci_high: float
    n: int

    def as_json(self) -> dict[str, float | int]:
        """Return the estimate as it is written to report.json."""
        return asdict(self)


def mean_interval(scores: list[float], confidence: float, resamples: int, seed: int) -> Estimate:
    """Return the mean of the rows' scores with a confidence interval.

    Scores of 0 and 1 get Wilson's interval, which stays valid at 0 of n and n of n; other scores get a BCa
    bootstrap interval (Efron 1987).
    """
    values = np.asarray(scores, dtype=np.float64)
    if np.isin(values, (0.0, 1.0)).all():
        interval = stats.binomtest(int(values.sum()), len(values)).proportion_ci(
            confidence_level=confidence, method="wilson"
        )
        return Estimate(
            float(values.mean()), float(interval.low), float(interval.high), len(values)
        )
    if np.ptp(values) == 0 and 0 <= values[0] <= 1:
        # Equal scores have no spread to resample: the interval leaves the room of n successes in n trials.
        value, share = float(values[0]), _agreement(len(values), confidence)
        return Estimate(value, value * share, 1 - (1 - value) * share, len(values))
    return _bootstrap(values, confidence, resamples, seed)


def paired_difference(
    ours: list[float], theirs: list[float], confidence: float, resamples: int, seed: int
) -> Estimate:
    """Return the mean of ours - theirs over the same rows, with a BCa bootstrap interval over rows."""
    assert len(ours) == len(theirs)
    values = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    return _bootstrap(values, confidence, resamples, seed)


@dataclass(frozen=True)
class Spread:
    """A mean difference of trainings, and where its uncertainty comes from.

    Attributes:
        estimate: the mean over rows and trainings.
        over_rows: standard error that other rows would give.
        over_trainings: standard error that other trainings would give.
        training_sd: standard deviation of the score of one training, in which the rows have no part.
    """

    estimate: Estimate
    over_rows: float
    over_trainings: float
    training_sd: float


def crossed_difference(ours: Scores, theirs: Scores, confidence: float) -> Spread:
    """Return by how much trainings are better than a model or than other trainings, on the same rows.

    Rows and trainings are both drawn from more of them (a crossed design with two random effects): the variance
    of the mean is that of the rows' means, plus that of the trainings' means, less what is in both. With few
    trainings a bootstrap of them is too narrow, so the interval is Student's, with Satterthwaite's (1946)
    degrees of freedom. Why trainings count: Bouthillier et al. 2021.

    Args:
        ours: scores, (trainings, rows), of two trainings at least.
        theirs: as ``ours``; a single row of scores is taken as the only one of its kind.
        confidence: of the interval.

    Raises:
        RunError: there is one row alone.
    """
    num_rows = ours.shape[1]
    if num_rows < 2:
        raise RunError(
            "one row was answered by all trainings; two are needed to tell rows from trainings"
        )
    by_row = ours.mean(axis=0) - theirs.mean(axis=0)  # (rows,)
    parts = [(float(by_row.var(ddof=1)) / num_rows, num_rows - 1)]
    twice, spread = 0.0, []
    for scores in (ours, theirs):
        count = len(scores)
        if count < 2:
            continue
        means = scores.mean(axis=1)  # (trainings,)
        rest = scores - means[:, None] - scores.mean(axis=0) + scores.mean()
        residual = float((rest**2).sum()) / ((count - 1) * (num_rows - 1))
        parts.append((float(means.var(ddof=1)) / count, count - 1))
        twice += residual / (count * num_rows)
        spread.append(max(0.0, float(means.var(ddof=1)) - residual / num_rows))
    (rows, _), *trainings = parts
    over_trainings = sum(variance for variance, _ in trainings)
    variance = max(rows + over_trainings - twice, rows, over_trainings)
    weight = sum(one**2 / freedom for one, freedom in parts)
    value = float(by_row.mean())
    reach = 0.0
    if variance > 0:
        freedom = max(1.0, variance**2 / weight)
        reach = float(stats.t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(variance)
    estimate = Estimate(value, value - reach, value + reach, num_rows)
    return Spread(estimate, math.sqrt(rows), math.sqrt(over_trainings), math.sqrt(max(spread)))


def ratio_interval(
    sums: list[float], counts: list[int], confidence: float, resamples: int, seed: int
) -> Estimate:
    """Return sum(sums) / sum(counts), such as a loss per token, with a BCa bootstrap interval over rows."""
    totals, weights = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    value = float(totals.sum() / weights.sum())
    if np.ptp(totals / weights) == 0:
        return Estimate(value, *_constant_interval(value, len(totals), confidence), len(totals))
    low, high = _resampled([totals, weights], _ratio, confidence, resamples, seed)
    return Estimate(value, low, high, len(totals))


def _ratio(totals: Scores, weights: Scores, axis: int = -1) -> Scores:
    """Divide the sum of totals by the sum of weights along an axis."""
    quotient: Scores = totals.sum(axis=axis) / weights.sum(axis=axis)
    return quotient


def p_value(ours: list[float], theirs: list[float], resamples: int, seed: int) -> float:
    """Return the chance of a mean paired difference at least this large, either way, if both were equal.

    Where every row is right or wrong, this is McNemar's exact test: the sign test on the rows that differ.
    Otherwise it is a permutation test that swaps the two answers of a row.
    """
    values = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    differing = values[values != 0]
    if len(differing) < 2:  # one row that is swapped differs as much
        return 1.0
    if np.isin(differing, (-1.0, 1.0)).all():
        return float(stats.binomtest(int((differing > 0).sum()), len(differing)).pvalue)
    result = stats.permutation_test(
        (differing,),
        np.mean,
        permutation_type="samples",
        n_resamples=resamples,
        vectorized=True,
        batch=256,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def holm(p_values: list[float]) -> list[float]:
    """Correct p-values for their number (Holm 1979), which bounds the chance of any false positive."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def rows_needed(ours: list[float], theirs: list[float], confidence: float) -> int | None:
    """Return how many rows would show a difference as large as this one in ``POWER`` of such comparisons.

    This is ((z of the confidence level + z of the power)·s / d)² for a mean difference d with standard
    deviation s over rows, or None if there is no difference.
    """
    mean, spread = _moments(ours, theirs)
    if mean == 0:
        return None
    return max(2, math.ceil((_z_sum(confidence) * spread / mean) ** 2))


def smallest_shown(ours: list[float], theirs: list[float], confidence: float) -> float | None:
    """Return the mean difference that this many rows, with this spread, show in ``POWER`` of comparisons.

    The result is None where all rows have the same difference, which does not tell their spread.
    """
    _, spread = _moments(ours, theirs)
    return _z_sum(confidence) * spread / math.sqrt(len(ours)) if spread else None


def _z_sum(confidence: float) -> float:
    """Return z of the confidence level plus z of the power."""
    return float(stats.norm.ppf((1 + confidence) / 2) + stats.norm.ppf(POWER))


def _moments(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """Return mean and standard deviation of the rows' differences."""
    values = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0


def evidence(
    ours: list[float], theirs: list[float], confidence: float, resamples: int, seed: int
) -> dict[str, Any]:
    """Return a difference's p-value, the smallest difference these rows show, and the rows it needs."""
    return {
        "p_value": p_value(ours, theirs, resamples, seed),
        "smallest_shown": smallest_shown(ours, theirs, confidence),
        "rows_needed": rows_needed(ours, theirs, confidence),
    }


def judge_together(
    differences: list[dict[str, Any]], confidence: float, better: str, worse: str, unknown: str
) -> list[dict[str, Any]]:
    """Add ``p_holm`` and a verdict in the given words to differences with ``value`` and ``p_value``."""
    corrected = holm([difference["p_value"] for difference in differences])
    judged = []
    for difference, p_holm in zip(differences, corrected, strict=True):
        verdict = unknown
        if p_holm < 1 - confidence:
            verdict = better if difference["value"] > 0 else worse
        judged.append({**difference, "p_holm": p_holm, "verdict": verdict})
    return judged


def judge(difference: Estimate, ours: list[float], theirs: list[float], confidence: float) -> str:
    """Return ``gain`` or ``loss`` if the interval excludes zero, else ``no gain``.

    Where every row is right or wrong, the exact sign test on the rows that differ (McNemar) must
    agree, because with few such rows a bootstrap interval is too narrow.
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


def _bootstrap(values: Scores, confidence: float, resamples: int, seed: int) -> Estimate:
    """Return the mean of values with a bootstrap interval."""
    mean = float(values.mean())
    if np.ptp(values) == 0:
        return Estimate(mean, *_constant_interval(mean, len(values), confidence), len(values))
    low, high = _resampled([values], np.mean, confidence, resamples, seed)
    return Estimate(mean, low, high, len(values))


def _resampled(
    data: list[Scores],
    statistic: Callable[..., Any],
    confidence: float,
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """Return the BCa interval of a statistic of rows, or the percentile interval where BCa gives none."""
    methods: tuple[Literal["BCa", "percentile"], ...] = ("BCa", "percentile")
    for method in methods:
        with warnings.catch_warnings():
            # BCa warns about degenerate jackknife values and returns NaN.
            warnings.simplefilter("ignore")
            interval = stats.bootstrap(
                data,
                statistic,
                paired=len(data) > 1,
                confidence_level=confidence,
                n_resamples=resamples,
                method=method,
                rng=np.random.default_rng(seed),
                batch=256,
            ).confidence_interval
        if np.isfinite([interval.low, interval.high]).all():
            break
    return float(interval.low), float(interval.high)


def _constant_interval(value: float, n: int, confidence: float) -> tuple[float, float]:
    """Return the interval of ``n`` equal values, which have no spread to resample.

    All n values agree in sign. If a share p of all rows agrees and the others are opposed, the mean is
    value·(2p - 1); Wilson's lower bound of p gives the other end of the interval, far away for few rows.
    """
    if value == 0:
        return 0.0, 0.0
    bound = value * (2 * _agreement(n, confidence) - 1)
    return min(value, bound), max(value, bound)


def _agreement(n: int, confidence: float) -> float:
    """Return Wilson's lower bound of a share of which ``n`` of ``n`` rows were seen to agree."""
    interval = stats.binomtest(n, n).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low)
