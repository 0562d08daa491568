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
    from halfbyte.data.preview import show_ledger
    from halfbyte.data.render import renderer_of
    from halfbyte.model.adapter import attach_adapter, describe_model, save_adapter
    from halfbyte.model.load import load_config, load_for_training, load_tokenizer
    from halfbyte.model.resolve import resolve_base
    from halfbyte.plan.devices import this_machine
    from halfbyte.plan.gate import check_weights, gate
    from halfbyte.train.arguments import Passes, num_steps
    from halfbyte.train.probe import first_look, longest_rows
    from halfbyte.train.session import (
        as_before,
        check_base,
        open_session,
        record_data,
        write_manifest,
    )
    from halfbyte.train.settle_dtype import settle_plan
    from halfbyte.train.tracking import Tracker
    from halfbyte.train.trainer import build_trainer
    from halfbyte.trained.reference_logprobs import record_reference_logprobs

    device = this_machine()
    check_weights(run, device)
    session = open_session(run)
    folder = session.folder
    say = print if session.is_main else (lambda *_: None)
    next_commands = (
        f"next: python train/merge.py {folder.path}\n      python eval/compare.py {folder.path}"
    )
    if session.finished:
        say(
            f"{folder.path} is trained already; train.existing=replace starts anew\n{next_commands}"
        )
        return

    base = resolve_base(run.model.name, run.model.revision)
    check_base(session, base)
    tokenizer = load_tokenizer(base)
    renderer = renderer_of(run.data, tokenizer)
    prepared = prepare(run.data, renderer)
    if session.is_main:
        record_data(session, prepared)
    say(show_ledger(prepared))
    say(f"BOS: {'1 per row' if renderer.has_bos else 'none: this tokenizer adds none'}")

    run = as_before(session, run)
    held_out = prepared.validation or prepared.test[:64]
    lengths = longest_rows(prepared.train), longest_rows(held_out)
    planner, plan = gate(run, load_config(base), device, *lengths)
    loaded = load_for_training(base, run.model)
    model = attach_adapter(loaded, run.adapter, run.seed, folder.path, is_main=session.is_main)
    planner, plan = settle_plan(run, loaded, model, prepared.train, (planner, plan), lengths)
    passes = Passes.of(run, plan)
    if plan is not None:
        say(f"plan: {plan.summary()}; {planner.margin_bytes(plan) / 1e9:.2f} GB to spare")
    say(describe_model(loaded, model))
    if session.is_main:
        begun = {"finished": False} | ({"memory": plan.as_json()} if plan else {})
        write_manifest(session, run, loaded, renderer, begun)

    tracker = Tracker(run, folder, session.resume_step) if session.is_main else None
    try:
        examples = (prepared.train, held_out)
        trainer = build_trainer(
            run, loaded, model, renderer, examples, passes, folder.checkpoints, tracker
        )
        told, memory = first_look(trainer, planner, plan)
        say(told)
        seconds = trainer.train_to(num_steps(run, len(prepared.train)), session.resume)
        if session.is_main:
            save_adapter(model, loaded, folder.adapter, folder.path)
            tokenizer.save_pretrained(folder.adapter)
            rows = [example.row for example in held_out or prepared.train]
            record_reference_logprobs(trainer.last_logits, renderer, rows, folder.adapter)
        held_out_loss = trainer.final_loss()
    except BaseException:
        if tracker is not None:
            tracker.finish(None)
        raise
    if tracker is not None:
        where = tracker.where
        numbers = trainer.numbers() | {"training_seconds": seconds, "held_out_loss": held_out_loss}
        if memory:
            numbers["memory"] = memory
            tracker.summarise({"memory": memory})
        write_manifest(session, run, loaded, renderer, numbers | {"finished": True, "wandb": where})
        tracker.finish(folder.adapter)
        say(f"trained: {folder.path}\n  adapter  {folder.adapter}\n  numbers  {folder.metrics}")
        say(f"  W&B      {where}\n{next_commands}")


if __name__ == "__main__":
    exit_on_user_error(main)
