"""Owns control of the C library's heap: which blocks are mapped, what lies in one, and when freed ones are given back."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MADV_PAGEOUT = 21
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MMAP_THRESHOLD_BYTES = 128 << 10  # glibc's initial threshold
MAX_MMAP_THRESHOLD_BYTES = 32 << 20  # the highest that glibc raises it to as blocks are freed


@contextmanager
def mapped_blocks() -> Iterator[None]:
    """Return large blocks to the system as soon as they are freed, so that they leave no holes in the heap.

    This is for loading, which frees temporaries between weights that stay. On exit, freed blocks are kept
    for reuse again, as glibc does by itself once large ones have been freed (mallopt(3)). Other C libraries
    are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, MAX_MMAP_THRESHOLD_BYTES)
        mallopt(M_TRIM_THRESHOLD, 2 * MAX_MMAP_THRESHOLD_BYTES)


def trim_heap() -> None:
    """Return freed blocks to the system, holes among used ones too (malloc_trim(3)); only with glibc."""
    malloc_trim = (
        getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    )
    if malloc_trim is not None:
        malloc_trim(0)


def release_pages() -> None:
    """Release what loading has left resident: pages of checkpoints that were read, and freed blocks.

    safetensors maps whole files, and a mapping lives as long as any tensor in it. Its clean pages are read
    from the file again when needed; changed ones stay (madvise(2), MADV_PAGEOUT, Linux 5.4). On systems
    other than Linux with glibc this does nothing. It changes what is resident, never a value.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors"):
            start, end = (int(number, 16) for number in line.split()[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_PAGEOUT)
    trim_heap()


def lay_out_gradients(
    parameters: Sequence[torch.Tensor], block: torch.Tensor | None
) -> torch.Tensor:
    """Place all gradients in one block of memory, filled with zeros, and return it.

    If they were allocated one by one among the activations of a step's first pass, they would fragment the C
    library's heap, which would then grow in the next pass.

    Args:
        parameters: those that are trained, in fp32 on the CPU.
        block: the block of an earlier call, None for a new one.
    """
    import torch

    sizes = [parameter.numel() for parameter in parameters]
    block = torch.empty(sum(sizes)) if block is None else block
    for parameter, part in zip(parameters, torch.split(block.zero_(), sizes), strict=True):
        parameter.grad = part.view_as(parameter)
    return block
