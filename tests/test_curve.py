"""The learning curve: growing shares of the rows, and where the trained model would cross the best opponent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeConfig
from toys import run_script

from halfbyte.eval import curve as curves
from halfbyte.eval.curve import as_markdown, power_law
from halfbyte.eval.report_record import Curve, Point
from halfbyte.run_dir import read_jsonl

SIZES = [500, 1000, 2000, 4000]


def scored(start: float, power: float) -> Any:
    """Return 0 and 1 of 5,000 rows at each size, whose errors follow a power law."""
    errors = start * np.array(SIZES, dtype=float) ** power
    draws = np.random.default_rng(0).random(5000)
    return np.array([(draws >= error).astype(float) for error in errors])


def test_a_power_law_is_fitted() -> None:
    errors = 3.0 * np.array(SIZES, dtype=float) ** -0.4
    start, slope = power_law(SIZES, 1 - errors)
    assert np.exp(start) == pytest.approx(3.0)
    assert slope == pytest.approx(-0.4)


def test_the_crossing_is_extrapolated_with_an_interval() -> None:
    ours, theirs = scored(12.0, -0.5), scored(1.1, -0.2)  # equal at (12 / 1.1) ** (1 / 0.3) rows
    at, low, high, share = curves._crossing(SIZES[:3], ours[:3], theirs[:3], 0.95)
    assert at is not None
    assert low is not None
    assert high is not None
    assert low < (12 / 1.1) ** (1 / 0.3) < high
    assert low < at < high
    assert share == 1.0


def test_what_does_not_approach_never_crosses() -> None:
    assert curves._crossing(SIZES, scored(2.0, -0.1), scored(1.0, -0.3), 0.95)[0] is None
    assert curves._crossing([9, 9], scored(2.0, -0.1)[:2], scored(1.0, -0.3)[:2], 0.95)[0] is None


def test_what_is_behind_has_not_crossed_yet() -> None:
    """Ahead in the middle and behind on all rows: the fitted errors are equal at about 128 rows."""

    def rows(*right: int) -> Any:
        return np.array([[1.0] * count + [0.0] * (100 - count) for count in right])

    ours, theirs = rows(50, 72, 82, 83), rows(60, 66, 74, 85)
    sizes = [100, 200, 400, 800]
    (start, slope), (other, slower) = (power_law(sizes, one.mean(axis=1)) for one in (ours, theirs))
    assert np.exp((other - start) / (slope - slower)) == pytest.approx(128, rel=0.01)
    assert curves._crossing(sizes, ours, theirs, 0.95)[0] is None


def points(ours: Sequence[float], theirs: Sequence[float]) -> list[Point]:
    pairs = zip(SIZES, ours, theirs, strict=True)
    return [
        Point(rows=n, scores={"adapter": {"value": a}, "nearest": {"value": b}})
        for n, a, b in pairs
    ]


def test_the_line_says_where_it_is_ahead_or_would_be() -> None:
    ahead = points([0.1, 0.5, 0.6, 0.7], [0.2, 0.3, 0.4, 0.5])
    line = curves._line(ahead, "adapter", "nearest", (None, None, None, 0.0))
    assert "ahead of nearest, the best opponent, from 1,000 rows on" in line
    behind = points([0.1] * 4, [0.2] * 4)
    line = curves._line(behind, "adapter", "nearest", (9000.0, 5000.0, 20000.0, 0.9))
    assert "about 9,000 rows [5,000, 20,000], in 90% of the resamples" in line
    assert "does not approach" in curves._line(
        behind, "adapter", "nearest", (None, None, None, 0.0)
    )


@pytest.mark.slow
def test_a_config_is_trained_on_growing_shares(
    make_config: MakeConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_script("train/curve.py", make_config(), "--fractions", "0.25", "1")
    small, whole = (tmp_path / "runs" / f"tiny-r{share}" for share in ("0.25", "1"))
    rows = [json.loads((run / "ledger.json").read_text()) for run in (small, whole)]
    assert [one["trained"] for one in rows] == [8, 32]
    assert rows[0]["dropped"] == {"beyond data.train_frac": 24}
    assert rows[0]["held_out"] == rows[1]["held_out"]
    few, all_rows = (
        {row["place"] for row in read_jsonl(run / "data" / "train.jsonl")} for run in (small, whole)
    )
    assert few < all_rows
    curve = Curve.read(whole / "eval" / "curve.json")
    assert [point.rows for point in curve.points] == [8, 32]
    assert curve.ours == "adapter"
    assert curve.best in ("majority", "nearest", "linear")
    assert curve.line in capfd.readouterr().out
    assert as_markdown(curve) == (whole / "eval" / "curve.md").read_text()
    page = (whole / "eval" / "report.html").read_text()
    assert f"Training rows: {curve.line}" in page.replace("&#39;", "'")


def test_one_share_is_no_curve(make_config: MakeConfig) -> None:
    with pytest.raises(SystemExit):
        run_script("train/curve.py", make_config(), "--fractions", "1")
