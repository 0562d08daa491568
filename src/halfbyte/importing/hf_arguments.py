"""Owns the keys of transformers' TrainingArguments and PEFT's LoraConfig, which several tools share."""

from __future__ import annotations

import re
from typing import Any, get_args

from halfbyte.config.schema import Optimizer, Scheduler
from halfbyte.importing.draft import (
    BadValueError,
    Covered,
    Draft,
    Rule,
    count,
    fact,
    implied,
    lacking,
    number,
    one_of,
    put,
    refused,
    switch,
    text,
    texts,
    whole,
)

NO_PUSH = "halfbyte export --push uploads what was proven"
NO_SPLIT = "start the processes with halfbyte train --processes, or accelerate launch"
NO_WORKERS = "rows are prepared before training, on all cores"
NO_SECRET = "a secret is never read from a file: hf auth login"
ATTENTION = "data.max_length and the card decide how attention is computed"
NO_PATTERN = "a pattern; adapter.targets takes names of modules"
ONLY_LORA = "halfbyte trains LoRA alone, on a quantised or a 16-bit base"
ONLY_SFT = "halfbyte does supervised fine-tuning alone"
SCHEDULERS = {name: name for name in get_args(Scheduler)}
OPTIMIZERS = {name: name for name in get_args(Optimizer)} | {
    "adamw_hf": "adamw_torch",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
}
DTYPES = {
    "bfloat16": "bf16",
    "bf16": "bf16",
    "float16": "fp16",
    "fp16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "fp32": "fp32",
    "auto": "auto",
}


def is_pattern(value: Any) -> bool:
    """Return whether target modules are one regular expression, rather than names."""
    return isinstance(value, str) and not re.fullmatch(r"[\w.,\s-]*", value)


def targets(draft: Draft, value: Any) -> str | None:
    """Take the target modules of LoRA, a list or a text with commas."""
    names = texts(value)
    if is_pattern(value):
        return NO_PATTERN
    everything = {"all-linear", "all"} & {*names}
    draft.put("adapter.targets", "all-linear" if everything else names)
    return None


def dtype(name: str) -> Rule:
    """Return the rule that keeps a dtype by its name in PyTorch."""

    def rule(draft: Draft, value: Any) -> str | None:
        ours = DTYPES.get(text(value).removeprefix("torch."))
        if ours is None:
            return f"allowed: {', '.join(DTYPES)}"
        draft.facts[name] = ours
        return None

    return rule


def half(name: str) -> Rule:
    """Return the rule of ``bf16`` and ``fp16``, which may be ``auto`` or ``full``."""

    def rule(draft: Draft, value: Any) -> str | None:
        if str(value).lower() == "auto":
            draft.facts[name] = "auto"
        else:
            draft.facts[name] = str(value).lower() == "full" or switch(value)
        return None

    return rule


def flag(bits: int) -> Rule:
    """Return the rule of ``load_in_4bit`` and ``load_in_8bit``."""

    def rule(draft: Draft, value: Any) -> str | None:
        if switch(value):
            draft.facts["bits"] = bits
        return None

    return rule


def sets(path: str, value: Any) -> Rule:
    """Return the rule of a switch that sets a value of ours if it is on."""

    def rule(draft: Draft, on: Any) -> str | None:
        if switch(on):
            draft.put(path, value)
        return None

    return rule


def packing(
    why: str = "rows of a pass are laid end to end, without attention between them",
) -> Rule:
    """Return the rule of a switch that packs rows."""

    def rule(draft: Draft, value: Any) -> str | None:
        if switch(value):
            draft.facts["packs"] = True
        return Covered(why)

    return rule


def positive(path: str, zero: str) -> Rule:
    """Return the rule of a number above 0, of which 0 or less is named."""

    def rule(draft: Draft, value: Any) -> str | None:
        plain = number(value)
        if plain <= 0:
            return zero
        draft.put(path, plain)
        return None

    return rule


def num_steps(path: str) -> Rule:
    """Return the rule of a number of steps, which in transformers is a share of all steps if below 1."""

    def rule(draft: Draft, value: Any) -> str | None:
        if 0 < number(value) < 1:
            return f"a share of the steps; give {path} as a number of steps"
        draft.put(path, whole(value))
        return None

    return rule


