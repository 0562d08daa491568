"""Going on from a checkpoint with other settings: a folder of its own, its lineage, and nothing else changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import MakeConfig
from toys import run_script, write_config

from halfbyte.config import load_run
from halfbyte.errors import ConfigError
from halfbyte.run_dir import read_jsonl
from halfbyte.train.branch import Lineage
from halfbyte.train.checkpoints import SEAL

SETTINGS = {
    "train": {"max_steps": 6, "save_steps": 2, "log_steps": 1, "eval_steps": 0, "keep_checkpoints": 3},
    "adapter": {"dropout": 0.1},
    "track": {"wandb": "off"},
}  # fmt: skip


def steps(run: Path) -> list[tuple[int, float, float]]:
    records = read_jsonl(run / "metrics.jsonl")
    return [(r["step"], r["loss"], r["learning_rate"]) for r in records if "loss" in r]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A finished run, which tests leave as it is."""
    folder = tmp_path_factory.mktemp("branch")
    run_script("train/sft.py", write_config(folder, tiny_llama, **SETTINGS))
    return folder / "runs" / "tiny"


def test_same_settings_repeat_the_run_and_others_change_only_what_follows(run: Path) -> None:
    run_script("train/sft.py", run / "run.yaml", "train.resume_from=4", "name=same")
    assert steps(run.with_name("same")) == steps(run)

    run_script("train/sft.py", run / "run.yaml", "train.resume_from=4", "train.learning_rate=1e-3")
    branched, whole = steps(run.with_name("tiny-from-4")), steps(run)
    assert branched[:4] == whole[:4]
    assert branched[4][1] == whole[4][1]  # from the same weights
    assert branched[4][2] == pytest.approx(whole[4][2] / 10)  # at a tenth of the rate
    assert branched[5][1] != whole[5][1]

    lineage = Lineage.read(run.with_name("tiny-from-4") / "lineage.json")
    assert (lineage.run, lineage.step) == (str(run), 4)
    assert lineage.changed["train.learning_rate"] == (0.01, 0.001)


def test_the_new_run_needs_the_old_one_no_longer(run: Path) -> None:
    run_script("train/sft.py", run / "run.yaml", "train.resume_from=2", "name=new")
    new = run.with_name("new")
    run.rename(run.with_name("gone"))
    try:
        assert load_run(new / "run.yaml", []).name == "new"
        run_script("train/merge.py", new)
    finally:
        run.with_name("gone").rename(run)
    assert (new / "merged" / "merge_report.json").is_file()


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("adapter.r=8", "adapter.r was 4, is 8"),
        ("train.batch_size=8", "train.batch_size was 4, is 8"),
        ("seed=7", "seed was 0, is 7"),
        ("train.optimizer=sgd", "train.optimizer was 'adamw_torch_fused', is 'sgd'"),
    ],
)
def test_what_the_checkpoint_depends_on_is_refused(
    run: Path, override: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_script("train/sft.py", run / "run.yaml", "train.resume_from=4", override, "name=other")
    told = capsys.readouterr().err
    assert text in told
    assert "free to change are adapter.dropout, model.compute_dtype, train.checkpointing" in told


def test_a_damaged_checkpoint_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optimizer = run / "checkpoints" / "checkpoint-4" / "optimizer.pt"
    content = optimizer.read_bytes()
    optimizer.unlink()
    with pytest.raises(SystemExit):
        run_script("train/sft.py", run / "run.yaml", "train.resume_from=4", "name=damaged")
    optimizer.write_bytes(content)
    assert "checkpoint-4: optimizer.pt is missing. Choose another checkpoint" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [("5", "found there: checkpoint-2, checkpoint-4, checkpoint-6"), ("nowhere", "found there: none")],
)  # fmt: skip
def test_a_checkpoint_that_is_not_there_is_named_with_those_that_are(
    run: Path, value: str, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        load_run(run / "run.yaml", [f"train.resume_from={value}"])


def test_a_step_needs_the_config_of_a_run(make_config: MakeConfig) -> None:
    config: Any = make_config(train={"resume_from": 4})
    with pytest.raises(ConfigError, match=r"for a step the config is RUN/run\.yaml"):
        load_run(config, [])


def test_the_copied_checkpoint_is_the_one_that_was_sealed(run: Path) -> None:
    run_script(
        "train/sft.py", run / "run.yaml", "train.resume_from=4", "name=five", "train.max_steps=5"
    )
    place = Path("checkpoints") / "checkpoint-4" / SEAL
    assert (run.with_name("five") / place).read_bytes() == (run / place).read_bytes()
