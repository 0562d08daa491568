"""Owns starting a Weights & Biases run in the mode that is possible, never prompting or blocking for long."""

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
    """Start a W&B run in the mode that is possible, or return None where it is off.

    The W&B runs of one run folder share a group; ``job`` is the type of this one.

    Raises:
        RunError: W&B is wanted, but its library is not installed.
    """
    mode = choose_mode(run.track.wandb)
    if mode == "off":
        return None
    if find_spec("wandb") is None:
        if run.track.wandb != "auto":
            raise RunError(f"track.wandb is {mode}: pip install 'halfbyte[wandb]', or set auto")
        return None
    # Read when wandb is first imported; without it, notices would break the progress bar.
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    id_file = folder.path / RUN_ID_FILE
    run_id: dict[str, Any] = (
        read_json(id_file) if id_file.is_file() else {"group": secrets.token_hex(4), "attempts": 0}
    )
    run_id["attempts"] += 1
    write_json(id_file, run_id)

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
            group=run_id["group"],
            id=f"{run_id['group']}-{run_id['attempts']}{suffix}",
            job_type=job,
            dir=str(folder.path if job == "train" else folder.eval),
            config=run.model_dump(mode="json"),
            settings=settings,
        )

    try:
        wandb_run = init(mode, "")
    except wandb.errors.Error as error:
        if mode == "offline":
            raise
        print(f"warning: W&B cannot be reached ({error}); recording offline", file=sys.stderr)
        wandb_run = init("offline", "-offline")
    if job == "train":
        wandb_run.define_metric("step")
        wandb_run.define_metric("*", step_metric="step")
    return wandb_run


def where(wandb_run: Any) -> str:
    """Tell the user where a W&B run is recorded."""
    if wandb_run is None:
        return "off"
    if wandb_run.settings.mode == "offline":
        return f"offline, upload it later: wandb sync {Path(wandb_run.dir).parent}"
    return str(wandb_run.url)


def choose_mode(wanted: str) -> str:
    """Return ``online``, ``offline`` or ``off``; under ``auto`` WANDB_MODE and WANDB_DISABLED are obeyed.

    Online needs a key, because without one W&B would prompt for it.
    """
    mode = os.environ.get("WANDB_MODE", "").lower()
    if wanted == "auto":
        disabled = os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes")
        if mode in ("disabled", "off") or disabled:
            return "off"
        return "offline" if mode in ("offline", "dryrun") or not _has_key() else "online"
    if wanted == "online" and not _has_key():
        print(
            "warning: track.wandb is online, but there is no W&B key; recording offline",
            file=sys.stderr,
        )
        return "offline"
    return wanted


def _has_key() -> bool:
    """Return whether the environment or netrc has a key for the W&B server, without prompting."""
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
