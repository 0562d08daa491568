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
    from halfbyte.data.render import Renderer, load_template
    from halfbyte.model.adapter import (
        adapted_layers,
        attach_adapter,
        save_adapter,
        trainable_parameters,
    )
    from halfbyte.model.footprint import num_parameters, weights_bytes
    from halfbyte.model.load import load_model, load_tokenizer, vision_modules
    from halfbyte.model.resolve import resolve_base
    from halfbyte.train.callbacks import FiniteGuard, Progress, Samples
    from halfbyte.train.session import open_session, record_data, write_manifest
    from halfbyte.train.tracking import Tracker
    from halfbyte.train.trainer import build_trainer, check_first_step, memory_bytes

    session = open_session(run)
    folder = session.folder
    say = print if session.is_main else (lambda *_: None)
    next_commands = (
        f"next: python train/merge.py {folder.path}\n      python eval/compare.py {folder.path}"
    )
    if session.finished:
        say(f"{folder.path} is trained already\n{next_commands}")
        return

    base = resolve_base(run.model.name, run.model.revision)
    tokenizer = load_tokenizer(base)
    template = load_template(run.data.chat_template) if run.data.chat_template else None
    renderer = Renderer(tokenizer, template, run.data.loss_on)
    prepared = prepare(run.data, renderer)
    if session.is_main:
        record_data(session, prepared)
    say(show_ledger(prepared))
    say(f"BOS: {'1 per row' if renderer.has_bos else 'none: this tokenizer adds none'}")

    loaded = load_model(
        base,
        run.model.precision,
        double_quant=run.model.double_quant,
        compute_dtype=run.model.compute_dtype,
        attention=run.model.attention,
    )
    say(
        f"base: {base.name}, {num_parameters(loaded.model) / 1e6:.1f} M parameters,"
        f" {weights_bytes(loaded.model) / 1e6:.1f} MB in {run.model.precision},"
        f" {len(vision_modules(loaded.model))} vision modules\n"
        f"compute: {loaded.compute.name} on {loaded.compute.device} ({loaded.compute.reason})"
    )
    model = attach_adapter(loaded, run.adapter, run.seed, folder.path)
    num_trainable = sum(p.numel() for p in trainable_parameters(model).values())
    num_adapted = len(adapted_layers(model))
    say(f"adapter: {num_trainable / 1e6:.2f} M weights on {num_adapted} layers")

    tracker = Tracker(run, folder, session.resume_step) if session.is_main else None
    if tracker is not None:
        say(f"W&B: {tracker.where}")
    held_out = prepared.validation or prepared.test[:64]
    guard = FiniteGuard()
    samples = Samples(held_out[: run.train.num_samples], renderer, run.train.sample_tokens)
    trainer = build_trainer(
        run,
        model,
        loaded,
        tokenizer,
        (prepared.train, held_out),
        folder.checkpoints,
        tracker,
        [Progress(), guard, samples],
    )
    guard.trainer = samples.trainer = trainer
    facts = {"finished": False, "adapted_layers": num_adapted, "trainable": num_trainable}
    if session.is_main:
        write_manifest(session, run, loaded, renderer, facts)
    say(
        f"before step 1: loss {check_first_step(trainer):.3f} on the longest rows; gradients are finite"
    )

    done = trainer.train(resume_from_checkpoint=str(session.resume) if session.resume else None)
    held_out_loss = trainer.final_loss()
    if session.is_main and tracker is not None:
        save_adapter(model, loaded, folder.adapter, folder.path)
        tokenizer.save_pretrained(folder.adapter)
        numbers = {
            "steps": trainer.state.global_step,
            "training_seconds": round(done.metrics["train_runtime"], 1),
            "num_tokens": trainer.num_tokens,
            "held_out_loss": held_out_loss,
            "peak_memory_bytes": memory_bytes(trainer.args.device),
            "wandb": tracker.where,
        }
        write_manifest(session, run, loaded, renderer, facts | numbers | {"finished": True})
        where = tracker.where
        tracker.finish(folder.adapter)
        say(f"trained: {folder.path}\n  adapter  {folder.adapter}\n  numbers  {folder.metrics}")
        say(f"  W&B      {where}\n{next_commands}")


if __name__ == "__main__":
    exit_on_user_error(main)
