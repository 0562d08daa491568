"""Faults of the machine are messages: what happened, what is whole on the disk, and the line that goes on."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.errors import RunError, exit_on_user_error
from halfbyte.faults import machine_fault, what_is_safe
from halfbyte.run_lock import only_writer


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "x", "/a/b"), "/a/b: the disk is full; make room"),
        (OSError(errno.EROFS, "x", "/a"), "/a: the file system is read-only"),
        (FileNotFoundError(errno.ENOENT, "x", "/a"), "/a: it has vanished"),
        (RuntimeError("[enforce fail] . open file failed with strerror: Permission denied"), "this user may not"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "could not be written whole"),
        (Exception("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (RuntimeError("Parent directory /a/b c does not exist."), "/a/b c: it has vanished"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "the system has killed"),
        (MemoryError("x"), "ran out of memory"),
        (RuntimeError("CUDA out of memory. Tried"), "ran out of memory"),
    ],
)  # fmt: skip
def test_what_libraries_say_becomes_words(error: Exception, text: str) -> None:
    assert text in machine_fault(error)


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("a"), OSError("no number")])
def test_a_bug_is_no_fault_of_the_machine(error: Exception) -> None:
    assert machine_fault(error) == ""


def test_a_fault_beneath_another_error_counts() -> None:
    error = ValueError("cannot write")
    error.__cause__ = OSError(errno.ENOSPC, "x")
    assert "the disk is full" in machine_fault(error)


def test_a_full_disk_in_a_run_ends_with_what_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    for step in (5, 10):
        checkpoint = folder / "checkpoints" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "checkpoint.json").touch()
    (folder / "checkpoints" / "checkpoint-20").mkdir()  # not complete

    def work() -> None:
        with only_writer(folder):
            raise OSError(errno.ENOSPC, "x", str(folder / "f"))

    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(work)
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: {folder}/f: the disk is full")
    assert f"whole in {folder}: checkpoint-10. Go on with: " in told


def test_nothing_whole_is_said(tmp_path: Path) -> None:
    assert what_is_safe(tmp_path).startswith(f"{tmp_path} holds nothing whole yet. Go on with: ")


def test_an_error_of_the_user_keeps_its_own_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        with only_writer(tmp_path / "run"):
            raise RunError("do this")

    with pytest.raises(SystemExit):
        exit_on_user_error(work)
    assert capsys.readouterr().err == "error: do this\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_ends_any_script_with_its_code_and_cleans_up(
    tmp_path: Path, number: signal.Signals
) -> None:
    script = f"""
import time
from pathlib import Path
from halfbyte.errors import exit_on_user_error
from halfbyte.run_lock import only_writer
def work():
    with only_writer(Path({str(tmp_path / "run")!r})):
        try:
            print("ready", flush=True); time.sleep(60)
        finally:
            Path({str(tmp_path / "cleaned")!r}).touch()
exit_on_user_error(work)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    os.kill(child.pid, number)
    _, told = child.communicate(timeout=30)
    assert child.returncode == 128 + number
    assert told.startswith(f"stopped: {number.name}\n")
    assert "Go on with: " in told
    assert (tmp_path / "cleaned").exists()
