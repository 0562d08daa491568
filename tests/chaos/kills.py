"""A process that is killed at any call, at any time, alone or with another: what it resumes to is bit-identical."""

from __future__ import annotations

import random
import shutil
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from chaos.disks import fault
from chaos.farm import run_together, start, stop, wait
from chaos.outcome import Case, evenly
from chaos.scene import OFFLINE, Scene, difference, learnt, train

CALLS, TIMES, TOGETHER, POWER = (
    "kill -9 at a call",
    "kill -9 at a time",
    "kill -9 of one of two processes",
    "power cut",
)
DROPOUT = {"dropout": 0.1}


def cases(scene: Scene, scale: float) -> Iterator[Case]:
    """Kills evenly over all calls that change files, at random times, with two processes, and power cuts."""
    ready = scene.folder("kill-ready")
    calls = ready / "calls"
    assert (
        train(
            scene.config(ready, adapter=DROPOUT), environ=fault(ready / "runs", "log", log=calls)
        ).code
        == 0
    )
    wanted = learnt(ready / "runs" / "tiny")
    count = len(calls.read_text().splitlines())
    for number, at in enumerate(evenly(count, round(200 * scale))):
        act = ("kill", "half")[number % 2]
        yield Case(
            CALLS, f"{act} at call {at} of {count}", partial(_at_call, scene, act, at, wanted)
        )
    for number in range(round(50 * scale) or 1):
        yield Case(TIMES, f"number {number}", partial(_at_times, scene, number, wanted))
    pair = scene.folder("kill-pair")
    calls = pair / "calls"
    environ = (OFFLINE | fault(pair / "runs", "log", log=calls), OFFLINE)
    config = scene.config(pair, adapter=DROPOUT)
    ended = run_together(
        "train/sft.py", config, log=pair / "log", port=free_port(), environ=environ
    )
    assert [end.code for end in ended] == [0, 0], ended
    together = learnt(pair / "runs" / "tiny")
    count = len(calls.read_text().splitlines())
    for at in evenly(count, round(20 * scale) or 1):
        name = f"the first, at call {at} of {count}"
        yield Case(TOGETHER, name, partial(_one_of_two, scene, at, together))
    for mode in ("dropped", "torn", "named"):
        for at in range(1, 1 + (round(12 * scale) or 1)):
            name = f"after flush {at}: what was not flushed is {mode}"
            yield Case(POWER, name, partial(_power_cut, scene, at, mode, wanted))


def _at_call(scene: Scene, act: str, at: int, wanted: tuple[str, list[Any]]) -> str:
    folder = scene.folder(f"kill-{act}-{at}")
    config = scene.config(folder, adapter=DROPOUT)
    train(config, environ=fault(folder / "runs", act, at))
    return _goes_on(folder, config, wanted)


def _at_times(scene: Scene, number: int, wanted: tuple[str, list[Any]]) -> str:
    """Kill at two random times, the second in what goes on from the first."""
    folder = scene.folder(f"kill-time-{number}")
    config, log = scene.config(folder, adapter=DROPOUT), folder / "log"
    chance = random.Random(number)
    for _ in range(2):
        child = start("train/sft.py", [config], log=log, environ=OFFLINE)
        time.sleep(chance.uniform(0.2, 2.2))
        stop(child)
    return _goes_on(folder, config, wanted)


def _goes_on(folder: Path, config: Path, wanted: tuple[str, list[Any]]) -> str:
    again = train(config)
    if again.crash or again.code != 0:
        return again.crash or f"it goes on to {again.code}: {again.text[-300:]}"
    return difference(learnt(folder / "runs" / "tiny"), wanted)


def _one_of_two(scene: Scene, at: int, wanted: tuple[str, list[Any]]) -> str:
    folder = scene.folder(f"kill-pair-{at}")
    config = scene.config(folder, adapter=DROPOUT)
    killed = (OFFLINE | fault(folder / "runs", "kill", at), OFFLINE)
    run_together("train/sft.py", config, log=folder / "log", port=free_port(), environ=killed)
    ended = run_together(
        "train/sft.py", config, log=folder / "log", port=free_port(), environ=(OFFLINE, OFFLINE)
    )
    broken = [end for end in ended if end.code != 0]
    if broken:
        return broken[0].crash or f"it goes on to {broken[0].code}: {broken[0].text[-300:]}"
    return difference(learnt(folder / "runs" / "tiny"), wanted)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _power_cut(scene: Scene, at: int, mode: str, wanted: tuple[str, list[Any]]) -> str:
    from chaos.power import cut_power, watch

    folder = scene.folder(f"power-{mode}-{at}")
    config, log = scene.config(folder, adapter=DROPOUT), folder / "log"
    runs, kept = folder / "runs", folder / "kept"
    kept.mkdir()
    runs.mkdir()
    child = start(
        "train/sft.py",
        [config],
        log=log,
        environ=OFFLINE,
        before=partial(watch, runs, kept, 6 * at),
    )
    wait(child, log)
    cut_power(runs, kept, mode)
    again = train(config)
    if again.code == 1 and "differs from what was written" in again.text:
        return f"a file is damaged: {again.text[-300:]}"
    shutil.rmtree(kept)
    if again.crash or again.code != 0:
        return again.crash or f"it goes on to {again.code}: {again.text[-300:]}"
    return difference(learnt(runs / "tiny"), wanted)
