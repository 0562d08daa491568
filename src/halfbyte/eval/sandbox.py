"""Owns running programs that a model wrote, each in a process that can compute and do nothing else.

The kernel confines a program, not Python: Landlock (landlock(7)) lets it read only the files of Python itself
and write none, seccomp (seccomp(2)) denies processes, sockets and signals to others, and resource limits
bound its memory and time. Where the kernel lacks these, nothing is run.
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
UNSUPPORTED = 77  # the worker's exit code where the kernel cannot confine a program
ERROR_CHARS = 2000
GRACE_S = 10.0  # for the interpreter to start on a busy machine

End = Literal["passed", "failed", "timeout"]


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        end: ``passed`` if it ran to its last line.
        error: the end of Python's error message, where the program failed.
    """

    end: End
    error: str = ""


def run_program(
    source: str, *, timeout_s: float = TIMEOUT_S, memory_bytes: int = MEMORY_BYTES
) -> Outcome:
    """Run Python source; an exception, an exit or a limit before its end is a failure.

    The program sees an empty environment and an empty folder, and no packages but the standard library.

    Args:
        source: Python statements; for a benchmark the answer and the tests that it must pass.
        timeout_s: limit of processor time, and of wall-clock time once the program runs.
        memory_bytes: limit of the address space, including the interpreter.

    Raises:
        UserError: this system cannot confine a program.
    """
    if sys.platform != "linux":
        raise UserError(
            f"programs run only on Linux, where the kernel can confine them; this is {sys.platform}"
        )
    # The worker writes it back once the program has run to its end.
    secret = secrets.token_hex(16)
    request = f"{secret} {timeout_s} {memory_bytes}\n{source}".encode("utf-8", "surrogatepass")
    with (
        tempfile.TemporaryDirectory(prefix="halfbyte-program-") as folder,
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
    ):
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=stderr,
            env={},
            cwd=folder,
            start_new_session=True,
        )
        try:
            process.communicate(request, timeout=timeout_s + GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return Outcome("timeout")
        stdout.seek(0)
        stderr.seek(0)
        output, error = stdout.read(), stderr.read().decode(errors="replace")
    if process.returncode == UNSUPPORTED:
        raise UserError(
            f"programs cannot be run here: {error.strip()}. They need Linux 5.13 or newer with Landlock and"
            " seccomp, on x86-64 or ARM64; leave the benchmark out"
        )
    if output == secret.encode():
        return Outcome("passed")
    timed_out = -process.returncode in (signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL)
    return Outcome("timeout" if timed_out else "failed", error[-ERROR_CHARS:])
