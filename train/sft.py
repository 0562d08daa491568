"""Fine-tune a model with QLoRA.

accelerate launch train/sft.py configs/gemma3_qlora.yaml [section.key=value …] [--seeds N]
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.config import Run, load_run
from halfbyte.errors import exit_on_user_error
from halfbyte.launch import check_processes, follow_launcher
from halfbyte.run_lock import only_writer

if TYPE_CHECKING:
    from halfbyte.train.session import Session


def main() -> None:
    """Config → data → 4-bit base with LoRA → trained adapter in a run folder, or in one for each seed."""
    follow_launcher()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="train N times, with train.seed, train.seed + 1 and so on, in folders NAME-s1, NAME-s2 …",
    )
    arguments = parser.parse_intermixed_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds is {arguments.seeds}; allowed: 1 or more")
    run = load_run(arguments.config, arguments.overrides)
    check_processes()
    if arguments.seeds == 1:
        train(run)
        return
    folders: list[str] = []
    first_seed = run.training_seed
    for number in range(arguments.seeds):
        section = run.train.model_copy(update={"seed": first_seed + number})
        name = f"{run.name}-s{number + 1}"
        session = train(run.model_copy(update={"name": name, "train": section}))
        run = run.model_copy(update={"data": session.run.data})  # the same day in each
        folders.append(str(session.folder.path))
        release()
    session.say(f"the trainings together: python eval/compare.py {' '.join(folders)}")


def train(run: Run) -> Session:
    """Train a run, which nobody else writes meanwhile, and return its session."""
    with only_writer(Path(run.runs_dir) / str(run.name)):
        # Heavy libraries come after the config, so that a fault in it is told at once.
        from halfbyte.libraries import quiet_libraries

        quiet_libraries()
        from halfbyte.train.run import train as train_run

        return train_run(run)


def release() -> None:
    """Free the memory of a training that has ended."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    exit_on_user_error(main)
