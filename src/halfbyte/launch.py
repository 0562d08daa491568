"""Owns what we know of the launcher that started this process: its end, the processes and threads that were chosen."""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from halfbyte.errors import RunError
from halfbyte.faults import RUNNING
from halfbyte.host import num_cores, num_processes

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LAUNCHERS = ("accelerate", "torchrun", "torch.distributed")
OURS = "HALFBYTE_LAUNCHER"  # process id of ``start_processes``


def follow_launcher() -> None:
    """Get SIGTERM when the launcher dies: ``accelerate launch`` hands on no signals (Linux)."""
    parent = os.getppid()
    if launcher_words() or os.environ.get(OURS) == str(parent):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:  # it died meanwhile
            os.kill(os.getpid(), signal.SIGTERM)


def was_launched() -> bool:
    """Return whether a launcher started this process as one of several, or as the only one."""
    return "RANK" in os.environ


def check_processes(wanted_here: int | None = None) -> None:
    """Check that as many processes were started as the launcher's command line says, and ours.

    ``accelerate launch --cpu --num_processes 2`` starts one and says nothing (accelerate 1.15).

    Args:
        wanted_here: what ``--processes`` of ``halfbyte train`` says; None: nothing.

    Raises:
        RunError: there are fewer, or others than ``--processes``.
    """
    if wanted_here is not None and wanted_here != num_processes():
        raise RunError(
            f"--processes is {wanted_here}, and a launcher has started {num_processes()}; leave --processes out"
        )
    wanted = _value("num_processes")
    if wanted.isdigit() and int(wanted) > num_processes():
        raise RunError(
            f"accelerate launch: --num_processes is {wanted}, and {num_processes()} was started: it starts several"
            f" on GPUs alone. On the CPU: halfbyte train --processes {wanted} {shlex.join(RUNNING[1:])}"
        )


def start_processes(count: int, words: Sequence[str]) -> int:
    """Run ``halfbyte train`` in processes that train together, and return the exit code of the first that failed.

    They get the signals that this process gets, and share the cores of the machine.

    Args:
        count: of processes.
        words: of each process's command line, without the command's name.

    Raises:
        RunError: there are GPUs, but fewer than processes.
    """
    import torch
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    gpus = torch.cuda.device_count()
    if 0 < gpus < count:
        raise RunError(f"--processes is {count}, and there are {gpus} GPUs: each process takes one")
    # What has failed has said so itself.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // count)))
    os.environ[OURS] = str(os.getpid())
    agent = ["--standalone", f"--nproc-per-node={count}", "--module", "halfbyte", "train"]
    try:
        torchrun.run(torchrun.parse_args([*agent, *words]))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return int(failure.exitcode) if failure.exitcode > 0 else 128 - int(failure.exitcode)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def threads_were_chosen() -> bool:
    """Whether the user chose a number of threads; accelerate sets OMP_NUM_THREADS=1 where nobody did."""
    return "OMP_NUM_THREADS" in _launcher_environ() or bool(_value("num_cpu_threads_per_process"))


def launcher_words() -> list[str]:
    """Return the command line of our launcher, or nothing if none is known (other systems than Linux)."""
    words = _entries("cmdline")
    return words if any(name in " ".join(words) for name in LAUNCHERS) else []


def _launcher_environ() -> set[str]:
    """Return the names in the environment in which our launcher was started."""
    return {entry.partition("=")[0] for entry in _entries("environ")} if launcher_words() else set()


def _value(option: str) -> str:
    """Return the value of an option on the launcher's command line, or ""."""
    words = launcher_words()
    for number, word in enumerate(words):
        name, _, value = word.partition("=")
        if name.replace("-", "_") == f"__{option}":
            return value or (words[number + 1] if number + 1 < len(words) else "")
    return ""


def _entries(file: str) -> list[str]:
    """Return the NUL-separated entries of a file in our parent's /proc folder."""
    if not sys.platform.startswith("linux"):
        return []
    try:
        content = Path(f"/proc/{os.getppid()}/{file}").read_bytes()
    except OSError:
        return []
    return content.decode(errors="replace").split("\0")[:-1]
