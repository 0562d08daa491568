"""What precedes the first step: the list of it, the disk, a rehearsed checkpoint, and nothing kept."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from toys import run_script, unfinish

from halfbyte.config import read_run_folder
from halfbyte.run_dir import digests
from halfbyte.train import room
from halfbyte.train.trainer import TokenTrainer

STEPS = {"max_steps": 4, "save_steps": 2}
LIST = ("config", "folder", "template", "rows", "plan", "base", "disk", "schedule", "W&B", "first step", "checkpoint")  # fmt: skip


def listed(text: str) -> dict[str, str]:
    lines = [line[4:] for line in text.splitlines() if line.startswith("ok  ")]
    return {line[:12].strip(): line[12:] for line in lines}


def test_preflight_lists_what_is_in_order_and_keeps_nothing(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(train=STEPS)
    run_script("train/sft.py", config, "train.preflight_only=true")
    found = listed(capsys.readouterr().out)
    assert tuple(found) == LIST
    assert found["folder"].startswith(f"{tmp_path / 'runs' / 'tiny'} is new")
    assert found["schedule"].startswith("4 steps of 4 rows")
    assert found["checkpoint"] == "written, read back and equal"
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {".locks"}

    run_script("train/sft.py", config)
    run = tmp_path / "runs" / "tiny"
    assert not read_run_folder(run).train.preflight_only
    assert not list((run / "checkpoints" / ".staged").iterdir())


def test_preflight_of_a_stopped_run_leaves_it_as_it_is(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(train={**STEPS, "max_steps": 5})
    run_script("train/sft.py", config)
    run = tmp_path / "runs" / "tiny"
    unfinish(run)
    shutil.rmtree(run / "checkpoints" / "checkpoint-5")
    before = digests(run / "checkpoints")
    for override, opening in (
        ("train.existing=resume", f"{run} goes on from checkpoint-4, which is whole"),
        ("train.existing=replace", f"{run} holds an earlier run, which is moved aside"),
    ):
        capsys.readouterr()
        run_script("train/sft.py", config, "train.preflight_only=true", override)
        assert listed(capsys.readouterr().out)["folder"].startswith(opening)
        assert digests(run / "checkpoints") == before
    assert [path.name for path in (tmp_path / "runs").glob("[!.]*")] == ["tiny"]


def test_what_goes_on_from_a_run_that_replaced_another_does_not_replace_it(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(train={**STEPS, "existing": "replace"})
    run_script("train/sft.py", config)
    run = tmp_path / "runs" / "tiny"
    adapter = digests(run / "adapter")
    run_script("train/sft.py", run / "run.yaml")
    assert digests(run / "adapter") == adapter
    assert [path.name for path in (tmp_path / "runs").glob("[!.]*")] == ["tiny"]


def test_a_disk_without_room_for_all_checkpoints_is_an_error_before_step_one(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SystemExit):
        run_script("train/sft.py", make_config(train=STEPS))
    captured = capsys.readouterr()
    assert "checkpoints and adapter need" in captured.err
    assert "(Disk quota exceeded; " in captured.err
    assert "before step 1" not in captured.out


def test_room_is_claimed_and_given_back(tmp_path: Path) -> None:
    room.claim(tmp_path, [1 << 20, 1 << 20])
    assert not list(tmp_path.iterdir())
    with pytest.raises(Exception, match=r"need [\d,]+ MB, and the disk does not take them"):
        room.claim(tmp_path, [1 << 60])


def test_a_checkpoint_that_differs_from_memory_is_an_error_before_step_one(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = TokenTrainer._save_checkpoint

    def other(self: TokenTrainer, *arguments: Any) -> None:
        weight = self.trained[0]
        with torch.no_grad():
            weight.add_(1)
            usual(self, *arguments)
            weight.sub_(1)

    monkeypatch.setattr(TokenTrainer, "_save_checkpoint", other)
    with pytest.raises(SystemExit):
        run_script("train/sft.py", make_config(train=STEPS))
    error = capsys.readouterr().err
    assert (
        "before step 1 is not what is read back: the saved adapter differs from memory in " in error
    )


@pytest.fixture
def immutable(tmp_path: Path) -> Iterator[Path]:
    """A run folder in which a file cannot be replaced, not even by root."""
    file = tmp_path / "runs" / "tiny" / "adapter" / "adapter_config.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    done = subprocess.run(["chattr", "+i", file], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no file can be made immutable here")
    yield file
    subprocess.run(["chattr", "-i", file], check=True)


def test_an_immutable_file_is_found_before_anything_else(
    make_config: MakeConfig, immutable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_script("train/sft.py", make_config(train=STEPS))
    captured = capsys.readouterr()
    assert f"{immutable}: cannot be replaced by this user" in captured.err
    assert not captured.out
