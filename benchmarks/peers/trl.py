"""Owns the run with TRL: its SFTTrainer as documented, tuned by hand, or with Liger's kernels.

Everywhere bf16 is set to the job's compute dtype: SFTConfig's own default, bf16, makes steps on a CPU
without bf16 units last minutes. Tuned: adapters back in fp32, which TRL casts to bf16 on construction,
and no checkpointing.
"""

from __future__ import annotations

from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.peers.job import Job, Watch, as_dataset, four_bit, read_job, settings, train


def main(job: Job, *callbacks: TrainerCallback) -> None:
    """Base → trainer → adapter and result."""
    watch = Watch(job)
    model = AutoModelForCausalLM.from_pretrained(
        job.model,
        dtype=job.torch_dtype,
        device_map={"": job.device},
        quantization_config=four_bit(job),
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings(job), max_length=None, use_liger_kernel=job.liger),
        train_dataset=as_dataset(job),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=job.rank,
            lora_alpha=job.alpha,
            lora_dropout=0.0,
            target_modules="all-linear",
        ),
        callbacks=[watch, *callbacks],
    )
    train(job, trainer, watch)


if __name__ == "__main__":
    main(read_job())
