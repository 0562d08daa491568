"""The fault campaign, short: a few faults of each kind; `make chaos` tries many."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from chaos.farm import Ended
from chaos.outcome import evenly
from chaos.power import lay_out

TESTS = Path(__file__).resolve().parent


@pytest.mark.skipif(
    shutil.which("cc") is None or sys.platform != "linux", reason="preloads a library, made by cc"
)
def test_no_fault_is_lost(tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    command = [sys.executable, "-m", "chaos", "--only", "kills", "disks", "numerics"]
    command += ["--scale", "0.01", "--out", str(report)]
    environ = {key: value for key, value in os.environ.items() if "PYTEST" not in key}
    done = subprocess.run(command, cwd=TESTS, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    total = next(line for line in report.read_text().splitlines() if line.startswith("| all |"))
    tried, survived, lost = map(int, total.strip("| ").split(" | ")[1:])
    assert tried == survived >= 12
    assert lost == 0


def test_a_lost_fault_is_reported(tmp_path: Path) -> None:
    """The report can fail: a campaign whose cases are lost."""
    script = (
        "import sys; from pathlib import Path; from chaos import __main__ as m; from chaos.outcome import *;"
        "cases = [Case('k', 'good', lambda: ''), Case('k', 'bad', lambda: 'gone'), Case('k', 'odd', lambda: 1 / 0)];"
        f"print(m.as_markdown(m._try(cases, Path({str(tmp_path)!r}), 2), 60))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=TESTS, capture_output=True, text=True, check=True
    )
    assert "| k | 3 | 1 | 2 |" in done.stdout
    assert "- k, bad: gone" in done.stdout
    assert "- k, odd: the campaign itself failed: ZeroDivisionError" in done.stdout


def test_an_end_that_no_user_should_see_is_no_survival() -> None:
    assert Ended(None, 60.0, "").crash == "hung for 60 s"
    assert "ZeroDivisionError" in Ended(99, 1.0, "Traceback …\nZeroDivisionError: x").crash
    assert Ended(1, 1.0, "error: full").says("error: ") == ""
    assert "does not say" in Ended(1, 1.0, "error: full").says("Go on")


def test_cases_are_spread_evenly() -> None:
    assert evenly(528, 3) == [1, 265, 528]
    assert evenly(3, 10) == [1, 2, 3]
    assert evenly(9, 1) == [1]


def test_a_power_cut_keeps_what_was_flushed_and_nothing_else(tmp_path: Path) -> None:
    """The model of the disk itself, on files that were flushed, on some that were not, and on a rename."""
    root, kept = tmp_path / "root", tmp_path / "kept"
    kept.mkdir()
    (root / "sub").mkdir(parents=True)
    script = f"""
import os, sys
from pathlib import Path
from chaos.power import watch
root = Path({str(root)!r})
watch(root, Path({str(kept)!r}), 99)
def write(name, text, flush):
    with (root / name).open("w") as stream:
        stream.write(text); stream.flush()
        if flush: os.fsync(stream.fileno())
def flush(folder):
    handle = os.open(folder, os.O_RDONLY); os.fsync(handle); os.close(handle)
write("whole", "flushed", True); write("lazy", "12345678", False); write("sub/in", "x", True)
flush(root); flush(root / "sub")
write("late", "too late", True)
os.rename(root / "whole", root / "renamed")
os.unlink(root / "sub/in")
"""
    subprocess.run([sys.executable, "-c", script], cwd=TESTS, check=True)
    for mode, names, lazy in (
        ("dropped", {"whole", "lazy", "sub"}, ""),
        ("torn", {"whole", "lazy", "sub"}, "1234"),
        ("named", {"renamed", "lazy", "late", "sub"}, ""),
    ):
        copy = tmp_path / mode
        copy.mkdir()
        lay_out(root.stat().st_ino, root, copy, kept, mode)
        assert {path.name for path in copy.iterdir()} == names, mode
        assert (copy / "lazy").read_text() == lazy, mode
        assert (copy / ("renamed" if mode == "named" else "whole")).read_text() == "flushed"
