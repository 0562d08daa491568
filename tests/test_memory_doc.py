"""docs/memory.md and its Arabic twin: every figure is what the command beside it prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.plan import catalogue, devices

ROOT = Path(__file__).resolve().parents[1]
ENGLISH, ARABIC = ROOT / "docs" / "memory.md", ROOT / "docs" / "memory.ar.md"
BLOCK = re.compile(r"```console\n\$ ([^\n]*)\n(.*?)\n```", re.DOTALL)


def blocks(path: Path) -> list[tuple[str, str]]:
    """Commands of a page with what they print."""
    return BLOCK.findall(path.read_text(encoding="utf-8"))


def test_tables_are_those_of_the_modules() -> None:
    text = ENGLISH.read_text(encoding="utf-8")
    assert catalogue.as_markdown() in text
    assert devices.as_markdown() in text


def test_grid_is_the_benchmark_s_result() -> None:
    grid = (ROOT / "benchmarks" / "results" / "memory_grid_cpu_fp32.md").read_text()
    assert grid.count("\n| ") >= 24
    assert grid in ENGLISH.read_text(encoding="utf-8")
    median, worst = map(float, re.findall(r"(?:median error|worst) ([\d.]+)%", grid))
    assert median <= 3
    assert worst <= 8


def test_the_arabic_page_has_the_same_commands_and_figures() -> None:
    assert len(blocks(ENGLISH)) >= 10
    assert blocks(ARABIC) == blocks(ENGLISH)


@pytest.mark.slow
def test_every_block_is_what_its_command_prints() -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command, printed in blocks(ENGLISH):
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=ROOT,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
        )
        assert done.stdout.rstrip("\n") == printed, (command, done.stderr)
