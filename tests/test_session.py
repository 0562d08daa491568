"""Opening a run folder: a new one, one to go on with, one that is refused."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest
from toys import make_manifest

from halfbyte.config import Run, load_run, read_run_folder
from halfbyte.config.read import keys_of
from halfbyte.errors import RunError
from halfbyte.run_dir import RunDir, write_text
from halfbyte.train import session as session_module
from halfbyte.train.checkpoints import commit, stage
from halfbyte.train.session import open_session
from halfbyte.train.settings import SILENT_DATA_KEYS, SILENT_TRAIN_KEYS

CONFIG = """\
runs_dir: runs
name: mine
model: {name: org/model}
data: {train: org/rows, test: org/held-out, date: 2026-01-02}
train: {learning_rate: 2e-4}
"""
SILENT_OVERRIDES = {
    "train.existing": "resume",
    "train.preflight_only": "false",
    "train.ignore_plan": "true",
    "train.micro_batch_size": "2",
    "train.checkpointing": "on",
    "train.num_samples": "5",
    "train.sample_tokens": "9",
    "train.log_steps": "7",
    "train.keep_checkpoints": "9",
    "train.save_steps": "3",
    "train.eval_steps": "4",
    "data.cache": "false",
}


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


def run_of(tmp_path: Path, *overrides: str) -> Run:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return load_run(path, list(overrides), {})


def make_checkpoint(folder: Path, step: int) -> Path:
    """A whole checkpoint, whose files hold nothing of use."""
    written = stage(folder) / f"checkpoint-{step}"
    written.mkdir()
    for name in ("optimizer.pt", "trainer_state.json", "training_args.bin"):
        (written / name).write_text(json.dumps({"global_step": step}), encoding="utf-8")
    commit(written, folder, 1)
    return folder / written.name


def test_open_session_makes_the_folder_with_the_config_when_it_is_new(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    session = open_session(run)

    assert session.folder.path == tmp_path / "runs" / "mine"
    assert (session.resume, session.resume_step, session.finished) == (None, 0, False)
    assert session.is_main
    assert read_run_folder(session.folder.path) == run


def test_resumed_run_keeps_the_day_on_which_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tomorrow(date):
        @classmethod
        def today(cls) -> Tomorrow:
            return cls(2031, 5, 6)

    began = open_session(run_of(tmp_path, "data.date=null")).run.data.date
    assert began == date.today()
    make_checkpoint(RunDir(tmp_path / "runs" / "mine").checkpoints, 5)
    monkeypatch.setattr(session_module, "date", Tomorrow)
    assert open_session(run_of(tmp_path, "data.date=null")).run.data.date == began
    with pytest.raises(RunError, match=r"data\.date was '.*', is '2030-01-02'"):
        open_session(run_of(tmp_path, "data.date=2030-01-02"))
    replaced = open_session(run_of(tmp_path, "data.date=null", "train.existing=replace"))
    assert replaced.run.data.date == date(2031, 5, 6)


def test_open_session_goes_on_from_the_newest_whole_checkpoint_when_the_run_stopped(
    tmp_path: Path,
) -> None:
    run = run_of(tmp_path)
    folder = open_session(run).folder
    whole = make_checkpoint(folder.checkpoints, 50)
    (make_checkpoint(folder.checkpoints, 100) / "optimizer.pt").unlink()
    session = open_session(run)

    assert session.resume == whole
    assert session.resume_step == 50
    assert not session.finished


@pytest.mark.parametrize(("manifest", "finished"), [({"finished": True}, True), ({}, False)])
def test_open_session_says_whether_the_run_is_finished(
    tmp_path: Path, manifest: dict[str, bool], finished: bool
) -> None:
    run = run_of(tmp_path)
    make_manifest(**manifest).write(open_session(run).folder.manifest)

    assert open_session(run).finished is finished


def test_open_session_is_refused_when_the_manifest_is_damaged(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    path = open_session(run).folder.manifest
    write_text(path, "{")

    with pytest.raises(RunError) as caught:
        open_session(run)
    assert str(caught.value).startswith(f"{path}: damaged JSON: ")


@pytest.mark.parametrize(
    ("override", "before", "now"),
    [
        ("seed=1", "0", "1"),
        ("train.learning_rate=0.5", "0.0002", "0.5"),
        ("train.max_steps=9", "None", "9"),
        ("model.precision=fp4", "'nf4'", "'fp4'"),
        ("model.name=org/other", "'org/model'", "'org/other'"),
        ("adapter.r=3", "16", "3"),
        ("adapter.targets=[q_proj]", "'all-linear'", "['q_proj']"),
        ("data.train=org/others", "'org/rows'", "'org/others'"),
        ("data.columns={prompt: q}", "{}", "{'prompt': 'q'}"),
        ("data.max_length=99", "1024", "99"),
    ],
)
def test_open_session_is_refused_with_key_and_both_values_when_a_setting_changed(
    tmp_path: Path, override: str, before: str, now: str
) -> None:
    folder = open_session(run_of(tmp_path)).folder
    make_checkpoint(folder.checkpoints, 5)
    written = folder.config.read_bytes()

    with pytest.raises(RunError) as caught:
        open_session(run_of(tmp_path, override))
    assert str(caught.value) == (
        f"{folder.path}: holds a run with other settings: {override.partition('=')[0]} was {before},"
        f" is {now}. Give this one another folder (name=…), or move the old one aside with"
        " train.existing=replace"
    )
    assert folder.config.read_bytes() == written


def test_open_session_names_every_key_when_several_settings_changed(tmp_path: Path) -> None:
    make_checkpoint(open_session(run_of(tmp_path)).folder.checkpoints, 5)

    with pytest.raises(RunError, match=r"seed was .*; adapter\.r was .*; train\.epochs was "):
        open_session(run_of(tmp_path, "seed=1", "adapter.r=3", "train.epochs=2"))


def test_open_session_begins_anew_with_other_settings_when_nothing_was_learnt_yet(
    tmp_path: Path,
) -> None:
    """The first attempt often fails on a typo in the data or the model."""
    open_session(run_of(tmp_path, "data.train=org/typo"))

    session = open_session(run_of(tmp_path, "data.train=org/rows"))
    assert session.resume is None
    assert "org/rows" in session.folder.config.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ([], (2, 7)),
        (["train.micro_batch_size=4"], (4, 7)),
        (["train.checkpointing=on"], (2, "on")),
        (["train.checkpointing=off"], (2, "off")),
    ],
)
def test_resumed_run_cuts_its_steps_as_before_where_auto_leaves_it_open(
    tmp_path: Path, overrides: list[str], wanted: tuple[int, str | int]
) -> None:
    folder = open_session(run_of(tmp_path)).folder
    make_checkpoint(folder.checkpoints, 5)
    memory = {"micro_batch_size": 2, "checkpointing": 7}
    make_manifest(memory=memory).write(folder.manifest)
    run = run_of(tmp_path, *overrides)
    train = open_session(run).run.train
    assert (train.micro_batch_size, train.checkpointing) == wanted


def test_run_is_refused_by_another_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(open_session(run_of(tmp_path)).folder.checkpoints, 5)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        RunError, match=r"written by 1 processes, and 4 are to go on.*--num_processes 1"
    ):
        open_session(run_of(tmp_path))


def test_new_run_leaves_auto_to_the_plan(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    assert open_session(run).run == run


def test_all_silent_keys_are_keys_of_their_section() -> None:
    silent = {"train": SILENT_TRAIN_KEYS, "data": SILENT_DATA_KEYS}
    for section, keys in silent.items():
        assert keys
        assert set(keys_of((section,))) >= keys
    named = {f"{section}.{key}" for section, keys in silent.items() for key in keys}
    assert set(SILENT_OVERRIDES) == named


@pytest.mark.parametrize(
    "override",
    [f"{key}={value}" for key, value in SILENT_OVERRIDES.items()]
    + ["eval.rows=9", "merge.dtype=fp32", "track.wandb=off"],
)
def test_open_session_goes_on_when_only_a_silent_setting_changed(
    tmp_path: Path, override: str
) -> None:
    folder = open_session(run_of(tmp_path)).folder
    checkpoint = make_checkpoint(folder.checkpoints, 5)
    changed = run_of(tmp_path, override)

    assert open_session(changed).resume == checkpoint
    assert read_run_folder(folder.path) == changed


def test_open_session_moves_the_old_folder_aside_when_asked_to_replace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = open_session(run_of(tmp_path)).folder
    make_checkpoint(folder.checkpoints, 5)
    make_manifest(finished=True).write(folder.manifest)
    replacing = run_of(tmp_path, "train.existing=replace", "train.learning_rate=0.5")
    session = open_session(replacing)

    (old,) = [path for path in folder.path.parent.iterdir() if path != folder.path]
    assert old.name.startswith("mine~20")
    assert capsys.readouterr().out == f"moved the earlier run to {old}\n"
    assert read_run_folder(old) == run_of(tmp_path)
    assert RunDir(old).manifest.is_file()
    assert (RunDir(old).checkpoints / "checkpoint-5" / "trainer_state.json").is_file()
    assert (session.resume, session.finished) == (None, False)
    assert [path.name for path in folder.path.iterdir()] == ["run.yaml"]
    kept = read_run_folder(folder.path)
    assert (kept.train.learning_rate, kept.train.existing) == (0.5, "resume")


def test_open_session_makes_the_folder_when_asked_to_replace_a_missing_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = open_session(run_of(tmp_path, "train.existing=replace"))

    assert session.folder.config.is_file()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("existing", ["resume", "replace"])
def test_open_session_touches_nothing_when_it_is_not_the_first_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: str
) -> None:
    folder = open_session(run_of(tmp_path)).folder
    before = folder.config.stat().st_mtime_ns, folder.config.stat().st_ino
    monkeypatch.setenv("RANK", "1")
    session = open_session(run_of(tmp_path, f"train.existing={existing}", "eval.rows=9"))

    assert not session.is_main
    assert (folder.config.stat().st_mtime_ns, folder.config.stat().st_ino) == before
    assert [path.name for path in folder.path.parent.iterdir()] == ["mine"]


def test_open_session_leaves_foreign_files_when_the_folder_holds_no_run(tmp_path: Path) -> None:
    write_text(tmp_path / "runs" / "mine" / "notes.txt", "precious")
    session = open_session(run_of(tmp_path, "train.existing=replace"))

    assert session.resume is None
    assert (session.folder.path / "notes.txt").read_text(encoding="utf-8") == "precious"
