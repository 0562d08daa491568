"""What precedes the first step: the list of it, the disk, a rehearsed checkpoint, and nothing kept."""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from conftest import MakeConfig
from toys import run_script, unfinish

from halfbyte.config import load_run, read_run_folder
from halfbyte.config.schema import Optimizer
from halfbyte.errors import RunError
from halfbyte.model.resolve import resolve_base
from halfbyte.run_dir import digests
from halfbyte.run_lock import check_entries
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
    before = digests(run)
    for override, opening in (
        ("train.existing=resume", f"{run} goes on from checkpoint-4, which is whole"),
        ("train.existing=replace", f"{run} holds an earlier run, which is moved aside"),
    ):
        capsys.readouterr()
        run_script("train/sft.py", config, "train.preflight_only=true", override)
        assert listed(capsys.readouterr().out)["folder"].startswith(opening)
        assert digests(run) == before
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
    monkeypatch.setattr(room, "_fallocate", lambda descriptor, size: errno.EDQUOT)
    with pytest.raises(SystemExit):
        run_script("train/sft.py", make_config(train=STEPS))
    captured = capsys.readouterr()
    assert "checkpoints and adapter need" in captured.err
    assert "(Disk quota exceeded; " in captured.err
    assert "before step 1" not in captured.out


def test_room_is_claimed_and_given_back(tmp_path: Path) -> None:
    room.claim(tmp_path, [1 << 20, 1 << 20])
    assert not list(tmp_path.iterdir())
    with pytest.raises(RunError, match=r"need [\d,]+ MB, and the disk does not take them"):
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


def test_a_folder_that_its_owner_protects_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_text("x")
    (tmp_path / "adapter" / "weights").chmod(0o444)
    (tmp_path / "adapter").chmod(0o555)
    check_entries(tmp_path)


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
def test_the_room_of_every_optimizer_is_known(
    optimizer: str, make_config: MakeConfig, tmp_path: Path, tiny_llama: Path
) -> None:
    setup: Any = SimpleNamespace(
        run=load_run(make_config(train={**STEPS, "optimizer": optimizer}), []),
        loaded=SimpleNamespace(base=resolve_base(str(tiny_llama)), model=torch.nn.Linear(4, 4)),
        model=torch.nn.Linear(4, 4),
        train=range(16),
    )
    assert "checkpoints and the adapter can be had" in room.make_sure_of_room(setup, tmp_path)


def test_no_more_checkpoints_than_will_come_need_room(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    run = load_run(make_config(train={**STEPS, "keep_checkpoints": 1000}), [])
    setup: Any = SimpleNamespace(run=run, train=range(16))
    assert room._num_checkpoints(setup, tmp_path, 0) == 3
    assert room._num_checkpoints(setup, tmp_path, 2) == 2
