"""Owns the tracking of numbers during training: always in metrics.jsonl, optionally in Weights & Biases."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.config.schema import Run
from halfbyte.errors import RunError
from halfbyte.run_dir import RunDir, append_jsonl, read_jsonl, write_jsonl
from halfbyte.tracking import start_wandb, where

if TYPE_CHECKING:
    from halfbyte.train.session import Session


class Tracker:
    """Writes each record to metrics.jsonl and, unless W&B is off, to a W&B run.

    W&B runs in a process of its own, never prompts and never blocks: without a key, or without a response, the run
    is recorded offline. Each attempt at a run is its own W&B run in a common group, and begins
    with the records kept from earlier attempts. Only rank 0 creates a Tracker.

    Args:
        run: the resolved config; it is sent to W&B in full, and holds no secrets.
        folder: the run folder.
        resume_step: records after this step belong to lost work, and are removed.
    """

    def __init__(self, run: Run, folder: RunDir, resume_step: int = 0) -> None:
        self.folder = folder
        kept = _keep(folder.metrics, resume_step)
        _keep(folder.samples, resume_step)
        self.num_tokens = max((record.get("num_tokens", 0) for record in kept), default=0)
        evaluated = [(r["step"], r["eval_loss"]) for r in kept if "eval_loss" in r]
        self.evaluated: tuple[int, float | None] = evaluated[-1] if evaluated else (-1, None)
        self.wandb = None if run.train.preflight_only else start_wandb(run, folder)
        if self.wandb is not None:
            for record in kept:
                self.wandb.log(record)

    @property
    def where(self) -> str:
        """A message for the user about W&B."""
        return where(self.wandb)

    def write(self, record: dict[str, Any]) -> None:
        """Write one record of plain numbers, including ``step``.

        Raises:
            RunError: a number is NaN or infinite; such a value is never replaced by another.
        """
        bad = {k: v for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
        if bad:
            raise RunError(
                f"step {record.get('step')}: {bad}: training has diverged. The newest checkpoint is from"
                " before; try a lower train.learning_rate"
            )
        append_jsonl(self.folder.metrics, record)
        if self.wandb is not None:
            self.wandb.log(record)

    def summarise(self, values: dict[str, Any]) -> None:
        """Send figures of the whole run to W&B's table of runs; they are also in the manifest."""
        if self.wandb is not None:
            self.wandb.summarise(values)

    def write_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Write answers to held-out prompts, with their scores, to samples.jsonl, and to W&B as a table."""
        for sample in samples:
            append_jsonl(self.folder.samples, {"step": step, **sample})
        if self.wandb is not None and samples:
            rows = [[step, *sample.values()] for sample in samples]
            self.wandb.table("samples", ["at_step", *samples[0]], rows)

    def finish(self, adapter: Path | None) -> None:
        """End the W&B run: successfully with the adapter as an artifact, or as failed if it is None."""
        if self.wandb is None:
            return
        if adapter is not None:
            self.wandb.artifact("adapter", "model", [str(adapter)])
        self.wandb.finish(0 if adapter is not None else 1)
        self.wandb = None


@contextmanager
def tracked(run: Run, session: Session) -> Iterator[Tracker | None]:
    """Track a run within the ``with`` block; yield None on ranks other than 0.

    At the end the W&B run receives the adapter, or is marked as failed if the block raised.
    """
    if not session.is_main:
        yield None
        return
    tracker = Tracker(run, session.folder, session.resume_step)
    try:
        yield tracker
    except BaseException:
        tracker.finish(None)
        raise
    tracker.finish(session.folder.adapter)


def _keep(path: Path, resume_step: int) -> list[dict[str, Any]]:
    """Rewrite a file of records without those after ``resume_step``; return the kept ones."""
    known = read_jsonl(path) if path.is_file() else ()
    kept = [record for record in known if record["step"] <= resume_step]
    write_jsonl(path, kept)
    return kept
