"""Owns where numbers go during training: metrics.jsonl always, Weights & Biases beside it."""

from __future__ import annotations

import math
import netrc
import os
import secrets
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from halfbyte.config.schema import Run
from halfbyte.errors import RunError
from halfbyte.run_dir import RunDir, append_jsonl, read_json, read_jsonl, write_json, write_jsonl

INIT_TIMEOUT_S = 8.0
RUN_ID_FILE = "wandb_run.json"


class Tracker:
    """Writes each record to metrics.jsonl and, unless W&B is off, to a W&B run.

    W&B never asks and never blocks for long: without a key, or without an answer within seconds, the
    run is recorded offline. Only rank 0 makes a Tracker.

    Args:
        run: the resolved config; it goes to W&B whole, and holds no secrets.
        folder: the run folder.
        resume_step: records after this step belong to work that was lost, and are removed.
    """

    def __init__(self, run: Run, folder: RunDir, resume_step: int = 0) -> None:
        self.folder = folder
        self.mode = choose_mode(run.track.wandb)
        if folder.metrics.is_file():
            kept = [
                record for record in read_jsonl(folder.metrics) if record["step"] <= resume_step
            ]
            write_jsonl(folder.metrics, kept)
        else:
            write_jsonl(folder.metrics, [])
        self.wandb: Any = None
        if self.mode != "off":
            self.wandb = self._start(run)

    @property
    def where(self) -> str:
        """What to tell the user about W&B."""
        if self.wandb is None:
            return "off"
        if self.wandb.settings.mode == "offline":
            return f"offline, send it later: wandb sync {Path(self.wandb.dir).parent}"
        return str(self.wandb.url)

    def write(self, record: dict[str, Any]) -> None:
        """Write one record of plain numbers that holds ``step``.

        Raises:
            RunError: a number is NaN or infinite; it is never written as anything else.
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

    def write_samples(self, step: int, samples: list[dict[str, str]]) -> None:
        """Write answers to held-out prompts to samples.jsonl, and to W&B as a table."""
        for sample in samples:
            append_jsonl(self.folder.samples, {"step": step, **sample})
        if self.wandb is not None and samples:
            import wandb

            table = wandb.Table(columns=["step", *samples[0]])
            for sample in samples:
                table.add_data(step, *sample.values())
            self.wandb.log({"samples": table})

    def finish(self, adapter: Path | None) -> None:
        """End the W&B run, with the adapter as an artifact if there is one."""
        if self.wandb is None:
            return
        if adapter is not None:
            import wandb

            artifact = wandb.Artifact(f"adapter-{self.wandb.id}", type="model")
            artifact.add_dir(str(adapter))
            self.wandb.log_artifact(artifact)
        self.wandb.finish(exit_code=0 if adapter is not None else 1)

    def _start(self, run: Run) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        known = self.folder.path / RUN_ID_FILE
        run_id = read_json(known)["id"] if known.is_file() else secrets.token_hex(4)
        write_json(known, {"id": run_id})
        options: dict[str, Any] = {
            "project": run.track.project,
            "entity": run.track.entity,
            "tags": run.track.tags,
            "name": run.name,
            "id": run_id,
            "dir": str(self.folder.path),
            "config": run.model_dump(mode="json"),
            "resume": "allow",
        }
        quiet = {
            "init_timeout": INIT_TIMEOUT_S,
            "silent": True,
            "console": "off",
            "disable_git": True,
        }
        try:
            started = wandb.init(mode=self.mode, settings=wandb.Settings(**quiet), **options)
        except (
            wandb.errors.CommError,
            wandb.errors.UsageError,
            wandb.errors.AuthenticationError,
        ) as error:
            if self.mode == "offline":
                raise
            print(f"warning: W&B cannot be reached ({error}); recording offline", file=sys.stderr)
            started = wandb.init(mode="offline", settings=wandb.Settings(**quiet), **options)
        started.define_metric("step")
        started.define_metric("*", step_metric="step")
        return started


def choose_mode(wanted: str) -> str:
    """``online``, ``offline`` or ``off``; WANDB_MODE and WANDB_DISABLED are obeyed under ``auto``."""
    if wanted != "auto":
        return wanted
    mode = os.environ.get("WANDB_MODE", "").lower()
    disabled = os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes")
    if mode in ("disabled", "off", "dryrun") or disabled:
        return "offline" if mode == "dryrun" else "off"
    if mode == "offline":
        return "offline"
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
