"""Owns the arguments of scripts for TRL and Unsloth: SFTConfig, LoraConfig, BitsAndBytesConfig, from_pretrained."""

from __future__ import annotations

from typing import Any

from halfbyte.importing.draft import (
    BadValueError,
    Covered,
    Draft,
    Rule,
    fact,
    implied,
    lacking,
    mapping,
    put,
    refused,
    switch,
    text,
    whole,
)
from halfbyte.importing.hf_arguments import (
    ATTENTION,
    LORA,
    NO_SECRET,
    NO_SPLIT,
    NO_WORKERS,
    ONLY_LORA,
    ONLY_SFT,
    QUANTISATION,
    TRAINING,
    dtype,
    packing,
    targets,
)

SECTIONS = {  # names that such files give to their parts
    "sftconfig",
    "sft_config",
    "sft",
    "trainingarguments",
    "training_arguments",
    "training_args",
    "training",
    "args",
    "loraconfig",
    "lora_config",
    "lora",
    "peft_config",
    "peft",
    "get_peft_model",
    "bitsandbytesconfig",
    "bnb_config",
    "quantization_config",
    "quantization",
    "fastlanguagemodel",
    "from_pretrained",
    "model",
    "sfttrainer",
    "trainer",
    "dataset",
    "data",
}
DEFAULTS = {
    "seed": 42,
    "data.max_length": 1024,
    "data.on_overlength": "truncate",
    "train.learning_rate": 2e-5,
    "train.epochs": 3.0,
    "train.scheduler": "linear",
    "train.warmup_frac": 0.0,
    "train.optimizer": "adamw_torch_fused",
    "train.weight_decay": 0.0,
    "train.max_grad_norm": 1.0,
    "train.save_steps": 500,
    "track.wandb": "off",
}
# Defaults of the adapter: of `trl sft`, of Unsloth's get_peft_model, and of PEFT's LoraConfig.
CLI_KEYS = {"use_peft", "lora_r", "lora_target_modules", "lora_task_type", "use_bnb_nested_quant"}
UNSLOTH_KEYS = {
    "use_gradient_checkpointing",
    "random_state",
    "full_finetuning",
    "fast_inference",
    "max_lora_rank",
}
ADAPTERS = {"cli": (16, 32, 0.05), "unsloth": (16, 16, 0.0), "peft": (8, 8, 0.0)}
OTHER_TRAINERS = ("dpo", "kto", "orpo", "cpo", "grpo", "rloo", "ppo", "reward", "gkd", "bco")


def _text_column(draft: Draft, value: Any) -> str | None:
    if text(value) in ("text", "messages"):
        return Covered("is told by the rows")
    draft.put("data.format", "text")
    draft.put("data.columns", {"text": value})
    return None


def _template(draft: Draft, value: Any) -> str | None:
    if not text(value).endswith((".jinja", ".j2")):
        return "data.chat_template takes a .jinja file"
    draft.put("data.chat_template", value)
    return None


def _loss_type(draft: Draft, value: Any) -> str | None:
    if value in ("nll", "chunked_nll"):
        return Covered("is the loss here too")
    if value == "dft":
        return "the loss is the plain cross-entropy"
    raise BadValueError(ONLY_SFT)


def _mixture(draft: Draft, value: Any) -> str | None:
    """Take ``datasets``, a list of entries with path, name and split."""
    entries = value if isinstance(value, list) else [value]
    ours = {"path": "path", "name": "subset", "split": "split"}
    sources = []
    for index, entry in enumerate(entries):
        source = {}
        for key, setting in mapping(entry).items():
            name = f"datasets[{index}].{key}"
            if key in ours and setting is not None:
                source[ours[key]] = text(setting)
                draft.taken[name] = "taken"
            elif setting is not None:
                draft.leave(
                    name, setting, "weight, rows and columns are keys of an entry of data.train"
                )
            else:
                draft.taken[name] = "says nothing"
        sources.append(source)
    draft.put("data.train", sources)
    return None


def _use_peft(draft: Draft, value: Any) -> str | None:
    if not switch(value):
        raise BadValueError(f"all weights would be trained; {ONLY_LORA}")
    return Covered("LoRA is trained")


