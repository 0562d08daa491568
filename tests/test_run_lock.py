"""One writer in a run folder, and no link that leads out of it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from toys import run_script

from halfbyte.errors import RunError
from halfbyte.run_lock import check_entries, only_writer

HOLD = """
import sys, time
from pathlib import Path
from halfbyte.run_lock import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds a run folder until it reads a line."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_by_name_until_the_first_has_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "mine"
    first = hold(folder)
    with (
        pytest.raises(RunError, match=rf"{folder}: process {first.pid} on .* writes here\. Wait"),
        only_writer(folder),
    ):
        pass
    with only_writer(tmp_path / "runs" / "other"):
        pass
    first.communicate("go\n")
    with only_writer(folder):
        pass
    assert capsys.readouterr().out == ""


def test_a_lock_of_a_killed_process_is_taken_over_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = hold(tmp_path / "mine")
    first.send_signal(signal.SIGKILL)
    first.wait()
    with only_writer(tmp_path / "mine"):
        told = capsys.readouterr().out
    assert f"taken over from process {first.pid} on " in told
    with only_writer(tmp_path / "mine"):
        pass
    assert capsys.readouterr().out == ""


def test_an_error_lets_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="mine"), only_writer(tmp_path / "run"):
            raise ValueError("mine")
    assert capsys.readouterr().out == ""


def test_only_the_main_process_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with only_writer(tmp_path / "run"):
        monkeypatch.setenv("RANK", "1")
        with only_writer(tmp_path / "run"):
            pass


@pytest.mark.parametrize(
    "where", ["checkpoints", ".merging-full", "adapter/x", "checkpoints/checkpoint-3"]
)
def test_a_link_out_of_the_folder_is_refused_and_one_within_is_not(
    tmp_path: Path, where: str
) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / "wandb" / "run-1").mkdir(parents=True)
    (folder / "wandb" / "latest").symlink_to("run-1")
    (folder / "wandb" / "run-1" / "debug.log").symlink_to(elsewhere)
    (folder / "data").symlink_to("wandb")
    check_entries(folder)
    path = folder / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(elsewhere)
    with pytest.raises(RunError, match=rf"{path}: is a link to {elsewhere}, out of the run folder"):
        check_entries(folder)


@pytest.mark.parametrize(
    "script", ["train/sft.py", "train/merge.py", "train/export.py", "eval/compare.py"]
)
def test_every_command_that_writes_is_refused_while_another_does(
    script: str, trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = trained_run / "run.yaml" if script == "train/sft.py" else trained_run
    options = ["--to", "adapter"] if script == "train/export.py" else []
    first = hold(trained_run)
    try:
        with pytest.raises(SystemExit):
            run_script(script, target, *options)
    finally:
        first.communicate("go\n")
    assert f"process {first.pid} on {os.uname().nodename}" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_said_before_anything_else(tmp_path: Path) -> None:
    """Also where the tests run as root, whom no permission stops."""
    (tmp_path / "runs").write_text("a file")
    with (
        pytest.raises(RunError, match=rf"{tmp_path}/runs: cannot be written: .*set runs_dir"),
        only_writer(tmp_path / "runs" / "mine"),
    ):
        pass


def test_a_place_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mounted cloud drives have none."""

    def fail(_: FileLock) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(FileLock, "acquire", fail)
    with only_writer(tmp_path / "mine"):
        pass
    assert "no lock can be had here ([Errno 37] no locks available)" in capsys.readouterr().out
