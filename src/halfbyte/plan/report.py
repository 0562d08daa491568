"""Owns the report of a plan: one JSON object for programs, tables for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.config.schema import Run
from halfbyte.errors import PlanError
from halfbyte.plan.advice import (
    Suggestion,
    cards_that_fit,
    choose,
    models_that_fit,
    override_line,
    suggest,
)
from halfbyte.plan.memory import Planner, TrainPlan, checkpointing_text
from halfbyte.plan.shape import Lengths
from halfbyte.plan.weights import Load, load_plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from halfbyte.plan.devices import Device

CONTEXTS = (1024, 4096, 16384)
BATCHES = (1, 8)
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


@dataclass(frozen=True)
class Plan:
    """Holds a planned run with everything that its report needs."""

    target: str
    origin: str
    run: Run
    device: Device
    planner: Planner
    load: Load
    load_text: Load | None
    train: TrainPlan
    suggestions: list[Suggestion]
    cards: list[str]

    @property
    def fits(self) -> bool:
        """Whether training fits on the device."""
        return self.planner.fits(self.train)

    def overrides(self) -> list[str]:
        """Return the settings that fit as lines to paste.

        Raises:
            PlanError: no settings fit.
        """
        if self.fits:
            return [override_line(self.train)]
        if not self.suggestions:
            raise PlanError(
                f"none of the settings tried makes {self.target} fit on {self.device.title}"
            )
        return [suggestion.override for suggestion in self.suggestions]


def make_plan(
    run: Run, config: PretrainedConfig, origin: str, device: Device, lengths: Lengths
) -> Plan:
    """Plan a run on a device.

    Raises:
        ModelError: no model can be built from the configuration, or its step cannot be traced.
        PlanError: the device cannot compute in the dtype that the config sets.
    """
    multimodal = config.get_text_config() is not config
    planner = Planner(run, config, device)
    train = choose(planner, lengths)
    suggestions = [] if planner.fits(train) else suggest(run, config, device, lengths, planner)
    impossible = not planner.fits(train) and not suggestions
    return Plan(
        target=run.model.name,
        origin=origin,
        run=run,
        device=device,
        planner=planner,
        load=load_plan(config, text_only=False),
        load_text=load_plan(config, text_only=True) if multimodal else None,
        train=train,
        suggestions=suggestions,
        cards=cards_that_fit(run, config, lengths) if impossible else [],
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain values; every size is in bytes."""
    train, device = plan.train, plan.device
    return {
        "target": plan.target,
        "origin": plan.origin,
        "load": _load_json(plan.load),
        "load_text": _load_json(plan.load_text) if plan.load_text else None,
        "train": {
            **{f"{name}_bytes": size for name, size in train.terms.items()},
            "largest": train.largest,
            "all_logits_bytes": _all_logits_bytes(plan),
            "peak_bytes": train.peak_bytes,
            "when": train.when,
            "phases": train.phases,
            "paged_bytes": train.paged_bytes,
            "context_bytes": train.context_bytes,
            "slack_bytes": train.slack_bytes,
            "needed_bytes": train.needed_bytes,
            "num_trainable": train.num_trainable,
            "layers": _layers(plan),
            "settings": _settings(plan),
        },
        "infer": _infer(plan.planner, plan.planner.stored.true_bytes),
        "device": {
            "name": device.name,
            "title": device.title,
            "kind": device.kind,
            "compute_dtype": train.compute_dtype,
            "total_bytes": device.total_bytes,
            "in_use_bytes": device.in_use_bytes,
            "needed_bytes": train.needed_bytes,
            "margin_bytes": plan.planner.margin_bytes(train),
            "fits": plan.fits,
            "facts": list(device.facts),
            "cards_that_fit": plan.cards,
            "models_that_fit": models_that_fit(device, train.compute_dtype),
        },
        "suggestions": [
            {
                "override": suggestion.override,
                "costs": suggestion.costs,
                "peak_bytes": suggestion.plan.peak_bytes,
                "needed_bytes": suggestion.plan.needed_bytes,
                "margin_bytes": suggestion.margin_bytes,
            }
            for suggestion in plan.suggestions
        ],
    }


