"""Owns the model card: what a merged model is, where it came from, what was measured."""

from __future__ import annotations

from typing import Any

from halfbyte.config import Run


def model_card(manifest: dict[str, Any], report: dict[str, Any], run: Run) -> str:
    """README.md of a merged model; every figure comes from the run's own files."""
    base, kept = manifest["base"], report["kept"]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *([f"base_model: {base['name']}"] if base["revision"] else []),
        "tags: [halfbyte, qlora]",
        "---",
        "",
        f"# {run.name}",
        "",
        f"Fine-tuned with halfbyte {manifest['halfbyte']} from: {base['origin']}. The licence of the"
        " base applies.",
        "",
        "| training | |",
        "| --- | --- |",
        f"| base precision | {manifest['precision']}, {manifest['compute_dtype']['name']} compute |",
        f"| LoRA | r {run.adapter.r}, alpha {run.adapter.alpha:g}, {manifest['adapted_layers']} layers,"
        f" {manifest['trainable'] / 1e6:.2f} M weights |",
        f"| steps | {manifest['steps']} of {run.train.batch_size} rows, peak learning rate"
        f" {run.train.learning_rate:g} |",
    ]
    if manifest["held_out_loss"] is not None:
        lines.append(f"| held-out loss | {manifest['held_out_loss']:.4f} nats per labelled token |")
    lines += [
        "",
        f"The adapter is folded into the {kept['base']} base and stored in {kept['dtype']}. Against the"
        f" trained model, on {report['measured']['positions']} held-out positions and after reloading"
        f" from disk: KL {kept['kl_nats_per_token']:.2e} nats per token, top-1 agreement"
        f" {kept['top1_agreement']:.2%}, loss {kept['loss']:.4f} (trained: {report['trained']['loss']:.4f}).",
        "",
        "The chat template that it was trained with comes with the tokenizer.",
        "",
    ]
    return "\n".join(lines)
