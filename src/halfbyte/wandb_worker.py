"""Owns the process that alone talks to Weights & Biases: ``python -m halfbyte.wandb_worker``, one JSON command a line.

The first line has the arguments of ``wandb.init``; the reply, one line, says where the run is recorded. Whatever fails
here is written to standard error, and costs records in W&B, which are also in metrics.jsonl.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROBE_S = 2.0
NICENESS = 10  # the training goes first
LAST_SECONDS = 600  # for what is still to be uploaded when the training has ended


def main() -> None:
    """Follow commands until they end; then let W&B finish, within a bounded time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the training, which then ends us
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    warnings.simplefilter("ignore")
    replies, sys.stdout = sys.stdout, sys.stderr
    run = _start(json.loads(sys.stdin.readline()))
    about = {"offline": run.settings.mode == "offline", "id": run.id, "url": run.url}
    about |= {"dir": str(Path(run.dir).parent), "entity": run.entity, "project": run.project}
    print(json.dumps(about), file=replies, flush=True)
    code = 1  # unless the training says otherwise, it has died
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "finish":
            code = command["code"]
            break
        try:
            DO[command.pop("do")](run, **command)
        except Exception as error:  # one record is lost, and the training goes on
            print(f"{type(error).__name__}: {error}", flush=True)
    signal.alarm(LAST_SECONDS)
    run.finish(exit_code=code)


def _start(first: dict[str, Any]) -> Any:
    """Start the W&B run, offline if the server cannot be reached or answers nonsense."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    timeouts, options = first["timeouts"], first["options"]
    if options["mode"] == "online" and not server_answers():
        options["mode"] = "offline"
    settings = {"silent": True, "console": "off", "disable_git": True, **timeouts}
    try:
        run = wandb.init(**options, settings=wandb.Settings(**settings))
    except Exception as error:
        if options["mode"] == "offline":
            raise
        print(f"W&B cannot be reached ({error}); recording offline", flush=True)
        options |= {"mode": "offline", "id": f"{options['id']}-offline"}
        run = wandb.init(**options, settings=wandb.Settings(**settings))
    if first["by_step"]:
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
    return run


def server_answers() -> bool:
    """Return whether W&B's server answers at all, be it an error: W&B itself would try for a minute and longer."""
    server = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    try:
        urllib.request.urlopen(server, timeout=PROBE_S)
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError, http.client.HTTPException) as error:
        print(f"{server} does not answer ({error}); recording offline", file=sys.stderr, flush=True)
        return False
    return True


def _table(run: Any, name: str, columns: list[str], rows: list[list[Any]]) -> None:
    import wandb

    run.log({name: wandb.Table(columns=columns, data=rows)})


def _page(run: Any, name: str, path: str) -> None:
    import wandb

    run.log({name: wandb.Html(Path(path).read_text(encoding="utf-8"), inject=False)})


def _artifact(run: Any, name: str, kind: str, paths: list[str]) -> None:
    import wandb

    artifact = wandb.Artifact(f"{name}-{run.id}", type=kind)
    for path in map(Path, paths):
        if path.is_dir():
            artifact.add_dir(str(path))
        elif path.is_file():
            artifact.add_file(str(path))
    run.log_artifact(artifact)


DO: dict[str, Callable[..., None]] = {
    "log": lambda run, values: run.log(values),
    "summary": lambda run, values: run.summary.update(values),
    "table": _table,
    "page": _page,
    "artifact": _artifact,
}

if __name__ == "__main__":
    main()
