"""The comparison in W&B: what is recorded offline is read back, and the saved view shows keys that exist."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import wandb_history
from toys import run_script

from halfbyte.config import read_run_folder
from halfbyte.errors import UserError
from halfbyte.eval.dashboard import check_workspace, workspace
from halfbyte.run_dir import read_jsonl

VARIANTS = ("base-full", "adapter")


@pytest.fixture(scope="module")
def compared(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("tracked") / "run"
    shutil.copytree(trained_run, copy)
    shutil.rmtree(copy / "wandb", ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        names = ", ".join(VARIANTS)
        keys = [f"eval.variants=[{names}]", "eval.opponents=[]", "track.wandb=offline"]
        run_script("eval/compare.py", copy, *keys)
    return copy


def test_tables_and_the_page_are_recorded(compared: Path) -> None:
    rows = wandb_history.history(compared / "eval")
    logged = {key.split(".")[0] for row in rows for key in row}
    assert logged == {"variants", "rows", "report"}
    tables = {
        path.name.split("_")[0]: json.loads(path.read_text())
        for path in (compared / "eval").rglob("*.table.json")
    }
    assert set(tables) == {"variants", "rows"}
    assert [row[0] for row in tables["variants"]["data"]] == list(VARIANTS)
    answered = list(read_jsonl(compared / "eval" / "answers.jsonl"))
    assert len(tables["rows"]["data"]) == len(answered) == 8
    at = tables["rows"]["columns"].index("adapter")
    assert [row[at] for row in tables["rows"]["data"]] == [
        row["answers"]["adapter"] for row in answered
    ]
    (page,) = (compared / "eval" / "wandb").rglob("*.html")
    assert page.read_text() == (compared / "eval" / "report.html").read_text()


def test_the_view_has_panels_for_what_is_logged(trained_run: Path) -> None:
    view = workspace("entity", "project", list(VARIANTS), "exact_match")._to_model()
    text = view.model_dump_json(by_alias=True)
    logged = {key for row in read_jsonl(trained_run / "metrics.jsonl") for key in row}
    for key in ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_s", "memory_bytes"):
        assert key in logged
        assert f'"{key}"' in text
    memory = json.loads((trained_run / "manifest.json").read_text())["memory"]
    assert memory["predicted_peak_bytes"] > 0
    assert memory["probe"]["measured_bytes"]["peak"] > 0
    for key in ("predicted_peak_bytes", "probe.measured_bytes.peak"):
        assert f"memory.{key}" in text
    for variant in VARIANTS:
        assert f"{variant}.exact_match" in text


def test_a_view_offline_is_refused_before_anything_is_computed(trained_run: Path) -> None:
    run = read_run_folder(trained_run)
    with pytest.raises(UserError, match="needs W&B online"):
        check_workspace(run)
