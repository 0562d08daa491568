"""Owns the keys of transformers' TrainingArguments and PEFT's LoraConfig, which several tools share."""

from __future__ import annotations

from typing import Any

from halfbyte.importing.draft import (
    TRACKERS,
    Draft,
    Rule,
    dtype,
    fact,
    implied,
    lacking,
    optimizer,
    output_dir,
    put,
    scheduler,
    steps_or_frac,
    targets,
)

NO_PUSH = "halfbyte export --push uploads what was proven"
NO_SPLIT = "start the processes with halfbyte train --processes, or accelerate launch"
NO_WORKERS = "rows are prepared before training, on all cores"


def _report_to(draft: Draft, value: Any) -> str | None:
    names = [value] if isinstance(value, str) else list(value)
    if names == ["none"]:
        draft.put("track.wandb", "off")
        return None
    if set(names) <= {*TRACKERS, "all"}:
        return None
    return f"allowed: {', '.join(TRACKERS)}"


def _seed_of_rows(draft: Draft, value: Any) -> str | None:
    return None if value == draft.get("seed") else "the order of the rows has the seed of the run"


def _checkpointing(draft: Draft, value: Any) -> str | None:
    # "unsloth" is its own form of the same.
    on = value in (True, "true", "unsloth", "offload")
    draft.put("train.checkpointing", "on" if on else "off")
    return None


def _strategy(path: str) -> Rule:
    def rule(draft: Draft, value: Any) -> str | None:
        if value == "steps":
            return None
        if value == "no":
            draft.put(path, 0)
            return None
        return f"give {path}, a number of steps"

    return rule


def _init(draft: Draft, value: Any) -> str | None:
    if value in (True, "true"):
        return None
    known = {"pissa": "pissa", "olora": "olora", "loftq": "loftq"}
    if value not in known:
        return f"allowed: {', '.join(known)}"
    draft.put("adapter.init", known[value])
    return None


def _quantisation(draft: Draft, value: Any) -> str | None:
    if value not in ("nf4", "fp4"):
        return "allowed: nf4, fp4"
    draft.put("model.precision", value)
    return None


def flag(bits: int) -> Rule:
    """Return the rule of ``load_in_4bit`` and ``load_in_8bit``."""

    def rule(draft: Draft, value: Any) -> str | None:
        if value is True:
            draft.facts["bits"] = bits
        return None

    return rule


LORA: dict[str, Rule] = {
    "r": put("adapter.r"),
    "lora_alpha": put("adapter.alpha"),
    "lora_dropout": put("adapter.dropout"),
    "target_modules": targets,
    "use_rslora": put("adapter.rslora"),
    "use_dora": put("adapter.dora"),
    "init_lora_weights": _init,
    "bias": lacking("biases stay as they are", ("none",)),
    "task_type": implied("only causal language models are trained", ("SEQ_CLS", "SEQ_2_SEQ_LM")),
    "peft_type": lacking("only LoRA is trained", ("LORA",)),
    "inference_mode": implied("an adapter is trained", (True,)),
    "modules_to_save": lacking("only LoRA is trained; new tokens: data.new_tokens", ([],)),
    "loftq_config": lacking("adapter.init: loftq", ({},)),
    "use_gradient_checkpointing": _checkpointing,
    "random_state": put("seed"),
}
QUANTISATION: dict[str, Rule] = {
    "load_in_4bit": flag(4),
    "load_in_8bit": flag(8),
    "bnb_4bit_quant_type": _quantisation,
    "bnb_4bit_use_double_quant": put("model.double_quant"),
    "bnb_4bit_compute_dtype": lambda draft, value: _compute_dtype(draft, value),
    "bnb_4bit_quant_storage": implied("weights are stored as bytes"),
}


def _compute_dtype(draft: Draft, value: Any) -> str | None:
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "half": "fp16", "auto": "auto"}
    name = names.get(str(value).removeprefix("torch."))
    if name is None:
        return f"allowed: {', '.join(names)}"
    draft.put("model.compute_dtype", name)
    return None