def max_steps(draft: Draft, value: Any) -> str | None:
    """Take the number of steps, of which transformers reads -1 as none."""
    if whole(value) > 0:
        draft.put("train.max_steps", whole(value))
    return None


def warm_up(draft: Draft, value: Any) -> str | None:
    """Take a number of warm-up steps."""
    if number(value) < 0:
        raise BadValueError("at least 0 is expected")
    draft.facts["warmup_steps"] = number(value)
    return None


def checkpointing(draft: Draft, value: Any) -> str | None:
    """Take gradient checkpointing; ``unsloth`` and ``offload`` are forms of it that move memory besides."""
    if value in ("unsloth", "offload", "offload_disk"):
        draft.put("train.checkpointing", "on")
        return None
    draft.put("train.checkpointing", "on" if switch(value) else "off")
    return None


def _report_to(draft: Draft, value: Any) -> str | None:
    names = texts(value)
    wanted = {"wandb", "all"} & {*names}
    draft.put("track.wandb", "auto" if wanted else "off")
    others = {*names} - {"wandb", "all", "none"}
    return "the only tracker is Weights & Biases" if others else None


def _seed_of_rows(draft: Draft, value: Any) -> str | None:
    if whole(value) == draft.get("seed"):
        return Covered("is the seed of the run")
    return "the order of the rows has the seed of the run"


def _strategy(kind: str) -> Rule:
    def rule(draft: Draft, value: Any) -> str | None:
        draft.facts[f"{kind}_strategy"] = text(value)
        if value in ("steps", "no"):
            return None
        return f"give train.{kind}_steps, a number of steps"

    return rule


def start_weights(draft: Draft, value: Any) -> str | None:
    """Take the start of the adapter, of which True is PEFT's default."""
    if value is True or value == "true":
        return Covered("is the default")
    if value in ("pissa", "olora", "loftq"):
        draft.put("adapter.init", value)
        return None
    return "allowed for adapter.init: default, pissa, olora, loftq"


def _overwrite(draft: Draft, value: Any) -> str | None:
    if switch(value):
        draft.put("train.existing", "replace")
    return None


