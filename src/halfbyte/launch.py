"""Owns what we know of the launcher that started this process: its end, the processes and threads that were chosen."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import sys
from pathlib import Path

from halfbyte.errors import RunError
from halfbyte.host import num_processes

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LAUNCHERS = ("accelerate", "torchrun", "torch.distributed")


def follow_launcher() -> None:
    """Get SIGTERM when the launcher dies: ``accelerate launch`` hands on no signals (Linux)."""
    parent = os.getppid()
    if launcher_words():
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:  # it died meanwhile
            os.kill(os.getpid(), signal.SIGTERM)


def check_processes() -> None:
    """Check that as many processes were started as the launcher's command line says.

    ``accelerate launch --cpu --num_processes 2`` starts one and says nothing (accelerate 1.15).

    Raises:
        RunError: there are fewer.
    """
    wanted = _value("num_processes")
    if wanted.isdigit() and int(wanted) > num_processes():
        raise RunError(
            f"accelerate launch: --num_processes is {wanted}, and {num_processes()} was started: it starts several"
            f" on GPUs alone. On the CPU: torchrun --nproc_per_node {wanted} {shlex.join(sys.argv)}"
        )


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
