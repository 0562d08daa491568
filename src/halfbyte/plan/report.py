"""Owns what a plan says: one JSON object for programs, tables for people."""

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
from halfbyte.plan.memory import Planner, TrainPlan, layers_words
from halfbyte.plan.shape import Lengths
from halfbyte.plan.weights import Load, load_plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from halfbyte.plan.devices import Device

CONTEXTS = (1024, 4096, 16384)
BATCHES = (1, 8)
# What each term is, in words; docs/memory.md has the sources.
TERMS = {
    "weights": "the base; what is not packed lies in the compute dtype",
    "constants": "maxima and scales of the packed weights",
    "adapter": "4 bytes for each trainable weight: r·(in + out) a layer",
    "optimizer": "states of the optimizer for each trainable weight",
    "workspace": "cuBLAS, one block for each of two threads",
    "buckets": "in which DDP gathers the gradients of several processes",
    "gradients": "4 bytes for each trainable weight that has one by then",
    "activations": "what the forward pass keeps for the backward pass",
    "logits": "loss head: labelled positions and one tile of logits",
    "dequantised": "one layer's weight, unpacked for its product",
    "working_set": "temporaries of the layer at work, recomputed ones too",
    "context": "the process beside its tensors",
    "slack": "what an allocator holds beyond what is asked of it",
}


@dataclass(frozen=True)
class Plan:
    """Everything that a plan knows."""

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
        """Lines to paste: the settings that fit.

        Raises:
            PlanError: none do.
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
        PlanError: the device cannot compute in the dtype asked for.
    """
    multimodal = config.get_text_config() is not config
    planner = Planner(run, config, device)
    train = choose(planner, lengths)
    suggestions = [] if planner.fits(train) else suggest(run, config, device, lengths, planner)
    lost = not planner.fits(train) and not suggestions
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
        cards=cards_that_fit(run, config, lengths) if lost else [],
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; every size is in bytes."""
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
    """What a checkpoint that is already quantised takes to run: it neither trains nor loads otherwise.

    Its weights stay packed in vLLM, so that they take what their files hold (None: not on this disk);
    transformers unpacks compressed-tensors, whose bytes then are those of a plain dtype.
    """
    folder = Path(run.model.name)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    packed = sum(file.stat().st_size for file in files) if files else None
    load, planner = load_plan(config, text_only=False), Planner(run, config, device)
    return {
        "target": run.model.name,
        "origin": origin,
        "method": method,
        "num_parameters": load.num_parameters,
        "packed_bytes": packed,
        "unpacked_bytes": {name: load.stored[name].true_bytes for name in ("bf16", "fp32")},
        "infer": [] if packed is None else _infer(planner, packed),
        "device": {"title": device.title, "usable_bytes": device.usable_bytes},
    }


def quantised_text(report: dict[str, Any]) -> str:
    """The report as a table for a terminal, from ``quantised_json``'s object."""
    packed, unpacked = report["packed_bytes"], report["unpacked_bytes"]
    told = "not known before it is downloaded" if packed is None else f"{packed / 1e9:.3f}"
    lines = [
        f"{report['target']}: {report['num_parameters']:,} parameters, already quantised"
        f" ({report['method']}; {report['origin']})",
        "",
        "TO LOAD, GB",
        f"  packed, as vLLM keeps it                          {told:>10}",
        f"  unpacked to bf16, in transformers                 {_gb(unpacked['bf16'])}",
        f"  unpacked to fp32, in transformers on most CPUs    {_gb(unpacked['fp32'])}",
        "",
    ]
    if report["infer"]:
        lines += [_infer_table(report), ""]
    usable = report["device"]["usable_bytes"]
    lines.append(f"ON {report['device']['title']}: {usable / 1e9:.3f} GB for weights and cache")
    lines.append("It cannot be trained: plan the unquantised checkpoint that it was made from.")
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
        "unpacked": [asdict(left) for left in load.left],
    }


