"""Owns beginning and ending a run: a new folder, a resumed one or a refusal; and its manifest."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.config import Run, read_run_folder, run_as_yaml
from halfbyte.config.read import UNNAMED
from halfbyte.data.prepare import Prepared, hash_fraction
from halfbyte.data.render import Renderer
from halfbyte.errors import RunError
from halfbyte.model.load import Loaded, vision_modules
from halfbyte.model.resolve import Base
from halfbyte.run_dir import (
    RunDir,
    move_aside,
    provenance,
    read_json,
    write_json,
    write_jsonl,
    write_text,
)

# Settings of `train` that change what is shown or kept, not what is learnt.
SILENT_TRAIN_KEYS = {
    *UNNAMED,
    "num_samples",
    "sample_tokens",
    "log_steps",
    "keep_checkpoints",
    "save_steps",
    "eval_steps",
}
SILENT_DATA_KEYS = {"cache"}
CHECKPOINT_FILES = (
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "trainer_state.json",
)
NUM_FEWSHOT_POOL = 64


@dataclass(frozen=True)
class Session:
    """An opened run folder.

    ``resume`` is the checkpoint to go on from, ``earlier_s`` what the attempts before it have taken.
    """

    folder: RunDir
    resume: Path | None
    finished: bool
    is_main: bool
    started: float
    earlier_s: float

    @property
    def resume_step(self) -> int:
        """Steps that are already done."""
        return _step(self.resume) if self.resume else 0


def open_session(run: Run) -> Session:
    """Make the run folder, or find where an earlier run with the same settings stopped.

    Raises:
        RunError: the folder belongs to a run with other settings.
    """
    folder = RunDir(Path(run.runs_dir) / str(run.name))
    is_main = os.environ.get("RANK", "0") == "0"
    resume = None
    finished = False
    earlier_s = 0.0
    if folder.config.is_file() and run.train.existing == "replace":
        if is_main:
            print(f"moved the earlier run to {move_aside(folder.path)}")
    elif folder.config.is_file():
        resume = newest_checkpoint(folder.checkpoints)
        finished = folder.is_finished()
        if resume or finished:
            _check_same(run, folder)
        if resume and folder.manifest.is_file():
            earlier_s = float(read_json(folder.manifest).get("seconds", 0.0))
    if is_main:
        folder.path.mkdir(parents=True, exist_ok=True)
        write_text(folder.config, run_as_yaml(run))
    return Session(folder, resume, finished, is_main, time.time(), earlier_s)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that has all of its files; says which ones are passed over."""
    for path in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        missing = [name for name in CHECKPOINT_FILES if not _has_content(path / name)]
        if not any(map(_has_content, path.glob("rng_state*.pth"))):
            missing.append("rng_state.pth")
        if not missing and _is_json(path / "trainer_state.json"):
            return path
        print(
            f"warning: {path} is not whole (missing: {', '.join(missing) or 'valid JSON'}); passed over"
        )
    return None


def as_before(session: Session, run: Run) -> Run:
    """The run with its steps cut as the attempt before has cut them, where ``auto`` leaves it open.

    So that a resumed run repeats the one that was stopped, whatever memory is free by now.
    """
    if session.resume is None or not session.folder.manifest.is_file():
        return run
    told = read_json(session.folder.manifest).get("memory")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if told is None or run.train.batch_size % (told["micro_batch_size"] * world):
        return run  # another number of processes: the plan settles it anew
    settled: dict[str, Any] = {}
    if run.train.micro_batch_size == "auto":
        settled["micro_batch_size"] = told["micro_batch_size"]
    if run.train.checkpointing == "auto":
        settled["checkpointing"] = told["checkpointing"]
    return run.model_copy(update={"train": run.train.model_copy(update=settled)})


def check_base(session: Session, base: Base) -> None:
    """A resumed run must go on from the base that it began with.

    Raises:
        RunError: the base is another one by now.
    """
    if session.resume is None or not session.folder.manifest.is_file():
        return
    told = read_json(session.folder.manifest)["base"]
    if told["fingerprint"] != base.fingerprint:
        raise RunError(
            f"{session.folder.path}: the base {base.name} has changed since this run began (it was at"
            f" {told['revision'] or told['fingerprint'][:12]}); pin model.revision, or start anew with"
            " train.existing=replace"
        )


def record_data(session: Session, prepared: Prepared) -> None:
    """Write the ledger, the held-out rows and a pool of few-shot examples into the run folder.

    Raises:
        RunError: a resumed run finds other data than it began with.
    """
    folder = session.folder
    previous = folder.ledger.is_file() and read_json(folder.ledger)["fingerprints"]
    if session.resume and previous and previous != prepared.ledger["fingerprints"]:
        raise RunError(
            f"{folder.path}: the data has changed since this run began; train.existing=replace starts anew"
        )
    write_json(folder.ledger, prepared.ledger)
    for name in ("validation", "test"):
        rows = getattr(prepared, name)
        write_jsonl(folder.data / f"{name}.jsonl", (example.row.as_json() for example in rows))
    pool = sorted(prepared.train, key=lambda example: hash_fraction(example.row.prompt))
    write_jsonl(
        folder.data / "fewshot.jsonl",
        (example.row.as_json() for example in pool[:NUM_FEWSHOT_POOL]),
    )


def write_manifest(
    session: Session, run: Run, loaded: Loaded, renderer: Renderer, numbers: dict[str, Any]
) -> None:
    """Where everything came from and what it cost; ``finished`` once the adapter is saved."""
    device = loaded.compute.device
    write_json(
        session.folder.manifest,
        {
            "name": run.name,
            "base": loaded.base.as_json(),
            "model_class": type(loaded.model).__name__,
            "text_only": loaded.text_only,
            "vision_modules": len(vision_modules(loaded.model)),
            "precision": loaded.precision,
            "compute_dtype": {"name": loaded.compute.name, "why": loaded.compute.reason},
            "device": str(device),
            "chat_template_sha256": renderer.template_sha256,
            "stop_ids": renderer.stop_ids,
            "bos_per_row": 1 if renderer.has_bos else 0,
            "seconds": round(time.time() - session.started + session.earlier_s, 1),
            **numbers,
            **provenance(),
        },
    )


def _check_same(run: Run, folder: RunDir) -> None:
    before, now = _settings(read_run_folder(folder.path)), _settings(run)
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        shown = "; ".join(f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in changed[:5])
        raise RunError(
            f"{folder.path}: holds a run with other settings: {shown}. Give this one another folder"
            " (name=…), or move the old one aside with train.existing=replace"
        )


def _settings(run: Run) -> dict[str, Any]:
    """Every key that decides what is learnt, flat."""
    dump = run.model_dump(mode="json", include={"seed", "model", "adapter", "data", "train"})
    flat = {"seed": dump.pop("seed")}
    silent = {"train": SILENT_TRAIN_KEYS, "data": SILENT_DATA_KEYS}
    for section, values in dump.items():
        for key, value in values.items():
            if key not in silent.get(section, ()):
                flat[f"{section}.{key}"] = value
    return flat


def _step(path: Path) -> int:
    found = re.search(r"-(\d+)$", path.name)
    return int(found.group(1)) if found else -1


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True