TRAINING: dict[str, Rule] = {
    "output_dir": output_dir,
    "run_name": put("name"),
    "overwrite_output_dir": lambda draft, value: (
        draft.put("train.existing", "replace") if value else None
    ),
    "learning_rate": put("train.learning_rate", float),
    "num_train_epochs": put("train.epochs"),
    "max_steps": lambda draft, value: (
        draft.put("train.max_steps", int(value)) if int(value) > 0 else None
    ),
    "per_device_train_batch_size": fact("rows"),
    "gradient_accumulation_steps": fact("accumulation"),
    "per_device_eval_batch_size": implied("scoring passes choose their own size"),
    "eval_accumulation_steps": implied("scoring keeps nothing on the GPU"),
    "optim": optimizer,
    "weight_decay": put("train.weight_decay"),
    "max_grad_norm": put("train.max_grad_norm"),
    "lr_scheduler_type": scheduler,
    "warmup_ratio": put("train.warmup_frac"),
    "warmup_steps": fact("warmup_steps"),
    "neftune_noise_alpha": put("train.neftune_alpha"),
    "gradient_checkpointing": _checkpointing,
    "gradient_checkpointing_kwargs": implied("recomputing is never reentrant"),
    "logging_steps": steps_or_frac("train.log_steps", "Steps between two lines."),
    "logging_strategy": lacking("train.log_steps is a number of steps", ("steps",)),
    "logging_first_step": implied("the first step is always recorded"),
    "eval_steps": steps_or_frac("train.eval_steps", "Steps between two evaluations."),
    "eval_strategy": _strategy("train.eval_steps"),
    "evaluation_strategy": _strategy("train.eval_steps"),
    "do_eval": implied("held-out rows decide that"),
    "do_train": implied("it trains", (False,)),
    "save_steps": steps_or_frac("train.save_steps", "Steps between two checkpoints."),
    "save_strategy": _strategy("train.save_steps"),
    "save_total_limit": put("train.keep_checkpoints"),
    "save_only_model": lacking("a checkpoint has all that a resume needs"),
    "save_safetensors": implied("weights are written as safetensors alone", (False,)),
    "seed": put("seed"),
    "data_seed": _seed_of_rows,
    "bf16": lambda draft, value: dtype(draft, "bf16", value),
    "fp16": lambda draft, value: dtype(draft, "fp16", value),
    "tf32": implied("products in fp32 are exact", (True,)),
    "report_to": _report_to,
    "push_to_hub": lacking(NO_PUSH),
    "hub_model_id": lacking(NO_PUSH),
    "deepspeed": lacking(NO_SPLIT),
    "fsdp": lacking(NO_SPLIT, ("",)),
    "fsdp_config": lacking(NO_SPLIT),
    "ddp_timeout": lacking("PyTorch's own is used", (1800,)),
    "ddp_find_unused_parameters": implied("every adapter gets a gradient", (True,)),
    "local_rank": implied("the launcher decides it"),
    "dataloader_num_workers": implied(NO_WORKERS),
    "dataloader_pin_memory": implied(NO_WORKERS),
    "remove_unused_columns": implied("each column is used, refused or counted"),
    "group_by_length": lacking("rows of a pass are laid end to end, so none is padded"),
    "length_column_name": lacking("rows of a pass are laid end to end, so none is padded"),
    "resume_from_checkpoint": lacking(
        "a run goes on by itself; from a certain step: train.resume_from", (False, True)
    ),
    "load_best_model_at_end": lacking("the last step is kept; checkpoints are in the run folder"),
    "metric_for_best_model": lacking("the last step is kept"),
    "greater_is_better": lacking("the last step is kept", (False, True)),
    "torch_compile": lacking("has no twin"),
    "disable_tqdm": implied("a bar is shown in a terminal alone"),
    "average_tokens_across_devices": implied("the divisor is that of all processes", (False,)),
    "adam_beta1": lacking("0.9 is used", (0.9,)),
    "adam_beta2": lacking("0.999 is used", (0.999,)),
    "adam_epsilon": lacking("1e-8 is used", (1e-8,)),
    "include_num_input_tokens_seen": implied("metrics.jsonl counts tokens"),
}
