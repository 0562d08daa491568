"""The small model, rows and configs of the campaign, and what two runs are compared by."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toys import write_config

from chaos.farm import Ended, run
from halfbyte.run_dir import file_sha256

STEPS = {"max_steps": 6, "save_steps": 2, "eval_steps": 3, "existing": "resume"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


@dataclass(frozen=True)
class Scene:
    """A folder with a base model, in which each case has a folder of its own.

    Attributes:
        root: the folder.
    """

    root: Path

    @property
    def base(self) -> Path:
        """The folder of the base model."""
        return self.root / "base"

    def folder(self, name: str) -> Path:
        """An empty folder for a case."""
        path = self.root / "cases" / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def config(self, folder: Path, **sections: Any) -> Path:
        """Write a config and its rows; the run is ``runs/tiny`` in the folder."""
        steps = STEPS | sections.pop("train", {})
        track = {"wandb": "off"} | sections.pop("track", {})
        return write_config(folder, self.base, train=steps, track=track, **sections)


def train(config: Path, *overrides: str, **options: Any) -> Ended:
    """Train in a child; what it prints is in ``log`` beside the config."""
    options["environ"] = OFFLINE | dict(options.get("environ", {}))
    return run("train/sft.py", config, *overrides, log=config.parent / "log", **options)


def learnt(run_folder: Path) -> tuple[str, list[Any]]:
    """What a run has learnt: the digest of its weights, and the losses of its steps."""
    weights = run_folder / "adapter" / "adapter_model.safetensors"
    if not weights.is_file():
        return "no adapter", []
    lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    losses = [(r["step"], r.get("loss"), r.get("eval_loss"), r.get("grad_norm")) for r in records]
    return file_sha256(weights), losses


def difference(ours: tuple[str, list[Any]], theirs: tuple[str, list[Any]]) -> str:
    """Why two runs have not learnt the same, or ""."""
    if ours[0] != theirs[0]:
        return f"other weights: {ours[0][:12]}, not {theirs[0][:12]}"
    return "" if ours[1] == theirs[1] else "other losses are recorded"
