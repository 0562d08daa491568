"""Owns where numbers go during training: metrics.jsonl always, Weights & Biases beside it."""

from __future__ import annotations

import math
import netrc
import os
import secrets
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from halfbyte.config.schema import Run
from halfbyte.errors import RunError
from halfbyte.run_dir import RunDir, append_jsonl, read_json, read_jsonl, write_json, write_jsonl

INIT_TIMEOUT_S = 8.0
FINISH_TIMEOUT_S = 60.0
RUN_ID_FILE = "wandb_run.json"


class Tracker:
    """Writes each record to metrics.jsonl and, unless W&B is off, to a W&B run.

    W&B never asks and never blocks for long: without a key, or without an answer within seconds, the
    run is recorded offline. Each attempt at a run is a W&B run of its own in one group, and begins
    with the records that are kept from earlier attempts. Only rank 0 makes a Tracker.

    Args:
        run: the resolved config; it goes to W&B whole, and holds no secrets.
        folder: the run folder.
        resume_step: records after this step belong to work that was lost, and are removed.
    """

    def __init__(self, run: Run, folder: RunDir, resume_step: int = 0) -> None:
        self.folder = folder
        kept = _keep(folder.metrics, resume_step)
        _keep(folder.samples, resume_step)
        self.num_tokens = max((record.get("num_tokens", 0) for record in kept), default=0)
        evaluated = [(r["step"], r["eval_loss"]) for r in kept if "eval_loss" in r]
        self.evaluated: tuple[int, float | None] = evaluated[-1] if evaluated else (-1, None)
        self.wandb: Any = _start(run, folder)
        if self.wandb is not None:
            for record in kept:
                self.wandb.log(record)

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

    def summarise(self, values: dict[str, Any]) -> None:
        """Figures of the whole run, for W&B's table of runs; the manifest has them too."""
        if self.wandb is not None:
            self.wandb.summary.update(values)

    def write_samples(self, step: int, samples: list[dict[str, str]]) -> None:
        """Write answers to held-out prompts to samples.jsonl, and to W&B as a table."""
        for sample in samples:
            append_jsonl(self.folder.samples, {"step": step, **sample})
        if self.wandb is not None and samples:
            import wandb

            table = wandb.Table(columns=["at_step", *samples[0]])
            for sample in samples:
                table.add_data(step, *sample.values())
            self.wandb.log({"samples": table})

    def finish(self, adapter: Path | None) -> None:
        """End the W&B run: well with the adapter as an artifact, or as failed without."""
        if self.wandb is None:
            return
        if adapter is not None:
            import wandb

            artifact = wandb.Artifact(f"adapter-{self.wandb.id}", type="model")
            artifact.add_dir(str(adapter))
            self.wandb.log_artifact(artifact)
        self.wandb.finish(exit_code=0 if adapter is not None else 1)
        self.wandb = None


def _keep(path: Path, resume_step: int) -> list[dict[str, Any]]:
    """Rewrite a file of records without those after ``resume_step``; returns what is kept."""
    known = read_jsonl(path) if path.is_file() else ()
    kept = [record for record in known if record["step"] <= resume_step]
    write_jsonl(path, kept)
    return kept


def _start(run: Run, folder: RunDir) -> Any:
    """A W&B run in the mode that is possible, or None."""
    mode = choose_mode(run.track.wandb)
    if mode == "off":
        return None
    if find_spec("wandb") is None:
        if run.track.wandb != "auto":
            raise RunError(f"track.wandb is {mode}: pip install 'halfbyte[wandb]', or set auto")
        return None
    # Read when wandb is first imported; its notices would break the progress bar.
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    known = folder.path / RUN_ID_FILE
    told: dict[str, Any] = (
        read_json(known) if known.is_file() else {"group": secrets.token_hex(4), "attempts": 0}
    )
    told["attempts"] += 1
    write_json(known, told)

    def init(mode: Any, suffix: str) -> Any:
        settings = wandb.Settings(
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
            silent=True,
            console="off",
            disable_git=True,
        )
        return wandb.init(
            mode=mode,
            project=run.track.project,
            entity=run.track.entity,
            tags=run.track.tags,
            name=run.name,
            group=told["group"],
            id=f"{told['group']}-{told['attempts']}{suffix}",
            dir=str(folder.path),
            config=run.model_dump(mode="json"),
            settings=settings,
        )

    try:
        started = init(mode, "")
    except wandb.errors.Error as error:
        if mode == "offline":
            raise
        print(f"warning: W&B cannot be reached ({error}); recording offline", file=sys.stderr)
        started = init("offline", "-offline")
    started.define_metric("step")
    started.define_metric("*", step_metric="step")
    return started


def choose_mode(wanted: str) -> str:
    """``online``, ``offline`` or ``off``; WANDB_MODE and WANDB_DISABLED are obeyed under ``auto``.

    Online needs a key: without one W&B would ask for it.
    """
    mode = os.environ.get("WANDB_MODE", "").lower()
    if wanted == "auto":
        disabled = os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes")
        if mode in ("disabled", "off") or disabled:
            return "off"
        return "offline" if mode in ("offline", "dryrun") or not _has_key() else "online"
    if wanted == "online" and not _has_key():
        print(
            "warning: track.wandb is online, but no W&B key is found; recording offline",
            file=sys.stderr,
        )
        return "offline"
    return wanted


def _has_key() -> bool:
    """Whether a key is in the environment or in netrc for the W&B server; nothing is asked."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    if find_spec("wandb") is None:
        return False
    import wandb

    server = os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return urlparse(server).hostname in hosts or "api.wandb.ai" in hosts
