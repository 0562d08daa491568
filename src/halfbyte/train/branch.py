"""Owns going on from a checkpoint of another run with other settings, in a run folder of its own with its lineage."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halfbyte.config import Run
from halfbyte.errors import RunError
from halfbyte.host import num_processes
from halfbyte.record import Record
from halfbyte.run_dir import RunDir, file_sha256, read_jsonl, replace_folder, write_jsonl
from halfbyte.train.checkpoints import SEAL, fault_of, newest_checkpoint, stage, step_of

LINEAGE = "lineage.json"
# What may differ from the run that the checkpoint comes from: how the steps from there on are taken.
FREE_KEYS = {
    "model.compute_dtype",
    "adapter.dropout",
    "train.learning_rate",
    "train.epochs",
    "train.max_steps",
    "train.weight_decay",
    "train.max_grad_norm",
    "train.scheduler",
    "train.warmup_frac",
    "train.neftune_alpha",
    "train.micro_batch_size",
    "train.checkpointing",
    "train.resume_from",
}


class Lineage(Record):
    """``lineage.json``: where a run went on from.

    Attributes:
        run: folder of the run that the checkpoint comes from.
        step: optimizer steps that were done there.
        checkpoint_sha256: digest of the checkpoint's seal, which has those of its files.
        changed: settings that differ, by key: there and here.
    """

    SEALED = True
    run: str
    step: int
    checkpoint_sha256: str
    changed: dict[str, tuple[Any, Any]]


def branch(run: Run, folder: RunDir, settings: dict[str, Any], before: dict[str, Any]) -> None:
    """Copy the checkpoint ``train.resume_from`` into a new run folder, with the records up to its step.

    Args:
        run: the config; ``train.resume_from`` is the path of a checkpoint.
        folder: the new run folder.
        settings: what decides what is learnt here, by key.
        before: the same of the run that the checkpoint comes from.

    Raises:
        RunError: the checkpoint is damaged or of other processes, or a setting differs that it depends on.
    """
    checkpoint = Path(str(run.train.resume_from))
    source = source_folder(run)
    fault = fault_of(checkpoint)
    if fault:
        raise RunError(f"train.resume_from: {checkpoint}: {fault}. Choose another checkpoint")
    changed = {
        key: (before.get(key), now) for key, now in settings.items() if before.get(key) != now
    }
    fixed = {key: pair for key, pair in changed.items() if key not in FREE_KEYS}
    if fixed:
        shown = "; ".join(f"{key} was {was!r}, is {now!r}" for key, (was, now) in fixed.items())
        raise RunError(
            f"train.resume_from: {checkpoint} belongs to a run with {shown}. The checkpoint depends on it; free to"
            f" change are {', '.join(sorted(FREE_KEYS - {'train.resume_from'}))}"
        )
    step = step_of(checkpoint)
    staged = stage(folder.checkpoints) / checkpoint.name
    shutil.copytree(checkpoint, staged)
    if fault_of(staged):
        raise RunError(
            f"train.resume_from: {checkpoint} has changed while it was copied; try again"
        )
    for name in ("metrics", "samples"):
        records = getattr(source, name)
        if records.is_file():
            kept = (record for record in read_jsonl(records) if record["step"] <= step)
            write_jsonl(getattr(folder, name), kept)
    if source.ledger.is_file():
        shutil.copyfile(source.ledger, folder.ledger)
    Lineage(
        run=str(source.path),
        step=step,
        checkpoint_sha256=file_sha256(checkpoint / SEAL),
        changed=changed,
    ).write(folder.path / LINEAGE)
    replace_folder(staged, folder.checkpoints / checkpoint.name)
    newest_checkpoint(folder.checkpoints, num_processes())


def source_folder(run: Run) -> RunDir:
    """Return the folder of the run that ``train.resume_from`` comes from."""
    return RunDir(Path(str(run.train.resume_from)).parent.parent)


@contextmanager
def own_settings(trainer: Any, checkpoint: str | None) -> Iterator[None]:
    """Let what is loaded in the ``with`` block follow this run's settings, if it is the checkpoint of another run.

    A loaded optimizer and schedule have the rate and the decay that were saved with them. ``trainer`` is the Trainer.
    """
    origin = trainer.run.train.resume_from
    if not checkpoint or origin is None or Path(checkpoint).name != Path(str(origin)).name:
        yield
        return
    optimizer: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    schedule: Any = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    rate = trainer.args.learning_rate
    yield
    schedule.base_lrs = [rate] * len(decays)
    schedule._last_lr = [rate * shape(schedule.last_epoch) for shape in schedule.lr_lambdas]
    for group, decay, now in zip(optimizer.param_groups, decays, schedule._last_lr, strict=True):
        group.update(initial_lr=rate, lr=now, weight_decay=decay)