def _all_logits_bytes(plan: Plan) -> int:
    """One fp32 copy of the logits of every position, which other losses hold several times."""
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
    """Weights, keys and values, and the prefill's temporaries, by context and batch."""
    longest = getattr(planner.config.get_text_config(), "max_position_embeddings", None)
    rows = []
    for context in [context for context in CONTEXTS if context <= (longest or context)]:
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
    """The report as tables for a terminal, from ``as_json``'s object."""
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
                f"its language model alone ({text['num_parameters']:,}), which is what trains", text
            )
        )
    parts += [_train_table(report), _infer_table(report), _verdict(report)]
    return "\n\n".join(parts)


def load_text(config: PretrainedConfig) -> str:
    """What a model takes to load, for one whose training cannot be planned."""
    return _load_table("TO LOAD, GB", _load_json(load_plan(config, text_only=False)))


def _load_table(title: str, load: dict[str, Any]) -> str:
    lines = [f"{title:<52}{'reported':>10}{'true':>10}"]
    words = {"nf4": "nf4, double quantisation", "nf4_single": "nf4, without it"}
    for name, stored in load.items():
        if isinstance(stored, dict) and "true_bytes" in stored:
            lines.append(
                f"  {words.get(name, name):<50}{_gb(stored['reported_bytes'])}"
                f"{_gb(stored['true_bytes'])}"
            )
    for name, size in load["files"].items():
        if name in ("awq", "gguf_f16", "gguf_q8_0", "gguf_q4_k_m"):
            lines.append(f"  {name.replace('gguf_', 'GGUF '):<50}{'':>10}{_gb(size)}")
    lines.append(f"  {'one layer of GGUF q4_k_m':<50}{'':>10}{_gb(load['gguf_layer_bytes'])}")
    lines += [f"  {name}: none. {why}" for name, why in load["no_files"].items()]
    left = [
        f"  {entry['what']}: {entry['num_parameters']:,} ({entry['why']})"
        for entry in load["unpacked"]
    ]
    return "\n".join([*lines, "left unquantised by int8, nf4 and fp4:", *left])


def _train_table(report: dict[str, Any]) -> str:
    train, settings = report["train"], report["train"]["settings"]
    lines = [
        f"TO TRAIN in {settings['precision']}, computing in {settings['compute_dtype']}, with"
        f" {settings['micro_batch_size']} × {settings['length']} tokens"
        f" × {settings['accumulation']} accumulated, checkpointing"
        f" {layers_words(settings['checkpointing'])}, {settings['optimizer']}, r={settings['r']}"
    ]
    lines.append(f"  {'GB':<14}{'at the peak':>12}{'at most':>10}")
    for name, words in TERMS.items():
        size = train[f"{name}_bytes"]
        most = train["largest"].get(name, size)
        if name == "context":
            lines.append(
                f"  {'tensors':<14}{_gb(train['peak_bytes']):>12}{'':>12}peak: {train['when']}"
            )
        if most:
            lines.append(f"  {name.replace('_', ' '):<14}{_gb(size):>12}{_gb(most)}  {words}")
    lines.append(f"  {'needed':<14}{_gb(train['needed_bytes']):>12}")
    if train["paged_bytes"]:
        lines.append(f"  (and {train['paged_bytes'] / 1e9:.2f} GB of optimizer states, paged)")
    lines.append(
        f"  logits of every position at once would take {_gb(train['all_logits_bytes']).strip()} a copy"
    )
    for layer in train["layers"]:
        lines.append(
            f"  each of {layer['count']} {layer['kind'].replace('_', ' ')}s keeps"
            f" {layer['kept_bytes'] / 1e6:.1f} MB, {layer['kept_bytes_per_token'] / 1e3:.1f} kB a token"
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
        lines.append(f"  in use by others {_gb(device['in_use_bytes']).strip()} GB")
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
        lines.append(f"  models that this device trains in 4 bits: {fitting}")
        cards = ", ".join(device["cards_that_fit"]) or "none of the table"
        lines.append(f"  cards that train it, a row at a time and recomputing: {cards}")
    return "\n".join(lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:>10.3f}"
