"""What the machine is asked to do with memory."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_blocks_mapped_while_loading_go_back_when_freed() -> None:
    """Freed blocks between kept ones leave the process inside, and are kept for the next use after."""
    code = """
from halfbyte.host import mapped_blocks

def left_by_temporaries() -> int:
    def resident() -> int:
        return int(open("/proc/self/statm").read().split()[1]) * 4096
    before = resident()
    passing, kept = [], []
    for _ in range(40):
        passing.append(bytearray(b"x") * (2 << 20))
        kept.append(bytearray(b"x") * (64 << 10))
    passing.clear()
    return resident() - before - sum(map(len, kept))

with mapped_blocks():
    inside = left_by_temporaries()
print(inside >> 20, left_by_temporaries() >> 20)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    inside, after = map(int, told.stdout.split())
    assert inside < 8
    assert after > 60
