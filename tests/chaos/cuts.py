"""The same step however it is cut into passes, laid out and shared among processes: its loss and gradient norm."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from chaos.farm import run_together
from chaos.kills import free_port
from chaos.outcome import Case
from chaos.scene import OFFLINE, Scene, learnt

KIND = "the same step, cut otherwise"
ROWS = 8
TOLERANCE = 1e-5
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {"no_padding": False, "share_prefixes": False},
    "packed": {"share_prefixes": False},
    "prefix-shared": {},
}
# Passes of a step for each process, by the number of processes.
CUTS = {1: (1, 2, 4, 8), 2: (1, 2, 4)}


def cases(scene: Scene, scale: float) -> Iterator[Case]:
    """All layouts with all cuts, alone and in two processes, beside one padded pass."""
    wanted = _step(scene, "padded", 1, ROWS)
    for layout, processes in itertools.product(LAYOUTS, CUTS):
        for size in CUTS[processes]:
            passes = ROWS // processes // size
            name = f"{layout}, {size} rows × {passes} passes × {processes} processes"
            yield Case(KIND, name, partial(_differs, scene, layout, processes, size, wanted))


def _differs(
    scene: Scene, layout: str, processes: int, size: int, wanted: tuple[float, float]
) -> str:
    found = _step(scene, layout, processes, size)
    errors = [abs(ours / theirs - 1) for ours, theirs in zip(found, wanted, strict=True)]
    if all(error < TOLERANCE for error in errors):
        return ""
    return f"loss and gradient norm are {found}, not {wanted}"


def _step(scene: Scene, layout: str, processes: int, size: int) -> tuple[float, float]:
    """Train one step, and return its loss and the norm of its gradients."""
    folder = scene.folder(f"cut-{layout}-{processes}-{size}")
    train = {"batch_size": ROWS, "micro_batch_size": size, "max_steps": 1, "save_steps": 0}
    config = scene.config(folder, train={**train, "eval_steps": 0}, speed=LAYOUTS[layout])
    places: tuple[dict[str, str], ...] = (OFFLINE,) * processes
    ended = run_together(
        "train/sft.py", config, log=folder / "log", port=free_port(), environ=places
    )
    if any(end.code for end in ended):
        print(ended[0].text[-500:])
        return math.nan, math.nan
    return _numbers(folder)


def _numbers(folder: Path) -> tuple[float, float]:
    ((_, loss, _, norm),) = [step for step in learnt(folder / "runs" / "tiny")[1] if step[1]]
    return loss, norm
