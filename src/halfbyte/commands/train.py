"""Fine-tune a model with QLoRA.

halfbyte train configs/gemma3_qlora.yaml [section.key=value …] [--processes N] [--seeds N]
It is what halfbyte train is, and may be started by accelerate launch or torchrun as well.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.config import Run, load_run
from halfbyte.launch import check_processes, follow_launcher, start_processes, was_launched
from halfbyte.run_lock import only_writer

if TYPE_CHECKING:
    from halfbyte.train.session import Session


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command line may say."""
    parser.add_argument("config", type=Path, help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="train N times, with train.seed, train.seed + 1 and so on, in folders NAME-s1, NAME-s2 …",
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="that train together, one for each GPU"
    )


def main(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Config → data → 4-bit base with LoRA → trained adapter in a run folder, or in one for each seed."""
    follow_launcher()
    for option in ("seeds", "processes"):
        if getattr(arguments, option) is not None and getattr(arguments, option) < 1:
            parser.error(f"--{option} is {getattr(arguments, option)}; allowed: 1 or more")
    run = load_run(arguments.config, arguments.overrides)
    if (arguments.processes or 1) > 1 and not was_launched():
        raise SystemExit(start_processes(arguments.processes, arguments.words))
    check_processes(arguments.processes)
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
    session.say(f"the trainings together: halfbyte compare {' '.join(folders)}")


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
