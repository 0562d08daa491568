"""Owns what several keys of another tool's config decide together, and what our own reader would refuse."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from halfbyte.config.paths import DATA_SUFFIXES, is_local
from halfbyte.config.section import FOUR_BIT
from halfbyte.importing.draft import BadValueError, Draft

SPLIT_KEYS = ("deepspeed", "fsdp", "fsdp_config", "ddp", "world_size", "num_processes")


def settle(draft: Draft, defaults: dict[str, Any]) -> None:
    """Decide what several keys say together, state the tool's defaults, and leave out what has no effect here.

    Args:
        draft: the draft, with all keys read.
        defaults: values of the tool, by our dotted paths, that hold where its config is silent.
    """
    steps = (_name, _batch, _warm_up, _strategies, _precision, _loss)
    for step in steps:
        try:
            step(draft)
        except BadValueError as error:
            draft.faults.append(("", f"{step.__name__.strip('_')}: {error}"))
    for path, value in defaults.items():
        draft.default(path, value)
    if draft.get("train.warmup_frac") and draft.get("train.scheduler") == "constant":
        draft.drop("train.warmup_frac")
        draft.note("warm-up", "the schedule constant has none; with one: constant_with_warmup")
    for check in (_held_out, _adapter, _paths):
        check(draft)
    if draft.get("train.save_steps") == 0 and draft.get("train.keep_checkpoints"):
        draft.drop("train.keep_checkpoints")
        draft.note("checkpoints kept", "none are written, so none are counted")
    if draft.get("track.wandb") == "off" and draft.get("track.project"):
        draft.drop("track.project")
        draft.note("W&B project", "Weights & Biases is off: track.wandb")


def _name(draft: Draft) -> None:
    folder, name = draft.facts.get("output_dir"), draft.facts.get("name")
    if folder:
        path = PurePosixPath(folder)
        parent = str(path.parent)
        draft.put("runs_dir", "runs" if parent == "." else parent)
        name = name or path.name
    clean = re.sub(r"[^\w.=+,~-]+", "_", name or "", flags=re.ASCII)[:100]
    if clean.strip("."):
        draft.put("name", clean)


def _batch(draft: Draft) -> None:
    facts = draft.facts
    rows, accumulated = facts.get("rows"), facts.get("accumulation")
    total = facts.get("total_rows")
    micro = rows or facts["default_rows"]
    if total:
        draft.put("train.batch_size", total)
        if total % micro:
            draft.note("rows of a pass", f"{micro} do not divide {total}: it is chosen by the plan")
        else:
            draft.put("train.micro_batch_size", micro)
    else:
        draft.put("train.batch_size", micro * (accumulated or 1))
        draft.put("train.micro_batch_size", micro)
    if facts.get("packs"):
        draft.note(
            "batch of packed rows",
            "each row of a batch was several rows packed to the longest length; train.batch_size counts rows as they"
            " are, so a step sees fewer tokens: multiply it by the mean number of rows in data.max_length",
        )
    if any(name.split(".")[-1] in SPLIT_KEYS for name in draft.left):
        draft.note(
            "number of GPUs",
            "the batch was rows × accumulation × GPUs; train.batch_size is over all processes and is that of one"
            " GPU: multiply it",
        )


def _warm_up(draft: Draft) -> None:
    """Take a number of warm-up steps, which outranks a share, if the number of all steps is known."""
    steps = draft.facts.get("warmup_steps")
    if steps is None or (steps == 0 and draft.get("train.warmup_frac") is not None):
        return
    total = draft.get("train.max_steps")
    if 0 <= steps < 1:
        draft.put("train.warmup_frac", float(steps))
    elif total:
        draft.put("train.warmup_frac", round(min(0.99, steps / total), 4))
    else:
        draft.put("train.warmup_frac", 0.03)
        why = "train.warmup_frac is a share of the steps, whose number is known once the rows are read: 0.03 stands"
        name = draft.facts.get("warmup_name", "warmup_steps")
        draft.leave(name, steps, why)


def _strategies(draft: Draft) -> None:
    facts = draft.facts
    if facts.get("save_strategy") == "no":
        draft.put("train.save_steps", 0)
    evaluates = facts.get("eval_strategy") or facts["eval_default"]
    if evaluates == "no" and draft.get("train.eval_steps"):
        draft.drop("train.eval_steps")
        draft.note("eval_steps", "has no effect without eval_strategy: steps")
    if facts.get("eval_strategy") == "steps" and draft.get("train.eval_steps") is None:
        # transformers evaluates as often as it logs where nothing else is said.
        draft.put("train.eval_steps", draft.get("train.log_steps") or facts["log_steps"])


def _precision(draft: Draft) -> None:
    """Decide the storage of the weights and the dtype of the products."""
    facts = draft.facts
    bits = facts.get("bits", 16)
    mixed = _mixed(facts)
    stored, products = facts.get("dtype"), facts.get("bnb_dtype")
    if bits == 16:
        for path in ("model.precision", "model.double_quant"):
            if draft.get(path) is not None:
                draft.drop(path)
                draft.note(path, "the weights are not quantised")
        draft.put("model.precision", mixed or (stored if stored != "auto" else None) or "bf16")
        if mixed and stored not in (None, "auto", mixed):
            why = f"{stored} weights with products in {mixed} have no twin: they are stored in {mixed}"
            draft.note("dtype of the weights", why)
        return
    if bits == 8:
        draft.put("model.precision", "int8")
        if draft.get("model.double_quant") is not None:
            draft.drop("model.double_quant")
            draft.note("model.double_quant", "is of 4-bit weights")
    else:
        draft.default("model.precision", facts.get("quant_type", "nf4"))
        draft.default("model.double_quant", facts.get("double_quant", True))
    chosen = mixed or products or (stored if stored != "auto" else None)
    if chosen:
        draft.put("model.compute_dtype", chosen)
    if mixed and products not in (None, "auto", mixed):
        why = (
            f"it is {products} for quantised layers and {mixed} for others; here it is one: {mixed}"
        )
        draft.note("dtype of the products", why)


def _mixed(facts: dict[str, Any]) -> str | None:
    """Return the dtype that ``bf16`` and ``fp16`` ask for; None if they leave it open."""
    bf16, fp16 = facts.get("bf16"), facts.get("fp16")
    if bf16 is True:
        return "bf16"
    if fp16 is True:
        return "fp16"
    if bf16 == "auto":
        return None
    if bf16 is False:
        return None if facts.get("dtype") not in (None, "auto") else "fp32"
    return facts.get("default_mixed")


def _loss(draft: Draft) -> None:
    """Say on which tokens the loss is, which in TRL the form of the rows decides."""
    assistant, completion = draft.facts.get("assistant"), draft.facts.get("completion")
    if assistant is None and completion is None and not draft.facts.get("rows_decide_loss"):
        return
    if assistant or completion:
        draft.put("data.loss_on", "completion")
    elif completion is False:
        draft.put("data.loss_on", "all")
    elif draft.get("data.format") != "text":
        draft.put("data.loss_on", "completion")
        draft.note(
            "tokens of the loss",
            "TRL learns the completion of prompt/completion rows, but all tokens of messages: for that data.loss_on: all",
        )


def _held_out(draft: Draft) -> None:
    if draft.get("data.test_split") and draft.get("data.test") is None:
        draft.drop("data.test_split")
        draft.note("split for evaluation", "nothing is evaluated, as eval_strategy is no")
    held = draft.get("data.validation_frac") or draft.get("data.test")
    if draft.get("train.eval_steps") and not held:
        draft.drop("train.eval_steps")
        draft.note(
            "evaluation", "no rows are held out: data.validation_frac, then train.eval_steps"
        )


def _adapter(draft: Draft) -> None:
    start, stored = draft.get("adapter.init"), draft.get("model.precision")
    unscaled = draft.get("adapter.alpha") == draft.get("adapter.r") and not draft.get(
        "adapter.rslora"
    )
    why = ""
    if start in ("pissa", "olora") and stored != "fp32":
        why = "rewrites the base weights, which needs model.precision fp32"
    elif start == "loftq" and stored not in FOUR_BIT:
        why = "needs a 4-bit base"
    elif start == "loftq" and not unscaled:
        why = "needs adapter.alpha equal to adapter.r, and no rslora"
    elif start in ("pissa", "olora", "loftq") and draft.get("adapter.dora"):
        why = "does not go with adapter.dora"
    elif start in ("pissa", "olora") and draft.get("data.new_tokens"):
        why = "does not go with data.new_tokens"
    if why:
        draft.drop("adapter.init")
        draft.left["(start of the adapter)"] = (start, why)


def _paths(draft: Draft) -> None:
    """Leave out what only rows of the Hub have, and say from where relative paths are read."""
    local = {}
    for part in ("train", "test"):
        entries = draft.get(f"data.{part}") or []
        entries = [{"path": entries}] if isinstance(entries, str) else entries
        local[part] = [is_local(entry["path"], Path(), DATA_SUFFIXES) for entry in entries]
        for entry, is_file in zip(entries, local[part], strict=True):
            for key in ("split", "subset", "revision"):
                if is_file and entry.pop(key, None) not in (None, "train", "test"):
                    draft.note(f"{key} of {entry['path']}", "has no effect on a file")
            if is_file and not entry["path"].startswith(("/", "~")):
                draft.note(
                    "relative paths",
                    "are read from the folder of this config, not from where you are",
                )
    if all(local["train"]) and all(local["test"]):
        for key in ("train_split", "test_split", "subset", "revision"):
            if draft.get(f"data.{key}") is not None:
                draft.drop(f"data.{key}")
                draft.note(f"data.{key}", "has no effect where no rows of the Hub are named")
    model = draft.get("model.name") or ""
    if draft.get("model.revision") and model.startswith(("/", ".", "~")):
        draft.drop("model.revision")
        draft.note("revision of the model", "has no effect on a folder")
