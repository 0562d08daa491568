"""Owns the draft of a config: values that were taken from another tool's, and what each key became."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

Rule = Callable[["Draft", Any], str | None]  # takes a value; returns why it has no twin, else None
Rules = Mapping[str, Rule]
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
OPTIMIZERS = {
    "adamw_torch": "adamw_torch",
    "adamw_torch_fused": "adamw_torch_fused",
    "adamw_hf": "adamw_torch",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "ademamix_8bit": "ademamix_8bit",
    "lion_8bit": "lion_8bit",
    "paged_lion_8bit": "paged_lion_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}
TRACKERS = ("wandb",)


@dataclass
class Draft:
    """A config that grows from another tool's.

    Attributes:
        values: by section and key, as in a config.
        facts: what several keys decide together, such as the rows of a pass.
        taken: keys that became ours, and what they became.
        left: keys without a twin, their values, and why.
    """

    values: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    taken: dict[str, str] = field(default_factory=dict)
    left: dict[str, tuple[Any, str]] = field(default_factory=dict)

    def put(self, path: str, value: Any) -> None:
        """Set the value at a dotted path."""
        *sections, key = path.split(".")
        place = self.values
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value

    def get(self, path: str) -> Any:
        """Return the value at a dotted path, or None."""
        place: Any = self.values
        for part in path.split("."):
            place = place.get(part) if isinstance(place, dict) else None
        return place

    def apply(self, source: Mapping[str, Any], rules: Rules, prefix: str = "") -> None:
        """Take each key of a source by its rule; a key without a rule, or that is refused, is left."""
        for key, value in source.items():
            name = f"{prefix}{key}"
            if value is None or value == "" or value == []:
                self.taken[name] = "says nothing"
                continue
            rule = rules.get(key)
            before = repr(self.values), repr(self.facts)
            why = "has no twin" if rule is None else rule(self, value)
            if why is not None:
                self.left[name] = (value, why)
            elif (repr(self.values), repr(self.facts)) == before:
                self.taken[name] = "is so already"
            else:
                self.taken[name] = "taken"


def put(path: str, convert: Callable[[Any], Any] | None = None) -> Rule:
    """Return the rule that sets a value at a path, converted if need be."""

    def rule(draft: Draft, value: Any) -> str | None:
        draft.put(path, convert(value) if convert else value)
        return None

    return rule


def fact(name: str) -> Rule:
    """Return the rule that keeps a value until all keys are read."""

    def rule(draft: Draft, value: Any) -> str | None:
        draft.facts[name] = value
        return None

    return rule


def implied(why: str, unless: tuple[Any, ...] = ()) -> Rule:
    """Return the rule of a key that needs no twin, for the values but those of ``unless``."""

    def rule(draft: Draft, value: Any) -> str | None:
        return why if value in unless else None

    return rule


def lacking(why: str, unless: tuple[Any, ...] = (False,)) -> Rule:
    """Return the rule of a key that has no twin, but for values that ask for nothing."""

    def rule(draft: Draft, value: Any) -> str | None:
        return None if value in unless else why

    return rule


def scheduler(draft: Draft, value: Any) -> str | None:
    """Take a learning-rate schedule."""
    if value not in SCHEDULERS:
        return f"allowed: {', '.join(SCHEDULERS)}"
    draft.put("train.scheduler", value)
    return None


def optimizer(draft: Draft, value: Any) -> str | None:
    """Take an optimizer by its name in transformers."""
    if value not in OPTIMIZERS:
        return f"allowed: {', '.join(sorted(set(OPTIMIZERS.values())))}"
    draft.put("train.optimizer", OPTIMIZERS[value])
    return None


def targets(draft: Draft, value: Any) -> str | None:
    """Take the target modules of LoRA, a list or a text with commas."""
    names = value.split(",") if isinstance(value, str) else list(value)
    names = [name.strip() for name in names]
    everything = names in (["all-linear"], ["all"])
    draft.put("adapter.targets", "all-linear" if everything else names)
    return None


def output_dir(draft: Draft, value: Any) -> str | None:
    """Take the folder of a run: its parent is ours for runs, its name that of the run."""
    path = PurePosixPath(str(value))
    draft.put("name", path.name)
    draft.put("runs_dir", str(path.parent) if str(path.parent) != "." else "runs")
    return None


def dtype(draft: Draft, name: str, value: Any) -> str | None:
    """Take a flag such as ``bf16: true``."""
    if value is True or (value in ("true", "full") and name != "auto"):
        draft.put("model.compute_dtype", name)
    return None


def steps_or_frac(path: str, what: str) -> Rule:
    """Return the rule of a number of steps, which in transformers may be a share of all steps if below 1."""

    def rule(draft: Draft, value: Any) -> str | None:
        if isinstance(value, float) and 0 < value < 1:
            return f"a share of the steps; give {path} as a number of steps"
        draft.put(path, int(value))
        return None

    rule.__doc__ = what
    return rule


def finish(draft: Draft) -> None:
    """Decide what several keys say together, and fill in what a config must have."""
    facts = draft.facts
    rows, accumulated = facts.get("rows"), facts.get("accumulation")
    if rows is not None or accumulated is not None:
        micro = int(rows or facts["default_rows"])
        draft.put("train.batch_size", micro * int(accumulated or 1))
        draft.put("train.micro_batch_size", micro)
    bits = facts.get("bits")
    if bits is not None and draft.get("model.precision") is None:
        draft.put("model.precision", {4: "nf4", 8: "int8"}.get(int(bits), "bf16"))
    if draft.get("train.learning_rate") is None:
        draft.put("train.learning_rate", facts.get("default_rate", 2e-4))
    if "warmup_steps" in facts:
        _warm_up(draft, facts["warmup_steps"])


def _warm_up(draft: Draft, steps: Any) -> None:
    """Take a number of warm-up steps, if the number of all steps is known."""
    if isinstance(steps, float) and 0 < steps < 1:
        draft.put("train.warmup_frac", steps)
        return
    total = draft.get("train.max_steps")
    if total:
        draft.put("train.warmup_frac", round(min(0.99, int(steps) / int(total)), 4))
    elif int(steps):
        why = "a share is needed, train.warmup_frac: of how many steps is known once the rows are read"
        draft.left["warmup_steps"] = (steps, why)
        draft.taken.pop("warmup_steps", None)
    else:
        draft.put("train.warmup_frac", 0.0)
