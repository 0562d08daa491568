"""Owns bounds on what comes from elsewhere: the size of a file that is read, and time and memory of code in data."""

from __future__ import annotations

import json
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


class BoundError(ValueError):
    """Something is larger, or takes longer, than anything of its kind needs."""


def shorten(text: str, limit: int) -> str:
    """Return ``text``, cut at ``limit`` characters with an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def check_size(path: Path, max_bytes: int) -> None:
    """Check that a path is a file of bounded size.

    Raises:
        BoundError: it is larger, or no file: a pipe or a device may have no end.
        OSError: it cannot be looked at.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise BoundError(
            f"{path} is {'a folder' if path.is_dir() else 'a pipe or a device'}, not a file"
        )
    if about.st_size > max_bytes:
        raise BoundError(f"{path} has {about.st_size:,} bytes; allowed: {max_bytes:,}")


def read_text(path: Path, max_bytes: int) -> str:
    """Return the text of a UTF-8 file of bounded size.

    Raises:
        BoundError: as ``check_size``.
        OSError: it cannot be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    check_size(path, max_bytes)
    return path.read_text(encoding="utf-8")


def read_bounded_json(path: Path, max_bytes: int) -> Any:
    """Return the content of a JSON file from elsewhere.

    Raises:
        BoundError: as ``read_text``, or it is nested deeper than Python reads.
        ValueError: it is no JSON.
        OSError: it cannot be read.
    """
    try:
        return json.loads(read_text(path, max_bytes))
    except RecursionError:
        raise BoundError(f"{path} is nested too deep") from None


@contextmanager
def bounded(seconds: float, num_bytes: int) -> Iterator[None]:
    """Bound the processor time and the memory of what runs in the ``with`` block, in a main thread on Unix.

    Args:
        seconds: processor time of the process.
        num_bytes: address space that the process may take in addition.

    Raises:
        BoundError: the block takes more.
    """
    if resource is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise BoundError(f"takes more than {seconds:g} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGVTALRM, stop)
    limit = _address_space() + num_bytes
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    # Again and again: where a template is compiled, Jinja takes an error for "not constant" and goes on.
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds / 4)
    try:
        yield
    except MemoryError:
        raise BoundError(f"takes more than {num_bytes / 1e9:g} GB") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, before)


def _address_space() -> int:
    """Return the bytes of address space that this process has taken; elsewhere than on Linux a bound on them."""
    try:
        with open("/proc/self/statm", "rb") as stream:
            return int(stream.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 1 << 44
