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
from halfbyte.host import follow_launcher
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
        return _train(run)


def _train(run: Run) -> Session:
    # Heavy libraries come after the config, so that a fault in it is told at once.
    from halfbyte.libraries import quiet_libraries

    quiet_libraries()
    from halfbyte.data.prepare import prepare
    from halfbyte.data.preview import show_ledger, show_tokens
    from halfbyte.data.render import renderer_of
    from halfbyte.model.adapter import describe_model
    from halfbyte.model.resolve import resolve_base
    from halfbyte.model.tokenizer import load_tokenizer
    from halfbyte.plan.devices import this_machine
    from halfbyte.plan.gate import check_weights
    from halfbyte.train.probe import first_look
    from halfbyte.train.session import (
        check_base,
        check_renderer,
        open_session,
        record_data,
        save_trained,
        write_manifest,
    )
    from halfbyte.train.setup import set_up
    from halfbyte.train.stops import train_until_stopped
    from halfbyte.train.tracking import tracked
    from halfbyte.train.trainer import build_trainer

    device = this_machine()
    check_weights(run, device)
    session = open_session(run)
    run, folder, say = session.run, session.folder, session.say
    if session.finished:
        say(f"{folder.path} is trained already; train.existing=replace starts over")
        say(session.next_commands)
        return session

    base = resolve_base(run.model.name, run.model.revision, run.data.new_tokens)
    check_base(session, base)
    renderer = renderer_of(run.data, load_tokenizer(base))
    check_renderer(session, renderer)
    prepared = prepare(run.data, renderer, run.seed)
    record_data(session, prepared)
    say(show_ledger(prepared), show_tokens(renderer))

    setup = set_up(run, base, renderer, prepared, device, folder.path, is_main=session.is_main)
    say(setup.summary, describe_model(setup.loaded, setup.model))
    write_manifest(session, setup, setup.as_json())

    with tracked(run, session) as tracker:
        trainer = build_trainer(setup, folder.checkpoints, tracker)
        report, memory = first_look(trainer, setup)
        say(report)
        train_until_stopped(trainer, session)
        save_trained(session, setup, trainer.last_logits)
        numbers = trainer.numbers() | memory
        where = tracker.where if tracker else ""
        write_manifest(session, setup, numbers | {"finished": True, "wandb": where})
    say(f"trained: {folder.path}\n  adapter  {folder.adapter}\n  numbers  {folder.metrics}")
    say(f"  W&B      {where}", session.next_commands)
    return session


def release() -> None:
    """Free the memory of a training that has ended."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    exit_on_user_error(main)