NO_BEST = lacking("the last step is kept; checkpoints are in the run folder", (False,))
LORA: dict[str, Rule] = {
    "r": put("adapter.r", whole),
    "lora_alpha": put("adapter.alpha", number),
    "lora_dropout": put("adapter.dropout", number),
    "target_modules": targets,
    "use_rslora": put("adapter.rslora", switch),
    "use_dora": put("adapter.dora", switch),
    "init_lora_weights": start_weights,
    "bias": lacking("biases stay as they are", ("none",)),
    "task_type": refused("only causal language models are trained", ("CAUSAL_LM",)),
    "peft_type": refused(ONLY_LORA, ("LORA",)),
    "inference_mode": implied("an adapter is trained", (True,)),
    "modules_to_save": lacking("only LoRA is trained; new tokens: data.new_tokens"),
    "fan_in_fan_out": implied("it is read from the layers"),
    "lora_bias": lacking("biases stay as they are"),
    "loftq_config": lacking("adapter.init: loftq"),
    "base_model_name_or_path": put("model.name", text),
    "use_gradient_checkpointing": checkpointing,
    "random_state": put("seed", whole),
}
QUANTISATION: dict[str, Rule] = {
    "load_in_4bit": flag(4),
    "load_in_8bit": flag(8),
    "bnb_4bit_quant_type": one_of("model.precision", {"nf4": "nf4", "fp4": "fp4"}),
    "bnb_4bit_use_double_quant": put("model.double_quant", switch),
    "bnb_4bit_compute_dtype": dtype("bnb_dtype"),
    "bnb_4bit_quant_storage": implied("weights are stored as bytes"),
    "quant_method": lacking("bitsandbytes is used", ("bitsandbytes",)),
}
TRAINING: dict[str, Rule] = {
    "output_dir": fact("output_dir", text),
    "run_name": fact("name", text),
    "overwrite_output_dir": _overwrite,
    "learning_rate": put("train.learning_rate", number),
    "num_train_epochs": put("train.epochs", number),
    "max_steps": max_steps,
    "per_device_train_batch_size": fact("rows", count),
    "gradient_accumulation_steps": fact("accumulation", count),
    "per_device_eval_batch_size": implied("scoring passes choose their own size"),
    "eval_accumulation_steps": implied("scoring keeps nothing on the GPU"),
    "optim": one_of("train.optimizer", OPTIMIZERS),
    "weight_decay": put("train.weight_decay", number),
    "max_grad_norm": positive(
        "train.max_grad_norm", "gradients are always clipped, at 1 by default"
    ),
    "lr_scheduler_type": one_of("train.scheduler", SCHEDULERS),
    "warmup_ratio": put("train.warmup_frac", number),
    "warmup_steps": warm_up,
    "neftune_noise_alpha": positive("train.neftune_alpha", "no noise is the default"),
    "gradient_checkpointing": checkpointing,
    "gradient_checkpointing_kwargs": implied("recomputing is never reentrant"),
    "logging_steps": num_steps("train.log_steps"),
    "logging_strategy": lacking("train.log_steps is a number of steps", ("steps",)),
    "logging_first_step": implied("the first step is always recorded"),
    "logging_dir": implied("metrics are in the run folder"),
    "eval_steps": num_steps("train.eval_steps"),
    "eval_strategy": _strategy("eval"),
    "evaluation_strategy": _strategy("eval"),
    "do_eval": implied("held-out rows decide that"),
    "do_train": implied("it trains", (False,)),
    "save_steps": num_steps("train.save_steps"),
    "save_strategy": _strategy("save"),
    "save_total_limit": put("train.keep_checkpoints", whole),
    "save_only_model": lacking("a checkpoint has all that a resume needs"),
    "save_safetensors": implied("weights are written as safetensors alone", (False,)),
    "seed": put("seed", whole),
    "data_seed": _seed_of_rows,
    "bf16": half("bf16"),
    "fp16": half("fp16"),
    "tf32": implied("products in fp32 are exact", (True,)),
    "report_to": _report_to,
    "push_to_hub": lacking(NO_PUSH),
    "hub_model_id": lacking(NO_PUSH),
    "hub_strategy": lacking(NO_PUSH),
    "hub_private_repo": lacking(NO_PUSH),
    "hub_token": lacking(NO_SECRET),
    "deepspeed": lacking(NO_SPLIT),
    "fsdp": lacking(NO_SPLIT),
    "fsdp_config": lacking(NO_SPLIT),
    "ddp_timeout": lacking("PyTorch's own is used", (1800,)),
    "ddp_find_unused_parameters": implied("every adapter gets a gradient", (True,)),
    "local_rank": implied("the launcher decides it"),
    "dataloader_num_workers": implied(NO_WORKERS),
    "dataloader_pin_memory": implied(NO_WORKERS),
    "dataloader_prefetch_factor": implied(NO_WORKERS),
    "dataloader_drop_last": lacking("the last rows are used"),
    "remove_unused_columns": implied("each column is used, refused or counted"),
    "group_by_length": lacking("rows of a pass are laid end to end, so none is padded"),
    "length_column_name": implied("lengths are known"),
    "resume_from_checkpoint": lacking(
        "a run goes on by itself; from a certain step: train.resume_from", (False, True)
    ),
    "load_best_model_at_end": NO_BEST,
    "metric_for_best_model": NO_BEST,
    "greater_is_better": NO_BEST,
    "torch_compile": lacking("has no twin"),
    "use_liger_kernel": implied("speed.kernels"),
    "disable_tqdm": implied("a bar is shown in a terminal alone"),
    "average_tokens_across_devices": implied("the divisor is that of all processes", (False,)),
    "adam_beta1": lacking("0.9 is used", (0.9,)),
    "adam_beta2": lacking("0.999 is used", (0.999,)),
    "adam_epsilon": lacking("1e-8 is used", (1e-8,)),
    "label_smoothing_factor": lacking("the loss is the plain cross-entropy", (0,)),
    "include_num_input_tokens_seen": implied("metrics.jsonl counts tokens"),
    "include_tokens_per_second": implied("metrics.jsonl has them"),
}
