"""Runs a script of which one function shows that it runs, and takes a second: the moment in which a signal arrives.

lingering.py MODULE FUNCTION SIGN SCRIPT ARGUMENTS
"""

from __future__ import annotations

import importlib
import runpy
import sys
import time
from pathlib import Path
from typing import Any


def linger(module: str, target: str, sign: Path) -> None:
    """Let a function of this process show that it runs, the second time it is called, and take a second."""
    place: Any = importlib.import_module(module)
    *owner, name = target.split(".")
    for part in owner:
        place = getattr(place, part)
    usual, calls = getattr(place, name), [0]
    once = module.endswith(("trainer", "checkpoints")) and name != "held_out_losses"

    def lingering(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 1 + once:
            sign.touch()
            time.sleep(1)
        return usual(*arguments, **options)

    setattr(place, name, lingering)


if __name__ == "__main__":
    from halfbyte.launch import follow_launcher

    follow_launcher()
    linger(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    sys.argv = sys.argv[4:]
    runpy.run_path(sys.argv[0], run_name="__main__")
