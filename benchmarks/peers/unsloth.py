"""Owns the run with Unsloth: its loader and adapter, and TRL's trainer as Unsloth changes it.

Tuned: adapters back in fp32, and checkpointing off in the loader, in the adapter and in SFTConfig, whose
own default turns it on again.
"""

from __future__ import annotations

import os
from typing import Any

from benchmarks.peers.job import Job, Watch, as_dataset, read_job, settings, train

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Base → trainer → adapter and result."""
    job = read_job()
    if job.device == "cpu":
        os.environ["UNSLOTH_FORCE_CPU"] = "1"
    model, tokenizer = _load(job)
    from trl import SFTConfig, SFTTrainer  # Unsloth has to come first

    watch = Watch(job)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings(job), max_length=None),
        train_dataset=as_dataset(job),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    train(job, trainer, watch)


def _load(job: Job) -> tuple[Any, Any]:
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]

    given = {} if job.checkpointing is None else {"use_gradient_checkpointing": job.checkpointing}
    model, tokenizer = FastLanguageModel.from_pretrained(
        job.model, max_seq_length=1024, dtype=job.torch_dtype, load_in_4bit=True, **given
    )
    adapted = FastLanguageModel.get_peft_model(
        model,
        r=job.rank,
        lora_alpha=job.alpha,
        lora_dropout=0,
        target_modules=TARGETS,
        random_state=job.seed,
        **given,
    )
    return adapted, tokenizer


if __name__ == "__main__":
    main()
