"""Tests of how memory is given back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_blocks_mapped_while_loading_go_back_when_freed() -> None:
    """Freed blocks between kept ones leave the process inside the context and are kept for reuse after it."""
    code = """
from halfbyte.heap import mapped_blocks

def left_by_temporaries() -> int:
    def resident() -> int:
        return int(open("/proc/self/statm").read().split()[1]) * 4096
    before = resident()
    temporaries, kept = [], []
    for _ in range(40):
        temporaries.append(bytearray(b"x") * (2 << 20))
        kept.append(bytearray(b"x") * (64 << 10))
    temporaries.clear()
    return resident() - before - sum(map(len, kept))

with mapped_blocks():
    inside = left_by_temporaries()
print(inside >> 20, left_by_temporaries() >> 20)
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    inside, after = map(int, result.stdout.split())
    assert inside < 8
    assert after > 60
