"""Several trainings of the same settings: their spread is told from that of the rows, and counts in the verdict."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeConfig
from toys import run_script

from halfbyte.config import read_run_folder
from halfbyte.errors import RunError
from halfbyte.eval.intervals import Scores, Spread, crossed_difference, judge, paired_difference
from halfbyte.eval.runs import compare_runs
from halfbyte.eval.seeds import over_seeds
from halfbyte.run_dir import RunDir, read_jsonl

NUM_ROWS, SEED_SD, STUDIES = 300, 0.03, 400


def trainings(rng: np.random.Generator, count: int, share: Scores) -> Scores:
    """Draw right and wrong answers of trainings whose true scores differ by chance alone."""
    shift = rng.normal(0, SEED_SD, count)[:, None]
    return (rng.random((count, len(share))) < np.clip(share + shift, 0, 1)).astype(float)


def studies(seed: int, count: int) -> list[tuple[Scores, Scores]]:
    """Draw comparisons of two equally good settings with so many trainings each."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(STUDIES):
        share = rng.beta(2, 2, NUM_ROWS)
        drawn.append((trainings(rng, count, share), trainings(rng, count, share)))
    return drawn


@pytest.mark.parametrize("count", [2, 3, 5])
def test_equally_good_trainings_give_a_gain_in_five_percent_at_most(count: int) -> None:
    pairs = studies(count, count)
    gains = [crossed_difference(*pair, 0.95).estimate.ci_low > 0 for pair in pairs]
    assert sum(gains) <= 0.05 * STUDIES
    # Against one model that is not trained, too.
    gains = [crossed_difference(a, b[:1] * 0 + 0.5, 0.95).estimate.ci_low > 0 for a, b in pairs]
    assert sum(gains) <= 0.05 * STUDIES


def test_the_verdict_of_single_trainings_finds_gains_that_are_none() -> None:
    verdicts: Counter[str] = Counter()
    for drawn in studies(1, 1):
        ours, theirs = (scores[0].tolist() for scores in drawn)
        difference = paired_difference(ours, theirs, 0.95, 200, 0)
        verdicts[judge(difference, ours, theirs, 0.95)] += 1
    assert verdicts["gain"] > 0.05 * STUDIES
    assert verdicts["gain"] + verdicts["loss"] > 0.15 * STUDIES  # as the report says of itself


def test_a_difference_of_trainings_is_found() -> None:
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(50):
        share = 0.5 * rng.beta(2, 2, NUM_ROWS)
        ours, theirs = trainings(rng, 3, share + 0.3), trainings(rng, 3, share)
        found += crossed_difference(ours, theirs, 0.95).estimate.ci_low > 0
    assert found >= 45


def test_the_spread_of_trainings_is_told_from_that_of_rows() -> None:
    rng = np.random.default_rng(0)
    share = np.full(4000, 0.5)
    none: Scores = np.zeros((1, 4000))
    spreads = []
    for _ in range(60):
        shift = rng.normal(0, 0.05, 8)[:, None]
        scores = (rng.random((8, 4000)) < share + shift).astype(float)
        spreads.append(crossed_difference(scores, none, 0.95).training_sd)
    assert np.mean(spreads) == pytest.approx(0.05, rel=0.15)
    alike = crossed_difference(np.tile(rng.random(4000) < 0.5, (3, 1)).astype(float), none, 0.95)
    assert alike.training_sd == alike.over_trainings == 0.0
    assert alike.over_rows == pytest.approx(0.5 / 4000**0.5, rel=0.05)


def test_equal_scores_have_no_spread() -> None:
    same = crossed_difference(np.ones((3, 9)), np.ones((1, 9)), 0.95)
    assert same == Spread(same.estimate, 0.0, 0.0, 0.0)
    assert (same.estimate.ci_low, same.estimate.ci_high) == (0.0, 0.0)


def test_one_row_cannot_tell_rows_from_trainings() -> None:
    with pytest.raises(RunError, match="one row"):
        crossed_difference(np.ones((3, 1)), np.ones((1, 1)), 0.95)


def test_a_run_beside_itself_is_no_second_training(trained_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained_run, copy)
    run_script("eval/compare.py", copy, "eval.variants=[adapter]", "eval.opponents=[nearest]")
    assert compare_runs([RunDir(copy), RunDir(copy)])["seeds"] == {}


def test_each_other_variant_gets_a_verdict() -> None:
    rng = np.random.default_rng(0)
    ours = trainings(rng, 3, np.full(200, 0.6))
    others = {"nearest": np.zeros(200), "linear": np.ones(200), "base": ours.mean(axis=0)}
    against = over_seeds(ours, others, 0.95)["against"]
    verdicts = {name: one["verdict"] for name, one in against.items()}
    assert verdicts == {"nearest": "gain", "linear": "loss", "base": "no gain"}


def test_a_config_is_trained_with_several_seeds_and_compared(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(train={"max_steps": 2})
    run_script("train/sft.py", config, "--seeds", "2")
    folders = sorted((tmp_path / "runs").glob("[!.]*"))
    assert [folder.name[-3:] for folder in folders] == ["-s1", "-s2"]
    runs = [read_run_folder(folder) for folder in folders]
    assert [run.train.seed for run in runs] == [0, 1]
    first, second = ([*read_jsonl(folder / "metrics.jsonl")] for folder in folders)
    assert [one["loss"] for one in first if "loss" in one] != [
        one["loss"] for one in second if "loss" in one
    ]
    tests = [(folder / "data" / "test.jsonl").read_text() for folder in folders]
    assert tests[0] == tests[1]
    run_script("eval/compare.py", *folders, "--out", tmp_path / "out")
    shown = capsys.readouterr().out
    assert "The runs differ in the seed alone" in shown
    seeds = json.loads((tmp_path / "out" / "runs.json").read_text())["seeds"]
    assert seeds["trainings"] == 2
    assert "base-full" in seeds["against"]
    assert "nearest" in seeds["against"]
    assert "adapter" not in seeds["against"]
