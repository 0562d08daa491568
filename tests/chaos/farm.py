"""Runs the project's scripts in forked children of a process that has the libraries loaded: seconds instead of ten."""

from __future__ import annotations

import gc
import io
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toys import run_script

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120.0
PATIENCE_S = 20.0  # of processes that train together for one that ended with an error
CRASHED = 99  # exit code of a child that ended in a traceback


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: its exit code, −N after signal N, None if it hung and was killed.
        seconds: how long it took.
        text: what it printed.
        peak_bytes: the largest resident size that it had.
    """

    code: int | None
    seconds: float
    text: str
    peak_bytes: int = 0

    @property
    def crash(self) -> str:
        """Why this is no end that a user should see, or ""."""
        if self.code is None:
            return f"hung for {self.seconds:.0f} s"
        if self.code == CRASHED or "Traceback (most recent call last)" in self.text:
            return f"traceback: {self.text.strip()[-300:]}"
        return ""

    def says(self, *texts: str) -> str:
        """Why what it printed is not what is wanted, or ""."""
        missing = [text for text in texts if text not in self.text]
        shown = " / ".join(self.text.strip().splitlines()[-3:])[-400:]
        return self.crash or (f"does not say {missing}: {self.code}: {shown}" if missing else "")


def load_libraries() -> None:
    """Import what the scripts import, once, in the process that is forked."""
    from halfbyte.libraries import quiet_libraries

    quiet_libraries()
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch
    import tqdm.auto
    import transformers.integrations.bitsandbytes
    import transformers.models.llama.modeling_llama
    import transformers.quantizers.auto  # noqa: F401

    import halfbyte.data.prepare
    import halfbyte.data.preview
    import halfbyte.eval.compare
    import halfbyte.eval.report
    import halfbyte.plan.gate
    import halfbyte.ship.export
    import halfbyte.ship.merge
    import halfbyte.train.probe
    import halfbyte.train.session
    import halfbyte.train.trainer  # noqa: F401

    torch.set_num_threads(1)
    # The default one is shared by all forks, and a child that is killed while it has it would keep it for ever.
    tqdm.auto.tqdm.set_lock(threading.RLock())
    _remember_traces()


def warm_up(config: Path) -> None:
    """Train in this process, so that its children find all that a training loads and plans."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        run_script("train/sft.py", config)
    gc.collect()
    gc.freeze()  # what is loaded is neither searched nor copied in the children


def _remember_traces() -> None:
    """Trace a training step once for all children that plan the same one after it is known here."""
    from halfbyte.plan.step import TracedStep

    begin, trace = TracedStep.__init__, TracedStep._run
    known: dict[Any, Any] = {}

    def remember(self: Any, config: Any, *rest: Any, **more: Any) -> None:
        begin(self, config, *rest, **more)
        self.traced_for = f"{config.to_json_string()} {rest} {more}"

    def look_up(self: Any, layers: Any, shape: Any, work: Any) -> Any:
        key = (self.traced_for, layers, shape, work.__name__)
        if key not in known:
            known[key] = trace(self, layers, shape, work)
        return known[key]

    TracedStep.__init__ = remember  # type: ignore[method-assign]
    TracedStep._run = look_up  # type: ignore[method-assign]


def start(
    script: str,
    arguments: Sequence[object],
    *,
    log: Path,
    environ: Mapping[str, str] | None = None,
    before: Callable[[], None] = lambda: None,
) -> int:
    """Fork a child that runs a script, and return its process id.

    Args:
        script: path of the script in the project.
        arguments: its command line.
        log: file for what it prints.
        environ: variables to set in it.
        before: called in it before the script.
    """
    child = os.fork()
    if child:
        return child
    code = CRASHED
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = [str(ROOT / script), *map(str, arguments)]
        before()
        os.environ.update(environ or {})
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(child: int, log: Path, timeout_s: float = TIMEOUT_S) -> Ended:
    """Wait for a child; one that takes too long is killed with all of its own."""
    begun = time.monotonic()
    while (seconds := time.monotonic() - begun) < timeout_s:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return Ended(code, seconds, _text(log), 1024 * usage.ru_maxrss)
        time.sleep(0.01)
    stop(child)
    return Ended(None, seconds, _text(log))


def stop(child: int) -> None:
    """Kill a child's whole session."""
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(child, 0)


def run(
    script: str,
    *arguments: object,
    log: Path,
    environ: Mapping[str, str] | None = None,
    before: Callable[[], None] = lambda: None,
    timeout_s: float = TIMEOUT_S,
) -> Ended:
    """Run a script in a child to its end."""
    child = start(script, arguments, log=log, environ=environ, before=before)
    return wait(child, log, timeout_s)


def run_together(
    script: str,
    *arguments: object,
    log: Path,
    port: int,
    environ: Sequence[Mapping[str, str]] = ({}, {}),
    before: Callable[[], None] = lambda: None,
    meanwhile: Callable[[list[int]], None] = lambda children: None,
) -> list[Ended]:
    """Run a script in processes that train together, as torchrun starts them; if one dies the others are killed.

    One that ends with an error is waited for by the others, which may do the same.

    Args:
        script: path of the script in the project.
        arguments: its command line.
        log: file for what they print; each has a suffix of its own.
        port: a free port on which they meet.
        environ: variables to set in each of them.
        before: called in each before the script.
        meanwhile: called with their process ids when all are started.
    """
    world = str(len(environ))
    children: dict[int, int] = {}
    logs = [log.with_suffix(f".{rank}") for rank in range(len(environ))]
    for rank, own in enumerate(environ):
        places = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }
        own_environ = {**places, **own}
        child = start(script, arguments, log=logs[rank], environ=own_environ, before=before)
        children[child] = rank
    meanwhile(list(children))
    ended: dict[int, Ended] = {}
    begun = time.monotonic()
    while len(ended) < len(environ):
        for child, rank in children.items():
            if rank in ended:
                continue
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                seconds = time.monotonic() - begun
                code = os.waitstatus_to_exitcode(status)
                ended[rank] = Ended(code, seconds, _text(logs[rank]))
        now = time.monotonic() - begun
        late = now > TIMEOUT_S
        died = any(
            end.code and (end.code < 0 or now - end.seconds > PATIENCE_S) for end in ended.values()
        )
        if late or died:
            for child, rank in children.items():
                if rank not in ended:
                    stop(child)
                    killed = None if late else -signal.SIGKILL
                    ended[rank] = Ended(killed, time.monotonic() - begun, _text(logs[rank]))
        time.sleep(0.01)
    return [ended[rank] for rank in range(len(environ))]


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
