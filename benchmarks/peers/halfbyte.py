"""Owns the run with halfbyte: the steps of train/sft.py on given rows, its own plan included.

The rows come as they were drawn: halfbyte's own sampler puts them into the order that the others get.
"""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerCallback

from benchmarks.peers.job import Job, Watch, read_job, start_adapter
from halfbyte.config import Run, model_run
from halfbyte.data.conversation import Row
from halfbyte.data.encoded import Encoded
from halfbyte.data.ledger import Ledger
from halfbyte.data.prepared import Prepared
from halfbyte.data.render import Renderer
from halfbyte.data.samples import Example, Samples
from halfbyte.libraries import quiet_libraries


def main(job: Job, *callbacks: TrainerCallback) -> None:
    """Base → plan → trainer → adapter and result."""
    quiet_libraries()
    from halfbyte.model.adapter import save_adapter
    from halfbyte.model.resolve import resolve_base
    from halfbyte.model.tokenizer import load_tokenizer
    from halfbyte.plan.devices import this_machine
    from halfbyte.train.probe import first_look
    from halfbyte.train.setup import set_up
    from halfbyte.train.trainer import build_trainer

    run, out = _run(job), Path(job.out)
    rows = Samples.of(
        Example(Row(f"row {n}", text=" "), Encoded(f"row {n}", ids, labels))
        for n, (ids, labels) in enumerate(job.read_rows("drawn"))
    )
    base = resolve_base(run.model.name)
    renderer = Renderer(load_tokenizer(base))
    ledger = Ledger(rows_in={"train": len(rows)}, trained=len(rows), held_out={}, dropped={})
    prepared = Prepared(rows, rows[:0], rows[:0], ledger)
    setup = set_up(run, base, renderer, prepared, this_machine(), out)
    start_adapter(setup.model, job.seed)
    trainer = build_trainer(setup, out, None)
    watch = Watch(job)
    for callback in (watch, *callbacks):
        trainer.add_callback(callback)
    _, memory = first_look(trainer, setup)
    trainer.train_to_end(None)
    watch.facts |= memory
    watch.write()
    save_adapter(setup.model, setup.loaded, out / "adapter", out)


def _run(job: Job) -> Run:
    overrides = [
        f"seed={job.seed}",
        f"model.compute_dtype={job.dtype}",
        f"adapter.r={job.rank}",
        f"adapter.alpha={job.alpha}",
        f"train.learning_rate={job.learning_rate}",
        f"train.batch_size={job.step_rows}",
        f"train.max_steps={job.steps}",
        "train.scheduler=constant",
        "train.log_steps=1",
        "train.save_steps=0",
        "train.num_samples=0",
    ]
    if job.micro_batch is not None:
        overrides.append(f"train.micro_batch_size={job.micro_batch}")
    if job.checkpointing is not None:
        overrides.append(f"train.checkpointing={'on' if job.checkpointing else 'off'}")
    return model_run(job.model, overrides)


if __name__ == "__main__":
    main(read_job())
