"""Owns the way from rows and a machine to a config: columns, model, lengths, metric, numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.data.samples import Samples
from halfbyte.errors import DataError, PlanError
from halfbyte.eval.base_opponents import context_of
from halfbyte.initial.answers import Goal, goal_of
from halfbyte.initial.choose import CPU_MODEL, choose_model, numbers_for, plan_of
from halfbyte.initial.columns import choose_columns
from halfbyte.initial.files import Places, find_rows
from halfbyte.initial.fit import Fitted, fit_rows, length_for
from halfbyte.initial.questions import Questions
from halfbyte.initial.text import config_text, path_from
from halfbyte.plan.catalogue import model_config
from halfbyte.plan.devices import Device, find_device
from halfbyte.plan.weights import load_plan

CPU_TOKENS = (
    4_000_000  # that a first training on a CPU reads: an hour for the small model on two cores
)
ANSWER_TOKENS = {"cpu": 30_000, "cuda": 300_000}  # that each variant of a comparison generates
EXAMPLE_TOKENS = 1500  # of the examples in a few-shot prompt
ROWS_LOOKED_AT = 2000


@dataclass
class Drafted:
    """A config in the making.

    Attributes:
        settings: key → value, with absolute paths.
        comments: key → why.
        head: lines above all.
        folder: of the config.
    """

    settings: dict[str, Any]
    folder: Path
    comments: dict[str, str] = field(default_factory=dict)
    head: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any, why: str = "") -> None:
        """Set a key, and say why."""
        self.settings[key] = value
        if why:
            self.comments[key] = why

    def as_json(self) -> dict[str, Any]:
        """Return what was chosen, for a program."""
        return {"settings": self._settings(), "why": self.comments, "about": self.head}

    def text(self, schema: str) -> str:
        """Return the config as YAML."""
        return config_text(self._settings(), self.comments, self.head, schema)

    def _settings(self) -> dict[str, Any]:
        """Return the settings with paths as a file in the folder names them."""
        named = dict(self.settings)
        for key in ("data.train", "data.test", "model.name"):
            value = named.get(key)
            if isinstance(value, str) and Path(value).is_absolute():
                named[key] = path_from(self.folder, Path(value))
        return named


def draft_config(
    given: str,
    out: Path,
    questions: Questions,
    *,
    model: str | None,
    device: str,
    columns: tuple[str | None, str | None],
) -> Drafted:
    """Return a config for rows, with which they were prepared and which was planned.

    Args:
        given: a file, a folder or a dataset of the Hub.
        out: where the config will be.
        questions: puts questions, or takes what is proposed.
        model: name of the model; None: by the device.
        device: a name for ``find_device``.
        columns: those of prompts and answers; None: by their names.

    Raises:
        DataError: the rows cannot be used.
        PlanError: the model cannot be trained on the device.
    """
    machine = find_device(device)
    places = find_rows(given)
    draft = _data(places, out, questions, columns)
    chars = max(len(str(row)) for row in places.head)
    proposed = model or choose_model(machine, draft.settings | numbers_for(1000, 0), chars)
    name = proposed if model else questions("Model", proposed)
    local = Path(name).expanduser()
    draft.put("model.name", str(local.resolve()) if local.exists() else name)
    if name == CPU_MODEL:
        draft.comments["model.name"] = (
            "SmolLM2-135M-Instruct, from a Python package: small enough for a CPU"
        )
    elif not model:
        draft.comments["model.name"] = f"the largest of a few that {machine.title} trains"
    draft.put("model.precision", "nf4", "QLoRA: the base in 4 bits")
    draft.put("adapter.r", 16)
    draft.put("adapter.alpha", 16)
    system = questions("System message that tells the model its task (none)", "")
    if system:
        draft.put("data.system", system)
    fitted = fit_rows(draft.settings | numbers_for(1000, 0), questions.say)
    for key, why in fitted.notes.items():
        draft.put(key, fitted.settings[key], why)
    _lengths(draft, fitted)
    _numbers(draft, fitted, machine)
    _comparison(draft, fitted, machine, questions)
    _check_plan(draft, machine)
    draft.head.append("Relative paths start from this file's folder. Keys: halfbyte schema")
    return draft


def _check_plan(draft: Drafted, machine: Device) -> None:
    """Plan what was drafted, and note what it takes."""
    plan = plan_of(draft.settings, machine)
    if not plan.fits:
        lines = "\n  ".join(suggestion.override for suggestion in plan.suggestions)
        advice = (
            f"; these settings make it fit:\n  {lines}"
            if lines
            else "; name a smaller one with --model"
        )
        name = draft.settings["model.name"]
        raise PlanError(f"{name} cannot be trained on {machine.title} as drafted{advice}")
    needed = f"{plan.train.needed_bytes / 1e9:.1f} GB of {machine.usable_bytes / 1e9:.1f} GB"
    draft.head.append(f"Planned for {machine.title}: training takes {needed}.")


def _data(
    places: Places, out: Path, questions: Questions, columns: tuple[str | None, str | None]
) -> Drafted:
    """Return a draft of which rows are read, and how."""
    form, names = choose_columns(places.head, *columns)
    if form in ("prompt_completion", "alpaca") and not any(columns) and questions.asks:
        keys = (
            ("prompt", "completion") if form == "prompt_completion" else ("instruction", "output")
        )
        before = tuple(names.get(key, key) for key in keys)
        after = (
            questions("Column of the prompts", before[0]),
            questions("Column of the answers", before[1]),
        )
        if after != before:
            form, names = choose_columns(places.head, *after)
    draft = Drafted({}, out.resolve().parent)
    draft.put("data.train", places.train)
    if places.test:
        draft.put("data.test", places.test, "held out for the comparison")
    draft.put("data.format", form)
    if names:
        draft.put("data.columns", names)
    rows = len(places.head)
    if not places.test:
        draft.put("data.test_frac", 0.1 if rows >= 500 else 0.2, "held out for the comparison")
    frac = 0.02 if rows >= 2000 else 0.05 if rows >= 500 else 0.1
    draft.put("data.validation_frac", frac, "held out for the loss during training")
    return draft


def _lengths(draft: Drafted, fitted: Fitted) -> None:
    """Settle the longest row."""
    limit = context_of(fitted.base)
    lengths = fitted.prepared.full_lengths
    length, longer = length_for(lengths, limit)
    median, longest = int(np.median(lengths)), int(lengths.max())
    draft.put(
        "data.max_length",
        length,
        f"tokens; half the rows have {median} or fewer, the longest {longest}",
    )
    if longer:
        draft.put("data.on_overlength", "drop", f"{longer} of {len(lengths)} rows are longer")


def _numbers(draft: Drafted, fitted: Fitted, machine: Device) -> None:
    """Settle rate, epochs and batch; on a CPU, no more tokens than it reads in about an hour."""
    lengths = np.minimum(fitted.prepared.full_lengths, draft.settings["data.max_length"])
    config, _ = model_config(fitted.base.name)
    parameters = load_plan(config, text_only=False).num_parameters
    numbers = numbers_for(len(lengths), parameters)
    tokens = int(lengths.sum())
    for key, value in numbers.items():
        draft.put(key, value)
    draft.comments["train.learning_rate"] = "usual for LoRA on a model of this size"
    if machine.kind == "cpu" and tokens * numbers["train.epochs"] > CPU_TOKENS:
        steps = len(lengths) // numbers["train.batch_size"]
        most = max(10, int(steps * CPU_TOKENS / tokens))
        if most < steps:
            why = f"of {steps} for all rows: a CPU would take long; leave it out on a GPU"
            draft.put("train.max_steps", most, why)
        draft.put("train.epochs", 1)
        draft.put("train.eval_steps", max(5, min(most, steps) // 5))
        draft.put("train.save_steps", max(5, min(most, steps) // 5))


def _comparison(draft: Drafted, fitted: Fitted, machine: Device, questions: Questions) -> None:
    """Settle what the comparison measures."""
    goal = _goal(fitted.prepared.train)
    names = questions("Metrics", ", ".join(goal.metrics)).replace(",", " ").split()
    draft.put(
        "eval.metrics", names, f"the answers are {goal.shape}" if names == goal.metrics else ""
    )
    if goal.pattern and "exact_match" in names:
        draft.put("eval.answer_pattern", goal.pattern, "what the answer comes to")
    draft.head.append(
        f"{len(fitted.prepared.train)} rows to train on, {len(fitted.prepared.test)} for the comparison; {goal.shape}."
    )
    median = int(np.median(fitted.prepared.full_lengths))
    draft.put("eval.fewshot", max(1, min(5, EXAMPLE_TOKENS // median)))
    if goal.metrics == ["held_out_loss"]:
        draft.put("eval.rows", min(300, len(fitted.prepared.test)))
        return
    answers = np.quantile(fitted.prepared.train.num_labels, 0.99)
    tokens = min(2048, -(-int(answers * 1.25 + 4) // 8) * 8)
    draft.put("eval.max_new_tokens", tokens, "room for 99 of 100 answers")
    affordable = max(50, ANSWER_TOKENS[machine.kind] // tokens)
    draft.put("eval.rows", min(300, affordable, len(fitted.prepared.test)))


def _goal(samples: Samples) -> Goal:
    rows = samples.rows_by_digest(ROWS_LOOKED_AT)
    if not rows:
        raise DataError("no row is left to train on")
    calls = sum(any(message.tool_calls for message in row.messages) for row in rows)
    texts = sum(row.text is not None for row in rows)
    return goal_of([row.answer for row in rows], calls=calls, texts=texts)
