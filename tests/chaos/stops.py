"""SIGTERM and SIGINT in every phase of every command: a message, its exit code, no step lost, no process left."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from waiting import wait_until

from chaos.farm import ROOT, Ended, run, run_together, start, wait
from chaos.kills import free_port
from chaos.lingering import linger
from chaos.outcome import Case
from chaos.scene import OFFLINE, Scene, difference, learnt, train

KIND, LAUNCHER, TOGETHER = (
    "SIGTERM and SIGINT",
    "SIGTERM and SIGINT to accelerate launch alone",
    "SIGTERM and SIGINT to one of two processes",
)
MAX_SECONDS = 20.0
MAX_START_SECONDS = 90.0
LAUNCHED = ("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip
DROPOUT = {"dropout": 0.1}
# The function in which the signal arrives, by phase, and the script that calls it.
PHASES = {
    "tokenise": ("train/sft.py", "halfbyte.train.run", "prepare"),
    "load": ("train/sft.py", "halfbyte.model.load", "load_base"),
    "train": ("train/sft.py", "halfbyte.train.trainer", "TokenTrainer.training_step"),
    "evaluate": ("train/sft.py", "halfbyte.train.trainer", "held_out_losses"),
    "save a checkpoint": ("train/sft.py", "halfbyte.train.checkpoints", "replace_folder"),
    "save the adapter": ("train/sft.py", "halfbyte.train.session", "save_adapter"),
    "merge": ("train/merge.py", "halfbyte.ship.merge", "write_shards"),
    "compare": ("eval/compare.py", "halfbyte.eval.compare", "measure"),
}


def cases(scene: Scene, scale: float) -> Iterator[Case]:
    """Both signals in each phase, to the script, to its launcher alone, and to one of two processes."""
    ready = scene.folder("stop-ready")
    assert train(scene.config(ready, adapter=DROPOUT)).code == 0
    wanted = learnt(ready / "runs" / "tiny")
    merged = run("train/merge.py", ready / "runs" / "tiny", log=ready / "log", environ=OFFLINE)
    assert merged.code == 0, merged.text
    for phase, (script, _, _) in PHASES.items():
        for number in (signal.SIGTERM, signal.SIGINT):
            name = f"{number.name} in {phase}"
            yield Case(KIND, name, partial(_stopped, scene, ready, phase, number, wanted))
            if script == "train/sft.py":
                yield Case(LAUNCHER, name, partial(_unlaunched, scene, phase, number, wanted))
    together = scene.folder("stop-pair")
    ended = _pair(scene.config(together, adapter=DROPOUT))
    assert [end.code for end in ended] == [0, 0], ended
    wanted = learnt(together / "runs" / "tiny")
    for phase in ("train", "evaluate", "save a checkpoint"):
        for number, rank in itertools.product((signal.SIGTERM, signal.SIGINT), range(2)):
            name = f"{number.name} to rank {rank} in {phase}"
            yield Case(TOGETHER, name, partial(_one_stopped, scene, phase, number, rank, wanted))


def _stopped(
    scene: Scene, ready: Path, phase: str, number: signal.Signals, wanted: tuple[str, list[Any]]
) -> str:
    script, module, target = PHASES[phase]
    folder = scene.folder(f"stop-{phase.replace(' ', '-')}-{number.name}")
    config, log, sign = (
        scene.config(folder, adapter=DROPOUT),
        folder / "log",
        folder / "in",
    )
    run_folder = folder / "runs" / "tiny"
    subject = config if script == "train/sft.py" else run_folder
    if script != "train/sft.py":
        shutil.copytree(ready / "runs", folder / "runs")
    before = partial(linger, module, target, sign)
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


def _unlaunched(
    scene: Scene, phase: str, number: signal.Signals, wanted: tuple[str, list[Any]]
) -> str:
    """Stop ``accelerate launch`` alone, which hands on no signals."""
    _, module, target = PHASES[phase]
    folder = scene.folder(f"launcher-{phase.replace(' ', '-')}-{number.name}")
    config, log, sign = scene.config(folder, adapter=DROPOUT), folder / "log", folder / "in"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *LAUNCHED]
    command += ["tests/chaos/lingering.py", module, target, str(sign), "train/sft.py", str(config)]
    with log.open("w", encoding="utf-8") as stream:
        launcher = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | OFFLINE | {"PYTHONPATH": str(ROOT / "tests")},
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        wait_until(sign.exists, f"{target} is not called", MAX_START_SECONDS)
        launcher.send_signal(number)
        begun = time.monotonic()
        launcher.wait(MAX_SECONDS)
        wait_until(lambda: not session_of(launcher.pid), "a process is left", MAX_SECONDS)
    except Exception as error:
        return f"{error}: {log.read_text(encoding='utf-8')[-300:]}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    ended = Ended(None, time.monotonic() - begun, log.read_text(encoding="utf-8"))
    missing = [text for text in ("stopped: ", "Go on with: ") if text not in ended.text]
    if missing:
        return f"does not say {missing}: {ended.text[-300:]}"
    again = train(config)
    if again.code != 0:
        return again.crash or f"goes on to {again.code}: {again.text[-300:]}"
    return difference(learnt(folder / "runs" / "tiny"), wanted)


def _one_stopped(
    scene: Scene, phase: str, number: signal.Signals, rank: int, wanted: tuple[str, list[Any]]
) -> str:
    _, module, target = PHASES[phase]
    folder = scene.folder(f"pair-{phase.replace(' ', '-')}-{number.name}-{rank}")
    config, sign = scene.config(folder, adapter=DROPOUT), folder / "in"

    def stop_one(children: list[int]) -> None:
        wait_until(sign.exists, f"{target} is not called")
        os.kill(children[rank], number)

    ended = _pair(config, partial(linger, module, target, sign), stop_one)
    codes = [end.code for end in ended]
    if codes != [128 + number] * 2:
        return f"ended with {codes}: {ended[0].text[-300:]} / {ended[1].text[-300:]}"
    if said := ended[0].says("stopped: ", "Go on with: "):
        return said
    again = _pair(config)
    if [end.code for end in again] != [0, 0]:
        return f"goes on to {[end.code for end in again]}: {again[0].text[-300:]}"
    return difference(learnt(folder / "runs" / "tiny"), wanted)


def _pair(
    config: Path,
    before: Callable[[], None] = lambda: None,
    meanwhile: Callable[[list[int]], None] = lambda children: None,
) -> list[Ended]:
    return run_together(
        "train/sft.py",
        config,
        log=config.parent / "log",
        port=free_port(),
        environ=(OFFLINE, OFFLINE),
        before=before,
        meanwhile=meanwhile,
    )


def session_of(leader: int) -> list[int]:
    """The processes of a session that still run."""
    alive = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == leader and state != "Z":
            alive.append(int(path.parent.name))
    return alive
