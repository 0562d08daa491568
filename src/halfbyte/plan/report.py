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
from halfbyte.plan.longest import longest_rows
from halfbyte.plan.memory import Planner, TrainPlan
from halfbyte.plan.shape import Lengths
from halfbyte.plan.weights import Load, load_plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from halfbyte.plan.devices import Device

CONTEXTS = (1024, 4096, 16384)
BATCHES = (1, 8)


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


def as_json(plan: Plan, *, longest: bool = True) -> dict[str, Any]:
    """Return the plan as plain values; every size is in bytes.

    ``longest``: with the longest row by card, for which more steps are traced.
    """
    train, device = plan.train, plan.device
    return {
        "target": plan.target,
        "origin": plan.origin,
        "load": load_json(plan.load),
        "load_text": load_json(plan.load_text) if plan.load_text else None,
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
        "longest_rows": longest_rows(plan.run, plan.planner.config) if longest else {},
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


def load_json(load: Load) -> dict[str, Any]:
    """Return what loading a model takes as plain values, sizes in bytes."""
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
