"""Disks that are full, read-only or gone, at each write of each command: a message, nothing lost, and a second try."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from waiting import wait_until

from chaos.farm import Ended, run, start, wait
from chaos.outcome import Case, evenly
from chaos.scene import OFFLINE, Scene, difference, learnt, train

KIND = "a full, read-only or vanished disk"
COMMANDS: dict[str, tuple[str, Sequence[str]]] = {
    "train": ("train/sft.py", ()),
    "merge": ("train/merge.py", ()),
    "export": ("train/export.py", ("--to", "adapter")),
    "compare": ("eval/compare.py", ()),
}
ERRNOS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT)


def cases(scene: Scene, scale: float) -> Iterator[Case]:
    """Failing writes, evenly over all of a command, and a run folder that goes away."""
    ready = scene.folder("disk-ready")
    config = scene.config(ready)
    assert train(config).code == 0
    wanted = learnt(ready / "runs" / "tiny")
    finished = scene.folder("disk-finished")
    shutil.copytree(ready, finished, dirs_exist_ok=True)
    for command, (script, options) in COMMANDS.items():
        run_folder = finished / "runs" / "tiny"
        calls = finished / f"calls-{command}"
        if command == "train":
            trial = scene.folder("disk-trial")
            environ = fault(trial / "runs", "log", log=calls)
            assert train(scene.config(trial), environ=environ).code == 0
        else:
            environ = fault(run_folder, "log", log=calls)
            ended = run(
                script, run_folder, *options, log=calls.with_suffix(".log"), environ=environ
            )
            assert ended.code == 0, ended.text
        count = len(calls.read_text().splitlines())
        before = finished if command != "train" else None
        for number, at in enumerate(evenly(count, round(60 * scale))):
            code = ERRNOS[number % len(ERRNOS)]
            name = f"{command}, call {at} of {count}, {errno.errorcode[code]}"
            yield Case(
                KIND,
                name,
                partial(_fails_at, scene, command, at, code, before, wanted),
            )
    for at in range(1, 1 + round(3 * scale) or 2):
        name = f"train, the run folder is deleted after step {at}"
        yield Case(KIND, name, partial(_vanishes, scene, at, wanted))


def fault(
    path: Path, act: str, at: int = 0, code: int = 0, log: Path | None = None
) -> dict[str, str]:
    """Variables for the preloaded library."""
    environ = {"FAULT_PATH": str(path), "FAULT_ACT": act, "FAULT_AT": str(at)}
    return environ | {"FAULT_ERRNO": str(code), "FAULT_LOG": str(log or "/dev/null")}


def _fails_at(
    scene: Scene,
    command: str,
    at: int,
    code: int,
    before: Path | None,
    wanted: tuple[str, list[Any]],
) -> str:
    script, options = COMMANDS[command]
    folder = scene.folder(f"disk-{command}-{at}-{code}")
    if before is None:
        config = scene.config(folder)
    else:
        shutil.copytree(before, folder, dirs_exist_ok=True)
    run_folder, log = folder / "runs" / "tiny", folder / "log"
    subject = config if before is None else run_folder
    watched = fault(folder / "runs", "full", at, code)
    broken = run(script, subject, *options, log=log, environ=OFFLINE | watched)
    if broken.crash:
        return broken.crash
    if (
        broken.code == 0
    ):  # a call whose failure changes nothing, such as the removal of a scratch file
        said = difference(learnt(run_folder), wanted)
    elif broken.code == 1:
        said = broken.says("error: ")
    else:
        return f"ended with {broken.code}: {broken.text[-300:]}"
    again: Ended = run(script, subject, *options, log=log, environ=OFFLINE)
    if again.code != 0:
        return said or f"the second try ended with {again.code}: {again.text[-300:]}"
    return said or difference(learnt(run_folder), wanted)


def _vanishes(scene: Scene, step: int, wanted: tuple[str, list[Any]]) -> str:
    folder = scene.folder(f"disk-vanishes-{step}")
    config, log = scene.config(folder), folder / "log"
    metrics = folder / "runs" / "tiny" / "metrics.jsonl"
    child = start("train/sft.py", [config], log=log, environ=OFFLINE)
    wait_until(
        lambda: metrics.is_file() and len(metrics.read_text().splitlines()) >= step, "no steps"
    )
    shutil.rmtree(folder / "runs" / "tiny", ignore_errors=True)
    broken = wait(child, log)
    again = train(config)
    if again.code != 0:
        return f"the second try ended with {again.code}: {again.text[-300:]}"
    said = broken.says("error: ", "vanished") if broken.code else ""
    return said or difference(learnt(metrics.parent), wanted)
