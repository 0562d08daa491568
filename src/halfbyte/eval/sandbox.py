"""Owns running programs that a model wrote: each in a process that can compute, and nothing else.

What holds a program is the kernel, not Python: Landlock (landlock(7)) leaves it its own language's files to
read and none to write, seccomp (seccomp(2)) neither processes nor sockets nor signals to others, and limits
bound its memory and time. Where the kernel has these not, nothing is run.
"""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from halfbyte.errors import UserError

TIMEOUT_S = 5.0
MEMORY_BYTES = 1 << 30
WORKER = Path(__file__).with_name("sandbox_worker.py")
UNABLE = 77  # the worker's exit code where the kernel cannot hold a program
TOLD_CHARS = 2000
GRACE_S = 10.0  # for the interpreter to start on a busy machine

End = Literal["passed", "failed", "timeout"]


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        end: ``passed`` if it ran to its last line.
        told: the end of what Python said, where it failed.
    """

    end: End
    told: str = ""


def run_program(
    source: str, *, timeout_s: float = TIMEOUT_S, memory_bytes: int = MEMORY_BYTES
) -> Outcome:
    """Run Python source to its end: an exception, an exit or a limit before it is a failure.

    The program sees an empty environment and an empty folder, and no packages beside the standard library.

    Args:
        source: statements; for a benchmark the answer and the tests that must hold.
        timeout_s: of processor time, and of the clock once the program runs.
        memory_bytes: of its address space, the interpreter's own included.

    Raises:
        UserError: this system cannot hold a program.
    """
    if sys.platform != "linux":
        raise UserError(
            f"programs are run on Linux alone, where the kernel can hold them; this is {sys.platform}"
        )
    # Only a program that ran to its end can say this: it is read before the program is known.
    word = secrets.token_hex(16)
    asked = f"{word} {timeout_s} {memory_bytes}\n{source}".encode("utf-8", "surrogatepass")
    with (
        tempfile.TemporaryDirectory(prefix="halfbyte-program-") as folder,
        tempfile.TemporaryFile() as said,
        tempfile.TemporaryFile() as complained,
    ):
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=complained,
            env={},
            cwd=folder,
            start_new_session=True,
        )
        try:
            process.communicate(asked, timeout=timeout_s + GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return Outcome("timeout")
        said.seek(0)
        complained.seek(0)
        end, told = said.read(), complained.read().decode(errors="replace")
    if process.returncode == UNABLE:
        raise UserError(
            f"programs cannot be run here: {told.strip()}. They need Linux 5.13 or newer with Landlock and"
            " seccomp, on x86-64 or ARM64; leave the benchmark out"
        )
    if end == word.encode():
        return Outcome("passed")
    is_late = -process.returncode in (signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL)
    return Outcome("timeout" if is_late else "failed", told[-TOLD_CHARS:])