def quantised_json(
    run: Run, config: PretrainedConfig, origin: str, device: Device, method: str
) -> dict[str, Any]:
    """Return what running an already quantised checkpoint takes; it can neither be trained nor converted.

    vLLM keeps its weights packed, so that they take the size of their files (None if they are not on this
    disk). transformers unpacks compressed-tensors; the weights then have the size of an unquantised dtype.
    """
    folder = Path(run.model.name)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    packed_bytes = sum(file.stat().st_size for file in files) if files else None
    load, planner = load_plan(config, text_only=False), Planner(run, config, device)
    return {
        "target": run.model.name,
        "origin": origin,
        "method": method,
        "num_parameters": load.num_parameters,
        "packed_bytes": packed_bytes,
        "unpacked_bytes": {name: load.stored[name].true_bytes for name in ("bf16", "fp32")},
        "infer": [] if packed_bytes is None else _infer(planner, packed_bytes),
        "device": {"title": device.title, "usable_bytes": device.usable_bytes},
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


def _load_json(load: Load) -> dict[str, Any]:
    return {
        "model_class": load.model_class,
        "num_parameters": load.num_parameters,
        "num_packed": load.num_packed,
        **{
            name: {
                "reported_bytes": stored.reported_bytes,
                "true_bytes": stored.true_bytes,
                "constants_bytes": stored.constants_bytes,
                "buffers_bytes": stored.buffers_bytes,
            }
            for name, stored in load.stored.items()
        },
        "files": load.files,
        "gguf_layer_bytes": load.gguf_layer_bytes,
        "no_files": load.no_files,
        "unpacked": [asdict(group) for group in load.unquantised],
    }


def _all_logits_bytes(plan: Plan) -> int:
    """Return the bytes of an fp32 copy of all logits, of which other losses hold several."""
    shape = plan.train.shape
    vocabulary: int = plan.planner.config.get_text_config().vocab_size
    return 4 * sum(shape.lengths) * vocabulary


def _settings(plan: Plan) -> dict[str, Any]:
    train, run = plan.train, plan.run
    return {
        "precision": run.model.precision,
        "compute_dtype": train.compute_dtype,
        "batch_size": run.train.batch_size,
        "micro_batch_size": train.micro_batch_size,
        "accumulation": train.accumulation,
        "length": train.length,
        "num_labels": train.shape.num_labels,
        "checkpointing": train.recompute,
        "optimizer": run.train.optimizer,
        "r": run.adapter.r,
        "override": override_line(train),
    }


def _layers(plan: Plan) -> list[dict[str, Any]]:
    train = plan.train
    tokens = train.micro_batch_size * train.length
    return [
        {"kind": kind, "count": count, "kept_bytes": kept, "kept_bytes_per_token": kept / tokens}
        for kind, count, kept in plan.planner.step.kept_per_layer(train.shape)
    ]


def _infer(planner: Planner, weights_bytes: int) -> list[dict[str, Any]]:
    """Return the bytes of KV cache, prefill and all with weights, by context and batch."""
    max_context = getattr(planner.config.get_text_config(), "max_position_embeddings", None)
    rows = []
    for context in [context for context in CONTEXTS if context <= (max_context or context)]:
        cache_bytes, prefill_bytes = planner.step.cache(context)
        rows += [
            {
                "context": context,
                "batch": batch,
                "kv_bytes": batch * cache_bytes,
                "prefill_bytes": batch * prefill_bytes,
                "total_bytes": weights_bytes + batch * (cache_bytes + prefill_bytes),
            }
            for batch in BATCHES
        ]
    return rows


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
    parts += [_train_table(report), _infer_table(report), _verdict(report)]
    return "\n\n".join(parts)


def load_text(config: PretrainedConfig) -> str:
    """Format what loading a model takes, where its training cannot be planned."""
    return _load_table("TO LOAD, GB", _load_json(load_plan(config, text_only=False)))


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
