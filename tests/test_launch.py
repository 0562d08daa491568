"""What the launcher was told: how many processes, how many threads; through the real ``accelerate launch``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(sys.executable).with_name("accelerate")
OPTIONS = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
SCRIPT = """\
import os

from halfbyte.errors import RunError
from halfbyte.launch import check_processes
from halfbyte.libraries import use_all_cores

use_all_cores()
print("threads:", os.environ["OMP_NUM_THREADS"])
try:
    check_processes()
except RunError as error:
    print(error)
"""


def launched(folder: Path, *options: str, **environ: str) -> str:
    script = folder / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [str(LAUNCH), "launch", "--cpu", *OPTIONS, *options, str(script)]
    done = subprocess.run(
        command, env={**own, **environ}, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_fewer_processes_than_wanted_and_threads_that_were_chosen_are_seen(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    alone = launched(tmp_path, "--num_processes", "1")
    assert alone == f"threads: {cores}\n"
    two = launched(tmp_path, "--num_processes=2", OMP_NUM_THREADS="1")
    assert two.startswith("threads: 1\naccelerate launch: --num_processes is 2, and 1 was started")
    assert "On the CPU: halfbyte train --processes 2" in two
