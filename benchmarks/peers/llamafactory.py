"""Owns the run with LLaMA-Factory: its own workflow on a dataset that is tokenised already.

Tuned: no checkpointing. Its adapters are fp32 as they are.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.peers.job import Job, Watch, as_dataset, read_job, settings


def main() -> None:
    """Rows on disk → its SFT workflow → adapter and result."""
    os.environ["DISABLE_VERSION_CHECK"] = "1"
    job = read_job()
    tokenised = Path(job.out) / "tokenised"
    _save_rows(job, tokenised)
    _leave_out_torchaudio()
    from llamafactory.train.tuner import run_exp  # type: ignore[import-not-found]

    watch = Watch(job)
    run_exp(_arguments(job, tokenised), callbacks=[watch])
    watch.write()


def _leave_out_torchaudio() -> None:
    """LLaMA-Factory 0.9.5 imports torchaudio, which reads sound alone and whose PyPI build needs CUDA."""
    absent = ModuleType("torchaudio")
    absent.__spec__ = ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = absent


def _save_rows(job: Job, folder: Path) -> None:
    """As its own preprocessing would leave them: ids, mask and labels, in a part named train."""
    from datasets import DatasetDict

    rows = as_dataset(job)
    masks = [[1] * len(ids) for ids in rows["input_ids"]]
    DatasetDict({"train": rows.add_column("attention_mask", masks)}).save_to_disk(str(folder))


def _arguments(job: Job, tokenised: Path) -> dict[str, Any]:
    told = settings(job)
    told |= {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": job.model,
        "template": "empty",
        "dataset": "rows",  # must be named; the tokenised rows take its place
        "tokenized_path": str(tokenised),
        "disable_shuffling": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": job.rank,
        "lora_alpha": job.alpha,
        "lora_dropout": 0.0,
        "quantization_bit": 4,
        "quantization_type": "nf4",
        "double_quantization": True,
        "output_dir": job.adapter,
    }
    # transformers' own switch is off by default; LLaMA-Factory turns checkpointing on by another.
    if told.pop("gradient_checkpointing", None) is False:
        told["disable_gradient_checkpointing"] = True
    return told


if __name__ == "__main__":
    main()
