"""Owns which settings decide what a run learns: those that must be the same in what goes on from it."""

from __future__ import annotations

from typing import Any

from halfbyte.config import Run, read_run_folder
from halfbyte.config.read import UNNAMED
from halfbyte.errors import RunError
from halfbyte.run_dir import RunDir

# Settings of `train` that change what is shown or kept, but not what is learnt.
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


def check_same(run: Run, folder: RunDir) -> None:
    """Check that a run folder's run has the settings of this one.

    Raises:
        RunError: one differs.
    """
    before, now = settings_of(read_run_folder(folder.path)), settings_of(run)
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        shown = "; ".join(f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in changed[:5])
        raise RunError(
            f"{folder.path}: holds a run with other settings: {shown}. Give this one another folder"
            " (name=…), or move the old one aside with train.existing=replace"
        )


def settings_of(run: Run) -> dict[str, Any]:
    """Return every key that affects what is learnt, in a flat dict."""
    dump = run.model_dump(mode="json", include={"seed", "model", "adapter", "data", "train"})
    flat = {"seed": dump.pop("seed")}
    silent = {"train": SILENT_TRAIN_KEYS, "data": SILENT_DATA_KEYS}
    for section, values in dump.items():
        for key, value in values.items():
            if key not in silent.get(section, ()):
                flat[f"{section}.{key}"] = value
    # Runs of versions before 0.2 say sdpa, the only one that they could train with; `auto` equals it here.
    if flat["model.attention"] == "auto":
        flat["model.attention"] = "sdpa"
    return flat