LENGTH = put("data.max_length", whole)
PREFERENCES = refused(ONLY_SFT)
DEFAULT_VALUES: dict[str, Any] = {  # of keys without a twin, which a dump of all arguments has
    "log_level": "passive",
    "log_level_replica": "warning",
    "log_on_each_node": True,
    "logging_nan_inf_filter": True,
    "eval_delay": 0,
    "eval_on_start": False,
    "eval_do_concat_batches": True,
    "eval_use_gather_object": False,
    "batch_eval_metrics": False,
    "prediction_loss_only": False,
    "bf16_full_eval": False,
    "fp16_full_eval": False,
    "auto_find_batch_size": False,
    "full_determinism": False,
    "ignore_data_skip": False,
    "restore_callback_states_from_checkpoint": False,
    "save_on_each_node": False,
    "hub_always_push": False,
    "skip_memory_metrics": True,
    "use_cpu": False,
    "use_cache": False,
    "do_predict": False,
    "dataloader_persistent_workers": False,
    "dataloader_in_order": True,
    "train_sampling_strategy": "random",
    "enable_jit_checkpoint": False,
    "project": "huggingface",
    "truncation_mode": "keep_start",
    "shuffle_dataset": False,
    "activation_offloading": False,
    "ignore_bias_buffers": False,
    "dataset_streaming": False,
    "megatron_core": "megatron.core",
    "use_qalora": False,
    "qalora_group_size": 16,
    "ensure_weight_tying": False,
}
RULES: dict[str, Rule] = {
    **{key: lacking("has no twin", (value,)) for key, value in DEFAULT_VALUES.items()},
    **TRAINING,
    **LORA,
    **QUANTISATION,
    "lora_r": put("adapter.r", whole),
    "lora_target_modules": targets,
    "lora_task_type": LORA["task_type"],
    "lora_modules_to_save": LORA["modules_to_save"],
    "use_peft": _use_peft,
    "use_bnb_nested_quant": put("model.double_quant", switch),
    "peft_version": implied("PEFT is ours"),
    "model_name": put("model.name", text),
    "model_name_or_path": put("model.name", text),
    "model_revision": put("model.revision", text),
    "revision": put("model.revision", text),
    "dtype": dtype("dtype"),
    "torch_dtype": dtype("dtype"),
    "attn_implementation": implied(ATTENTION),
    "trust_remote_code": lacking("code from a model's repository is never run"),
    "device_map": implied("the model is loaded where it is trained"),
    "token": lacking(NO_SECRET),
    "full_finetuning": refused(ONLY_LORA),
    "fast_inference": lacking("halfbyte serve answers"),
    "load_in_16bit": implied("is what no quantisation means"),
    "dataset_name": put("data.train", text),
    "dataset_config": put("data.subset", text),
    "dataset_train_split": put("data.train_split", text),
    "dataset_test_split": put("data.test_split", text),
    "datasets": _mixture,
    "dataset_text_field": _text_column,
    "dataset_num_proc": implied(NO_WORKERS),
    "dataset_kwargs": lacking("has no twin"),
    "max_length": LENGTH,
    "max_seq_length": LENGTH,
    "packing": packing(),
    "packing_strategy": lacking("rows are never cut to fill a pass", ("bfd", "ffd")),
    "eval_packing": implied("rows of a pass are laid end to end"),
    "padding_free": implied("nothing is padded"),
    "pad_to_multiple_of": implied("nothing is padded"),
    "assistant_only_loss": fact("assistant", switch),
    "completion_only_loss": fact("completion", switch),
    "loss_type": _loss_type,
    "eos_token": lacking("what ends an answer: data.stop"),
    "pad_token": implied("nothing is padded"),
    "chat_template_path": _template,
    "use_liger": implied("speed.kernels"),
    "num_processes": lacking(NO_SPLIT, (1,)),
    **dict.fromkeys(
        (
            "beta",
            "max_prompt_length",
            "max_completion_length",
            "precompute_ref_log_probs",
            "ref_model_init_kwargs",
            "num_generations",
            "reward_funcs",
            "reward_model_path",
            "rpo_alpha",
            "desirable_weight",
        ),
        PREFERENCES,
    ),
}


