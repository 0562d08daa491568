"""Fine-tune a model with QLoRA.

accelerate launch train/sft.py configs/gemma3_qlora.yaml [section.key=value …]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from halfbyte.config import load_run
from halfbyte.errors import exit_on_user_error


def main() -> None:
    """Config → data → 4-bit base with LoRA → trained adapter in a run folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    run = load_run(arguments.config, arguments.overrides)

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
        open_session,
        record_data,
        save_trained,
        write_manifest,
    )
    from halfbyte.train.setup import set_up
    from halfbyte.train.tracking import tracked
    from halfbyte.train.trainer import build_trainer

    device = this_machine()
    check_weights(run, device)
    session = open_session(run)
    run, folder, say = session.run, session.folder, session.say
    if session.finished:
        say(f"{folder.path} is trained already; train.existing=replace starts over")
        say(session.next_commands)
        return

    base = resolve_base(run.model.name, run.model.revision, run.data.new_tokens)
    check_base(session, base)
    renderer = renderer_of(run.data, load_tokenizer(base))
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
        trainer.train_to_end(session.resume)
        save_trained(session, setup, trainer.last_logits)
        numbers = trainer.numbers() | memory
        where = tracker.where if tracker else ""
        write_manifest(session, setup, numbers | {"finished": True, "wandb": where})
    say(f"trained: {folder.path}\n  adapter  {folder.adapter}\n  numbers  {folder.metrics}")
    say(f"  W&B      {where}", session.next_commands)


if __name__ == "__main__":
    exit_on_user_error(main)
