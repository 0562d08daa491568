"""W&B in its process: nothing that it does ends or delays a training."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeConfig
from waiting import wait_until

from halfbyte import tracking
from halfbyte.config import load_run
from halfbyte.tracking import WandbRun, outlook
from halfbyte.wandb_worker import DO

FIRST = {
    "options": {"mode": "offline", "project": "p", "id": "x-1", "config": {}},
    "timeouts": {},
    "by_step": True,
}


@pytest.fixture
def first(tmp_path: Path) -> dict[str, Any]:
    return {**FIRST, "options": {**FIRST["options"], "dir": str(tmp_path)}}  # type: ignore[dict-item]


def test_a_frozen_process_costs_two_seconds_and_drops_what_does_not_fit(
    first: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tracking, "MAX_QUEUED", 50)
    with (tmp_path / "log").open("w") as log:
        run = WandbRun(first, log)
    os.kill(run._process.pid, signal.SIGSTOP)
    for step in range(1000):
        run.log({"step": step, "text": "x" * 10_000})
    assert run.num_dropped > 500
    assert "still starting" in run.where
    run.finish()
    os.kill(run._process.pid, signal.SIGKILL)
    assert run._waited_s <= 1.5 * tracking.LAST_WAIT_S
    told = capsys.readouterr().err
    assert f"W&B goes on in process {run._process.pid}" in told
    assert "records did not reach W&B; all are in metrics.jsonl" in told


def test_a_killed_process_is_no_error(first: dict[str, Any], tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        run = WandbRun(first, log)
    os.kill(run._process.pid, signal.SIGKILL)
    for step in range(5):
        run.log({"step": step})
    run.finish()
    assert run._process.wait(5) == -signal.SIGKILL


@pytest.mark.slow
def test_a_training_that_dies_ends_the_run_as_failed(first: dict[str, Any], tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        run = WandbRun(first, log)
    wait_until(lambda: run.about, "no start", 30)
    assert run._process.stdin is not None
    run._process.stdin.close()  # as if we had died
    assert run._process.wait(60) == 0


def test_every_command_has_its_deed_in_the_other_process() -> None:
    assert DO.keys() == {"log", "summary", "table", "page", "artifact"}


def test_a_preflight_waits_two_seconds_for_a_server_that_never_ends_its_answer(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "5e" * 20)
        monkeypatch.setenv("WANDB_MODE", "online")
        run = load_run(make_config(track={"wandb": "online"}), [])
        assert outlook(run) == "offline, to be uploaded later"
