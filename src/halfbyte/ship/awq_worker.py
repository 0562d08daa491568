"""Owns the process that runs llm-compressor: python awq_worker.py JOB.json, with its packages on the path."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    """Read JOB.json (merged, out, ids, group_size) and write a compressed-tensors folder at ``out``."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if not torch.cuda.is_available():
        # llm-compressor pins the tensors that it moves, which raises without an accelerator.
        torch.Tensor.pin_memory = lambda self, *_, **__: self  # type: ignore[method-assign]
    model: Any = AutoModelForCausalLM.from_pretrained(job["merged"], dtype=torch.float32)
    rows = [
        {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        }
        for ids in job["ids"]
    ]
    # Symmetric, since transformers 5.23 cannot load what 0.14.0.1 saves with zero points.
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=job["group_size"]
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = AWQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    loader: Any = DataLoader(rows, batch_size=None)  # type: ignore[arg-type]
    oneshot(model=model, dataset=loader, recipe=recipe, num_calibration_samples=len(rows))
    model.save_pretrained(job["out"], save_compressed=True)


if __name__ == "__main__":
    main()
