"""Owns tracking with Weights & Biases from a process of its own, which can neither end nor delay a training."""

from __future__ import annotations

import json
import netrc
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlparse

from halfbyte.config.schema import Run
from halfbyte.errors import RunError
from halfbyte.run_dir import RunDir, read_json, write_json
from halfbyte.wandb_worker import PROBE_S, server_answers

INIT_TIMEOUT_S = 8.0  # of W&B's own, within its process
LAST_WAIT_S = 2.0  # that we wait for it, in all
MAX_QUEUED = 10_000  # records; beyond them the newest are dropped
RUN_ID_FILE = "wandb_run.json"


class WandbRun:
    """A W&B run, recorded by another process.

    Every method returns at once; what W&B cannot take is dropped and counted.

    Args:
        first: the first line for ``halfbyte.wandb_worker``.
        log: file for what that process prints.
    """

    def __init__(self, first: dict[str, Any], log: Any) -> None:
        self._queue: queue.Queue[dict[str, Any]] = queue.Queue(MAX_QUEUED)
        self.num_dropped = 0
        self.about: dict[str, Any] = {}
        self._waited_s = 0.0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "halfbyte.wandb_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            text=True,
        )
        self._queue.put_nowait(first)
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._writer.start()
        self._reader.start()

    def log(self, values: dict[str, Any]) -> None:
        """Record a row of numbers."""
        self._put(do="log", values=values)

    def summarise(self, values: dict[str, Any]) -> None:
        """Record figures of the whole run."""
        self._put(do="summary", values=values)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Record a table."""
        self._put(do="table", name=name, columns=columns, rows=rows)

    def page(self, name: str, path: str) -> None:
        """Record an HTML page."""
        self._put(do="page", name=name, path=path)

    def artifact(self, name: str, kind: str, paths: list[str]) -> None:
        """Record files and folders as an artifact, whose name ends in the id of the run."""
        self._put(do="artifact", name=name, kind=kind, paths=paths)

    def finish(self, code: int = 0) -> None:
        """End the run and wait a little; what is still to be uploaded is uploaded without us."""
        self._put(do="finish", code=code)
        self._wait(self._process)
        if self._process.poll() is None:
            place = self.about.get("dir", "the wandb folder of the run")
            print(
                f"W&B goes on in process {self._process.pid}; should it not end well: wandb sync {place}",
                file=sys.stderr,
            )
        elif hasattr(os, "killpg"):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)  # W&B's own, if ours was killed
        if self.num_dropped:
            print(
                f"warning: {self.num_dropped} records did not reach W&B; all are in metrics.jsonl",
                file=sys.stderr,
            )

    @property
    def where(self) -> str:
        """Where the run is recorded, for the user."""
        self._wait(self._reader)
        if not self.about:
            return "still starting; all numbers are in metrics.jsonl"
        if self.about["offline"]:
            return f"offline, upload it later: wandb sync {self.about['dir']}"
        return str(self.about["url"])

    def _put(self, **command: Any) -> None:
        try:
            self._queue.put_nowait(command)
        except queue.Full:
            self.num_dropped += 1

    def _wait(self, other: subprocess.Popen[str] | threading.Thread) -> None:
        """Wait for a thread or the process, ``LAST_WAIT_S`` over all calls."""
        begun = time.monotonic()
        left_s = max(0.0, LAST_WAIT_S - self._waited_s)
        if isinstance(other, threading.Thread):
            other.join(left_s)
        else:
            with suppress(subprocess.TimeoutExpired):
                other.wait(left_s)
        self._waited_s += time.monotonic() - begun

    def _write(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):  # the process has ended
            while True:
                command = self._queue.get()
                self._process.stdin.write(json.dumps(command) + "\n")
                self._process.stdin.flush()
                if command.get("do") == "finish":
                    return

    def _read(self) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        with suppress(ValueError):
            self.about = json.loads(line)


def start_wandb(run: Run, folder: RunDir, job: str = "train") -> WandbRun | None:
    """Start a W&B run in the mode that is possible, or return None where it is off.

    The W&B runs of one run folder share a group; ``job`` is the type of this one.

    Raises:
        RunError: W&B is wanted, but its library is not installed.
    """
    mode = _possible_mode(run)
    if mode == "off":
        return None
    id_file = folder.path / RUN_ID_FILE
    run_id: dict[str, Any] = (
        read_json(id_file) if id_file.is_file() else {"group": secrets.token_hex(4), "attempts": 0}
    )
    run_id["attempts"] += 1
    write_json(id_file, run_id)
    place = folder.path if job == "train" else folder.eval
    options = {
        "mode": mode,
        "project": run.track.project,
        "entity": run.track.entity,
        "tags": run.track.tags,
        "name": run.name if job == "train" else f"{run.name}-{job}",
        "group": run_id["group"],
        "id": f"{run_id['group']}-{run_id['attempts']}",
        "job_type": job,
        "dir": str(place),
        "config": run.model_dump(mode="json"),
    }
    timeouts = {"init_timeout": INIT_TIMEOUT_S}
    first = {"options": options, "timeouts": timeouts, "by_step": job == "train"}
    try:
        with (place / "wandb.log").open("a", encoding="utf-8") as log:
            return WandbRun(first, log)
    except OSError as error:
        print(f"warning: W&B cannot be started ({error}); metrics.jsonl has all", file=sys.stderr)
        return None


def where(wandb_run: WandbRun | None) -> str:
    """Tell the user where a W&B run is recorded."""
    return "off" if wandb_run is None else wandb_run.where


def outlook(run: Run) -> str:
    """Return in words how a run would be recorded; of W&B's server an answer is awaited for two seconds.

    Raises:
        RunError: as ``start_wandb``.
    """
    mode = _possible_mode(run)
    if mode == "off":
        return "off; metrics.jsonl has all numbers"
    if mode == "online":
        answers: list[bool] = []
        probe = threading.Thread(target=lambda: answers.append(server_answers()), daemon=True)
        probe.start()
        probe.join(PROBE_S)  # its own time is for each part of an answer
        if answers == [True]:
            return "online, and its server answers"
    return "offline, to be uploaded later"


def _possible_mode(run: Run) -> str:
    """Return the mode that a run will have, with the library that is installed or not."""
    mode = choose_mode(run.track.wandb)
    if mode == "off" or find_spec("wandb") is not None:
        return mode
    if run.track.wandb != "auto":
        raise RunError(f"track.wandb is {mode}: pip install 'halfbyte[wandb]', or set auto")
    return "off"


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
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    if not hosts or "api.wandb.ai" in hosts or find_spec("wandb") is None:
        return bool(hosts)
    import wandb

    server = os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url
    return urlparse(server).hostname in hosts
