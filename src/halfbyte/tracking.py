"""Owns beginning a Weights & Biases run: in the mode that is possible, never asking, never blocking for long."""

from __future__ import annotations

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
from halfbyte.run_dir import RunDir, read_json, write_json

INIT_TIMEOUT_S = 8.0
FINISH_TIMEOUT_S = 60.0
RUN_ID_FILE = "wandb_run.json"


def start_wandb(run: Run, folder: RunDir, job: str = "train") -> Any:
    """A W&B run in the mode that is possible, or None.

    All that is done with a run folder lies in one group; ``job`` says what it is.
    """
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
            name=run.name if job == "train" else f"{run.name}-{job}",
            group=told["group"],
            id=f"{told['group']}-{told['attempts']}{suffix}",
            job_type=job,
            dir=str(folder.path if job == "train" else folder.eval),
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
    if job == "train":
        started.define_metric("step")
        started.define_metric("*", step_metric="step")
    return started


def where(started: Any) -> str:
    """What to tell the user about a W&B run."""
    if started is None:
        return "off"
    if started.settings.mode == "offline":
        return f"offline, send it later: wandb sync {Path(started.dir).parent}"
    return str(started.url)


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
