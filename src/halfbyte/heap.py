"""Owns the C library's heap: blocks that are mapped, freed blocks that go back to the system."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MADV_PAGEOUT = 21
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MAPPED_BYTES = 128 << 10  # glibc's own start
MOST_MAPPED_BYTES = 32 << 20  # and what it rises to as blocks are freed


@contextmanager
def mapped_blocks() -> Iterator[None]:
    """Within it, large blocks go back to the system as they are freed, and leave no holes in the heap.

    For loading, whose temporaries die among weights that stay. Afterwards blocks are kept for the next
    use, as glibc does of itself once large ones have been freed (mallopt(3)); other C libraries are left
    as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, MOST_MAPPED_BYTES)
        mallopt(M_TRIM_THRESHOLD, 2 * MOST_MAPPED_BYTES)


def trim_heap() -> None:
    """Give freed blocks back to the system, holes among used ones too (malloc_trim(3)); glibc alone."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def release_pages() -> None:
    """Give back what loading has left resident: pages of checkpoints that were read, freed blocks.

    safetensors maps whole files, and a mapping lives as long as any tensor in it. Its clean pages come
    back from the file when they are read; changed ones stay (madvise(2), MADV_PAGEOUT, Linux 5.4).
    Elsewhere than on Linux with glibc this does nothing: it changes what is resident, never a value.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors"):
            start, end = (int(number, 16) for number in line.split()[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_PAGEOUT)
    trim_heap()