def is_trl(values: dict[str, Any]) -> bool:
    """Return whether a mapping has arguments of TRL's or Unsloth's scripts."""
    flat = [key for _, key, _ in flattened(values)]
    return 2 * sum(key in RULES for key in flat) >= max(1, len(flat))


def flattened(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str, Any]]:
    """Return dotted name, key and value of all parts; a part without a known name stays a mapping."""
    flat: list[tuple[str, str, Any]] = []
    for key, value in values.items():
        if isinstance(value, dict) and value and key.lower() in SECTIONS:
            flat += flattened(value, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", key, value))
    return flat


def read(values: dict[str, Any]) -> tuple[Draft, dict[str, Any]]:
    """Return the draft of the arguments of a script for TRL or Unsloth, and TRL's defaults."""
    draft = Draft(
        facts={
            "default_rows": 8,
            "default_mixed": "bf16",
            "eval_default": "no",
            "log_steps": 10,
            "rows_decide_loss": True,
        }
    )
    _other_trainers(draft, values)
    flat = sorted(flattened(values), key=lambda item: item[1] != "seed")
    seen: dict[str, Any] = {}
    for name, key, value in flat:
        if value is not None and seen.get(key, value) != value:
            draft.leave(name, value, f"{key} is {seen[key]!r} in another part, which holds")
            continue
        if value is not None:
            seen[key] = value
        draft.take(name, value, RULES.get(key))
    _fill_in(draft, seen, {part.lower() for part in values})
    return draft, DEFAULTS


def _other_trainers(draft: Draft, values: dict[str, Any]) -> None:
    for key, value in values.items():
        kind = key.lower().replace("_", "").removesuffix("config")
        if isinstance(value, dict) and kind in OTHER_TRAINERS:
            draft.refuse(key, "a part for another trainer", ONLY_SFT)


def _fill_in(draft: Draft, seen: dict[str, Any], parts: set[str]) -> None:
    """Set the defaults that depend on whose arguments these are."""
    style = "cli" if seen.keys() & CLI_KEYS else "peft"
    if seen.keys() & UNSLOTH_KEYS or parts & {"fastlanguagemodel", "get_peft_model"}:
        style = "unsloth"
    if style == "unsloth" and not seen.keys() & {"load_in_4bit", "load_in_8bit", "load_in_16bit"}:
        draft.facts["bits"] = 4  # as FastLanguageModel loads where nothing is said
    adapted = seen.keys() & {*LORA, *CLI_KEYS} - {"lora_dropout"}
    if "model_name_or_path" in seen and not adapted and not draft.facts.get("bits"):
        draft.refuse(
            "model_name_or_path",
            seen["model_name_or_path"],
            f"use_peft: true is missing, so all weights would be trained; {ONLY_LORA}",
        )
    if style == "cli" and "use_peft" not in seen:
        draft.note("use_peft", "is not set, so that trl sft would need --use_peft; LoRA is trained")
    elif not adapted:
        draft.note("adapter", "no argument of LoRA is there; PEFT's defaults are written")
    rank, alpha, dropout = ADAPTERS[style]
    for path, value in (("r", rank), ("alpha", alpha), ("dropout", dropout)):
        draft.default(f"adapter.{path}", value)
    if draft.get("adapter.targets") is None:
        draft.put("adapter.targets", "all-linear")
        if style != "unsloth":
            why = "PEFT chooses them by architecture; here: all linear layers"
            draft.note("adapter.targets", why)
    # BitsAndBytesConfig begins with fp4 and no double quantisation, Unsloth's loader with neither.
    plain = style == "peft" and any(key.startswith("bnb_4bit") for key in seen)
    draft.facts["quant_type"] = "fp4" if plain else "nf4"
    draft.facts["double_quant"] = style == "unsloth" or (style == "peft" and not plain)
    name = draft.get("data.train")
    evaluates = draft.facts.get("eval_strategy", "no") != "no"
    if evaluates and isinstance(name, str) and draft.get("data.test_split"):
        draft.put("data.test", name)
