"""Owns the common evaluation: held-out loss of every tool's adapter by one plain padded loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.job import Job, four_bit, read_job

BATCH_ROWS = 4


def main() -> None:
    """Base and adapters → nats per labelled token, by name; ``base`` is the model untouched.

    The job's rows also hold ``held_out``; its folder holds ``adapters.json``, folders by name.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    job = read_job()
    adapters: dict[str, str] = json.loads((Path(job.out) / "adapters.json").read_text())
    rows = job.read_rows("held_out")
    model: Any = AutoModelForCausalLM.from_pretrained(
        job.model,
        dtype=job.torch_dtype,
        device_map={"": job.device},
        quantization_config=four_bit(job),
    )
    for module in model.modules():
        # bitsandbytes 0.50 would change to bf16 on CPUs that have it.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    losses = {"base": _loss(job, model, rows)}
    for name, folder in adapters.items():
        adapted = PeftModel.from_pretrained(model, folder)
        losses[name] = _loss(job, adapted, rows)
        model = adapted.unload()
    (Path(job.out) / "losses.json").write_text(json.dumps(losses))


@torch.no_grad()
def _loss(job: Job, model: Any, rows: list[tuple[list[int], list[int]]]) -> float:
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), BATCH_ROWS):
        batch = rows[start : start + BATCH_ROWS]
        longest = max(len(ids) for ids, _ in batch)
        blank = torch.zeros(len(batch), longest, dtype=torch.long)
        ids, mask, labels = blank, blank.clone(), blank - 100
        for n, (row_ids, row_labels) in enumerate(batch):
            ids[n, : len(row_ids)] = torch.tensor(row_ids)
            mask[n, : len(row_ids)] = 1
            labels[n, : len(row_ids)] = torch.tensor(row_labels)
        logits = model(input_ids=ids.to(job.device), attention_mask=mask.to(job.device)).logits
        targets = labels[:, 1:].to(job.device)
        total += float(
            torch.nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="sum"
            )
        )
        count += int((targets >= 0).sum())
    return total / count


if __name__ == "__main__":
    main()
