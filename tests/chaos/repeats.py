"""Trains the same few steps in bf16 many times: each must end well and learn the same: ``python -m chaos.repeats N``.

What fresh memory holds may decide nothing: run it under MALLOC_PERTURB_ with other values as well.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from toys import save_tiny_llama

from chaos import farm
from chaos.scene import Scene, difference, learnt, train


def main() -> None:
    """Train again and again, and fail if a run ends otherwise than the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("number", type=int, help="of runs")
    number = parser.parse_args().number
    farm.load_libraries()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="repeats-") as root:
        scene = Scene(Path(root))
        save_tiny_llama(scene.base)
        folder = scene.folder("repeated")
        steps = {"max_steps": 6, "save_steps": 0, "eval_steps": 0}
        model = {"precision": "nf4", "compute_dtype": "bf16"}
        config = scene.config(folder, train=steps, model=model)
        farm.warm_up(config)
        first = learnt(folder / "runs" / "tiny")
        faults = []
        for run in range(1, number + 1):
            shutil.rmtree(folder / "runs")
            ended = train(config)
            fault = ended.says("trained") or difference(learnt(folder / "runs" / "tiny"), first)
            if fault:
                faults.append(fault)
                print(f"run {run}: {fault}", flush=True)
    print(f"{number - len(faults)} of {number} runs alike in {time.monotonic() - begun:.0f} s")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
