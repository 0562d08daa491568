"""SIGTERM and SIGINT in every phase of every command: a message, its exit code, no step lost, no process left."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from waiting import wait_until

from chaos.farm import run, start, wait
from chaos.outcome import Case
from chaos.scene import OFFLINE, Scene, difference, learnt, train

KIND = "SIGTERM and SIGINT"
MAX_SECONDS = 20.0
# The function in which the signal arrives, by phase, and the script that calls it.
PHASES = {
    "tokenise": ("train/sft.py", "halfbyte.data.prepare", "prepare"),
    "load": ("train/sft.py", "halfbyte.model.load", "load_base"),
    "train": ("train/sft.py", "halfbyte.train.trainer", "TokenTrainer.training_step"),
    "evaluate": ("train/sft.py", "halfbyte.train.trainer", "held_out_losses"),
    "save a checkpoint": ("train/sft.py", "halfbyte.train.checkpoints", "replace_folder"),
    "save the adapter": ("train/sft.py", "halfbyte.train.session", "save_adapter"),
    "merge": ("train/merge.py", "halfbyte.ship.merge", "write_shards"),
    "compare": ("eval/compare.py", "halfbyte.eval.compare", "measure"),
}


def cases(scene: Scene, scale: float) -> Iterator[Case]:
    """Both signals in each phase."""
    ready = scene.folder("stop-ready")
    assert train(scene.config(ready, adapter={"dropout": 0.1})).code == 0
    wanted = learnt(ready / "runs" / "tiny")
    merged = run("train/merge.py", ready / "runs" / "tiny", log=ready / "log", environ=OFFLINE)
    assert merged.code == 0, merged.text
    for phase in PHASES:
        for number in (signal.SIGTERM, signal.SIGINT):
            name = f"{number.name} in {phase}"
            yield Case(KIND, name, partial(_stopped, scene, ready, phase, number, wanted))


def _stopped(
    scene: Scene, ready: Path, phase: str, number: signal.Signals, wanted: tuple[str, list[Any]]
) -> str:
    script, module, target = PHASES[phase]
    folder = scene.folder(f"stop-{phase.replace(' ', '-')}-{number.name}")
    config, log, sign = (
        scene.config(folder, adapter={"dropout": 0.1}),
        folder / "log",
        folder / "in",
    )
    run_folder = folder / "runs" / "tiny"
    subject = config if script == "train/sft.py" else run_folder
    if script != "train/sft.py":
        shutil.copytree(ready / "runs", folder / "runs")
    before = partial(_linger, module, target, sign)
    child = start(script, [subject], log=log, environ=OFFLINE, before=before)
    wait_until(sign.exists, f"{target} is not called")
    os.kill(child, number)
    ended = wait(child, log)
    if ended.crash or ended.code != 128 + number:
        return ended.crash or f"ended with {ended.code}: {ended.text[-300:]}"
    said = ended.says("stopped: ", "Go on with: ")
    if said or ended.seconds > MAX_SECONDS:
        return said or f"took {ended.seconds:.0f} s"
    again = start(script, [subject], log=log, environ=OFFLINE)
    ended = wait(again, log)
    if ended.code != 0:
        return ended.crash or f"goes on to {ended.code}: {ended.text[-300:]}"
    return difference(learnt(run_folder), wanted)


def _linger(module: str, target: str, sign: Path) -> None:
    """Let a function of the child show that it runs, the second time it is called, and take a second."""
    import importlib

    place: Any = importlib.import_module(module)
    *owner, name = target.split(".")
    for part in owner:
        place = getattr(place, part)
    usual, calls = getattr(place, name), [0]
    once = module.endswith(("trainer", "checkpoints")) and name != "held_out_losses"

    def lingering(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 1 + once:
            sign.touch()
            time.sleep(1)
        return usual(*arguments, **options)

    setattr(place, name, lingering)
