"""Training stopped from outside: no step is lost, no process is left, and it goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from chaos.stops import session_of
from conftest import MakeConfig
from safetensors.torch import load_file
from toys import ROOT, run_script, write_config
from waiting import wait_until

from halfbyte.run_dir import read_jsonl
from halfbyte.train.checkpoints import all_checkpoints, fault_of, step_of

SETTINGS = {"max_steps": 60, "save_steps": 25, "eval_steps": 30, "log_steps": 1, "batch_size": 2}


def steps_of(run: Path) -> list[int]:
    """The steps that a run has logged so far."""
    path = run / "metrics.jsonl"
    return (
        [record["step"] for record in read_jsonl(path) if "loss" in record]
        if path.is_file()
        else []
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def losses(run: Path) -> list[tuple[int, float | None, float | None]]:
    records = read_jsonl(run / "metrics.jsonl")
    return [(record["step"], record.get("loss"), record.get("eval_loss")) for record in records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder, tiny_llama, train=SETTINGS, adapter={"dropout": 0.1})
    run_script("train/sft.py", config)
    return folder / "runs" / "tiny"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_saves_the_step_and_the_run_goes_on_exactly(
    make_config: MakeConfig,
    tmp_path: Path,
    whole: Path,
    number: signal.Signals,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config(train=SETTINGS, adapter={"dropout": 0.1}, track={"wandb": "off"})
    run = tmp_path / "runs" / "tiny"

    def send() -> None:
        wait_until(lambda: len(steps_of(run)) >= 3, "no steps")
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(SystemExit) as stopped:
        run_script("train/sft.py", config)
    thread.join()
    assert stopped.value.code == 128 + number
    done = steps_of(run)[-1]
    assert 3 <= done < SETTINGS["max_steps"]
    newest = all_checkpoints(run / "checkpoints")[0]
    assert (step_of(newest), fault_of(newest)) == (done, "")
    told = capsys.readouterr().err
    assert f"{number.name}: this step is finished and saved" in told
    assert (
        f"stopped: signal {number.value}, after step {done}, which is saved. Go on with: " in told
    )
    assert f"halfbyte train {run / 'run.yaml'}" in told
    run_script("train/sft.py", run / "run.yaml")
    assert losses(run) == losses(whole)
    ours, theirs = weights(run), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name
)
def test_a_dead_launcher_leaves_no_process_and_loses_no_step(
    make_config: MakeConfig, tmp_path: Path, number: signal.Signals
) -> None:
    """``accelerate launch`` hands on no signals: its child would train on alone."""
    config = make_config(train=SETTINGS | {"max_steps": 4000}, track={"wandb": "off"})
    run, log = tmp_path / "runs" / "tiny", tmp_path / "log"
    command = [sys.executable, "-m", "accelerate.commands.launch", "train/sft.py", str(config)]
    with log.open("w") as out:
        launcher = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True
        )
        wait_until(lambda: len(steps_of(run)) >= 3, "no steps", 120)
        launcher.send_signal(number)
        launcher.wait(60)
    wait_until(lambda: "stopped: signal" in log.read_text(), "it trains on", 20)
    wait_until(lambda: not session_of(launcher.pid), "a process is left", 20)
    newest = all_checkpoints(run / "checkpoints")[0]
    assert (step_of(newest), fault_of(newest)) == (steps_of(run)[-1], "")
