"""Owns the measured peak: FLOP/s of a square matrix product, the best of several; prints one number."""

from __future__ import annotations

import sys
import time

import torch

from benchmarks.peers.job import DTYPES

SIZES = {"cpu": 2048, "cuda": 8192}
REPEATS = 12


def main() -> None:
    """DEVICE DTYPE → FLOP/s."""
    device, dtype = sys.argv[1], DTYPES[sys.argv[2]]
    size = SIZES[device]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    print(2 * size**3 / min(seconds))


if __name__ == "__main__":
    main()
