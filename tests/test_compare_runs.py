"""Finished runs beside each other: common rows, paired, corrected, with the keys that differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from toys import edit_record, edit_settings, run_script

from halfbyte.errors import RunError
from halfbyte.eval.runs import as_markdown, compare_runs
from halfbyte.run_dir import RunDir, read_jsonl, write_jsonl


@pytest.fixture(scope="module")
def pair(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run and a copy whose answers are made better."""
    folder = tmp_path_factory.mktemp("pair")
    first, second = folder / "first", folder / "second=1"
    shutil.copytree(trained_run, first)
    run_script("eval/compare.py", first, "eval.variants=[base-full, adapter]")
    shutil.copytree(first, second)
    rows = list(read_jsonl(second / "eval" / "answers.jsonl"))
    for number, row in enumerate(rows):
        row["scores"]["adapter"]["exact_match"] = float(number < 7)
    write_jsonl(second / "eval" / "answers.jsonl", rows)
    edit_settings(second, "r: 4", "r: 8")
    return first, second


def test_runs_are_told_apart_on_common_rows(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = pair
    run_script("eval/compare.py", first, second, second, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "runs.json").read_text())
    assert (found["metric"], found["n"]) == ("exact_match", 8)
    own, better, again = found["runs"]
    assert "against_first" not in own
    assert better["exact_match"]["value"] == 7 / 8
    told = better["against_first"]
    assert told["value"] == pytest.approx(7 / 8 - own["exact_match"]["value"])
    assert told["verdict"] == "better"
    assert told["p_holm"] == again["against_first"]["p_holm"] == pytest.approx(2 * 2 / 2**7)
    text = (tmp_path / "out" / "runs.md").read_text()
    assert text.count("better") == 2
    assert found["settings"] == {"adapter.r": [4, 8, 8]}
    assert "| `adapter.r` | 4 | 8 | 8 |" in text


def test_runs_without_common_rows_or_reports_are_refused(
    pair: tuple[Path, Path], trained_run: Path, tmp_path: Path
) -> None:
    first, second = (RunDir(path) for path in pair)
    with pytest.raises(RunError, match="halfbyte compare"):
        compare_runs([first, RunDir(trained_run)])
    other = tmp_path / "other"
    shutil.copytree(pair[1], other)
    rows = list(read_jsonl(other / "eval" / "answers.jsonl"))
    write_jsonl(other / "eval" / "answers.jsonl", [{**row, "id": "else"} for row in rows])
    with pytest.raises(RunError, match="no row was answered by all runs"):
        compare_runs([first, RunDir(other)])
    edit_record(other / "eval" / "report.json", metric="chrf")
    with pytest.raises(RunError, match="only be compared by one metric"):
        compare_runs([first, second, RunDir(other)])


def test_half_the_rows_are_compared_where_half_are_common(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(pair[1], other)
    rows = list(read_jsonl(other / "eval" / "answers.jsonl"))
    write_jsonl(other / "eval" / "answers.jsonl", rows[:4])
    found = compare_runs([RunDir(pair[0]), RunDir(other)])
    assert found["n"] == 4
    assert found["runs"][1]["exact_match"]["value"] == 1
    assert "4 rows, answered by all runs" in as_markdown(found)


def test_keys_with_several_runs_are_refused(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_script("eval/compare.py", *pair, "eval.rows=3")
    assert "no keys, no --workspace" in capsys.readouterr().err
