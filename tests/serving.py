"""A real server in a process of its own, for tests to call."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from toys import ROOT
from waiting import wait_until

START_S = 120
SERVING = re.compile(r"serving at (\S+)")


@dataclass
class Process:
    """A running server.

    Attributes:
        url: where it listens.
        popen: the process.
        log: what it has said so far.
    """

    url: str
    popen: subprocess.Popen[str]
    log: Path

    @property
    def rss_bytes(self) -> int:
        """Resident memory."""
        import psutil

        return int(psutil.Process(self.popen.pid).memory_info().rss)


@contextlib.contextmanager
def serving(log: Path, *arguments: object, keys: str = "") -> Iterator[Process]:
    """Start eval/serve.py on a free port, wait until it serves, and end it at last."""
    command = [sys.executable, str(ROOT / "eval" / "serve.py"), *map(str, arguments), "--port", "0"]
    # Nothing may want to compile: an image for servers has no compiler.
    told = {"HALFBYTE_API_KEYS": keys, "OMP_NUM_THREADS": "2", "CXX": "/nonexistent"}
    environment = dict(os.environ) | told
    with log.open("w") as stream:
        popen = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, text=True, env=environment
        )
        try:
            yield Process(_address(popen, log), popen, log)
        finally:
            if popen.poll() is None:
                popen.kill()
            popen.wait(20)


def _address(popen: subprocess.Popen[str], log: Path) -> str:
    def has_begun() -> object:
        return popen.poll() is not None or SERVING.search(log.read_text())

    wait_until(has_begun, "the server neither serves nor ends", START_S)
    serving = SERVING.search(log.read_text())
    if serving:
        return serving.group(1)
    raise AssertionError(f"the server does not serve:\n{log.read_text()}")
