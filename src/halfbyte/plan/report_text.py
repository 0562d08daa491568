"""Owns the tables of a plan for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from halfbyte.plan.memory import checkpointing_text
from halfbyte.plan.report import load_json
from halfbyte.plan.weights import load_plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CARDS_A_LINE = 4
# Term → its description; docs/memory.md has the sources.
TERMS = {
    "weights": "the base model; unpacked weights are in the compute dtype",
    "constants": "quantisation constants of the packed weights: maxima and scales",
    "adapter": "4 bytes for each trainable weight: r·(in + out) in each layer",
    "optimizer": "the optimizer's states of each trainable weight",
    "workspace": "cuBLAS workspaces, one for each of two threads",
    "buckets": "DDP's buffers for the gradients of several processes",
    "gradients": "4 bytes for each trainable weight that has its gradient by then",
    "activations": "what the forward pass keeps for the backward pass",
    "logits": "loss head: labelled positions and one tile of logits",
    "dequantised": "one layer's weight, dequantised for its matrix product",
    "working_set": "temporaries of the current layer, including recomputed ones",
    "context": "what the process takes besides tensors",
    "slack": "what the allocator may hold beyond what is allocated",
}


def quantised_text(report: dict[str, Any]) -> str:
    """Format the result of ``quantised_json`` as tables for a terminal."""
    packed, unpacked = report["packed_bytes"], report["unpacked_bytes"]
    packed_text = "unknown until it is downloaded" if packed is None else f"{packed / 1e9:.3f}"
    lines = [
        f"{report['target']}: {report['num_parameters']:,} parameters, already quantised"
        f" ({report['method']}; {report['origin']})",
        "",
        "TO LOAD, GB",
        f"  packed, as vLLM keeps it                          {packed_text:>10}",
        f"  unpacked to bf16, in transformers                 {_gb(unpacked['bf16'])}",
        f"  unpacked to fp32, in transformers on most CPUs    {_gb(unpacked['fp32'])}",
        "",
    ]
    if report["infer"]:
        lines += [_infer_table(report), ""]
    usable = report["device"]["usable_bytes"]
    lines.append(f"ON {report['device']['title']}: {usable / 1e9:.3f} GB for weights and KV cache")
    lines.append("It cannot be trained; plan the unquantised checkpoint that it was made from.")
    return "\n".join(lines)


def as_text(report: dict[str, Any]) -> str:
    """Format the result of ``as_json`` as tables for a terminal."""
    load = report["load"]
    parts = [
        f"{report['target']}: {load['model_class']}, {load['num_parameters']:,} parameters"
        f" ({report['origin']})",
        _load_table("TO LOAD, GB", load),
    ]
    if report["load_text"]:
        text = report["load_text"]
        parts.append(
            _load_table(
                f"the language model alone ({text['num_parameters']:,}), which is trained", text
            )
        )
    parts += [_train_table(report), _infer_table(report)]
    if report["longest_rows"]:
        parts.append(_longest_table(report["longest_rows"]))
    parts.append(_verdict(report))
    return "\n\n".join(parts)


def load_text(config: PretrainedConfig) -> str:
    """Format what loading a model takes, where its training cannot be planned."""
    return _load_table("TO LOAD, GB", load_json(load_plan(config, text_only=False)))


def _load_table(title: str, load: dict[str, Any]) -> str:
    lines = [f"{title:<52}{'reported':>10}{'true':>10}"]
    labels = {"nf4": "nf4, double quantisation", "nf4_single": "nf4, no double quantisation"}
    for name, stored in load.items():
        if isinstance(stored, dict) and "true_bytes" in stored:
            lines.append(
                f"  {labels.get(name, name):<50}{_gb(stored['reported_bytes'])}"
                f"{_gb(stored['true_bytes'])}"
            )
    for name, size in load["files"].items():
        if name in ("awq", "gguf_f16", "gguf_q8_0", "gguf_q4_k_m"):
            lines.append(f"  {name.replace('gguf_', 'GGUF '):<50}{'':>10}{_gb(size)}")
    lines.append(f"  {'one layer of GGUF q4_k_m':<50}{'':>10}{_gb(load['gguf_layer_bytes'])}")
    lines += [f"  {name}: not possible. {why}" for name, why in load["no_files"].items()]
    unpacked = [
        f"  {entry['what']}: {entry['num_parameters']:,} ({entry['why']})"
        for entry in load["unpacked"]
    ]
    return "\n".join([*lines, "left unquantised by int8, nf4 and fp4:", *unpacked])


def _train_table(report: dict[str, Any]) -> str:
    train, settings = report["train"], report["train"]["settings"]
    lines = [
        f"TO TRAIN in {settings['precision']}, computing in {settings['compute_dtype']}, with"
        f" {settings['micro_batch_size']} × {settings['length']} tokens"
        f" × {settings['accumulation']} accumulated, checkpointing"
        f" {checkpointing_text(settings['checkpointing'])}, {settings['optimizer']}, r={settings['r']}"
    ]
    lines.append(f"  {'GB':<14}{'at the peak':>12}{'at most':>10}")
    for name, description in TERMS.items():
        size = train[f"{name}_bytes"]
        most = train["largest"].get(name, size)
        if name == "context":
            lines.append(
                f"  {'tensors':<14}{_gb(train['peak_bytes']):>12}{'':>12}peak: {train['when']}"
            )
        if most:
            lines.append(f"  {name.replace('_', ' '):<14}{_gb(size):>12}{_gb(most)}  {description}")
    lines.append(f"  {'needed':<14}{_gb(train['needed_bytes']):>12}")
    if train["paged_bytes"]:
        lines.append(f"  (and {train['paged_bytes'] / 1e9:.2f} GB of paged optimizer states)")
    lines.append(
        f"  the logits of all positions at once would take {_gb(train['all_logits_bytes']).strip()} a copy"
    )
    for layer in train["layers"]:
        lines.append(
            f"  each of {layer['count']} {layer['kind'].replace('_', ' ')}s keeps"
            f" {layer['kept_bytes'] / 1e6:.1f} MB for the backward pass,"
            f" {layer['kept_bytes_per_token'] / 1e3:.1f} kB per token"
        )
    return "\n".join(lines)


def _infer_table(report: dict[str, Any]) -> str:
    lines = [f"TO INFER, GB{'context':>12}{'batch':>8}{'KV cache':>10}{'prefill':>10}{'total':>10}"]
    lines += [
        f"{'':>12}{row['context']:>12,}{row['batch']:>8}{_gb(row['kv_bytes'])}"
        f"{_gb(row['prefill_bytes'])}{_gb(row['total_bytes'])}"
        for row in report["infer"]
    ]
    return "\n".join(lines)


def _longest_table(tokens: dict[str, int]) -> str:
    lines = ["LONGEST ROW, tokens: one row a pass, every token labelled, all layers recomputed"]
    cards = list(tokens.items())
    for begin in range(0, len(cards), CARDS_A_LINE):
        columns = [f"{name:<15}{most:>9,}" for name, most in cards[begin : begin + CARDS_A_LINE]]
        lines.append("  " + "   ".join(columns))
    return "\n".join(lines)


def _verdict(report: dict[str, Any]) -> str:
    device = report["device"]
    lines = [f"ON {device['title']}: {_gb(device['total_bytes']).strip()} GB"]
    lines += [f"  {fact}" for fact in device["facts"]]
    if device["in_use_bytes"]:
        lines.append(f"  in use by other processes: {_gb(device['in_use_bytes']).strip()} GB")
    margin = device["margin_bytes"]
    if device["fits"]:
        lines.append(f"FITS, with {_gb(margin).strip()} GB to spare")
        lines.append(f"  {report['train']['settings']['override']}")
        return "\n".join(lines)
    lines.append(f"DOES NOT FIT: {_gb(-margin).strip()} GB too large")
    for suggestion in report["suggestions"]:
        lines.append(f"  {suggestion['override']}")
        lines.append(
            f"    needs {_gb(suggestion['needed_bytes']).strip()} GB; {suggestion['costs']}"
        )
    if not report["suggestions"]:
        fitting = ", ".join(device["models_that_fit"][:5]) or "none of the known models"
        lines.append("  none of the settings tried makes it fit")
        lines.append(f"  models that this device can train in 4 bits: {fitting}")
        cards = ", ".join(device["cards_that_fit"]) or "none of the known cards"
        lines.append(f"  cards that can train it, one row at a time with checkpointing: {cards}")
    return "\n".join(lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:>10.3f}"
