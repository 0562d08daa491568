"""Owns the arguments of scripts for TRL and Unsloth: SFTConfig, LoraConfig, BitsAndBytesConfig, from_pretrained."""

from __future__ import annotations

from typing import Any

from halfbyte.importing.draft import Draft, Rule, fact, implied, lacking, put, targets
from halfbyte.importing.hf_arguments import LORA, NO_WORKERS, QUANTISATION, TRAINING

SECTIONS = {  # names that such files give to their parts
    "sftconfig",
    "sft_config",
    "trainingarguments",
    "training_arguments",
    "training_args",
    "args",
    "loraconfig",
    "lora_config",
    "peft_config",
    "get_peft_model",
    "bitsandbytesconfig",
    "bnb_config",
    "quantization_config",
    "fastlanguagemodel",
    "from_pretrained",
    "model",
    "sfttrainer",
    "trainer",
    "dataset",
}


def _loss_on(draft: Draft, value: Any) -> str | None:
    if value is False:
        draft.put("data.loss_on", "all")
    elif value is True:
        draft.put("data.loss_on", "completion")
    return None


def _text_column(draft: Draft, value: Any) -> str | None:
    if value != "text":
        draft.put("data.columns", {"text": value})
    return None


def _dataset(draft: Draft, value: Any) -> str | None:
    draft.put("data.train", value)
    return None


LENGTH = put("data.max_length")
RULES: dict[str, Rule] = {
    **TRAINING,
    **LORA,
    **QUANTISATION,
    "lora_r": put("adapter.r"),
    "lora_target_modules": targets,
    "lora_task_type": LORA["task_type"],
    "lora_modules_to_save": LORA["modules_to_save"],
    "use_peft": implied("LoRA is trained", (False,)),
    "model_name": put("model.name"),
    "model_name_or_path": put("model.name"),
    "model_revision": put("model.revision"),
    "revision": put("model.revision"),
    "dtype": QUANTISATION["bnb_4bit_compute_dtype"],
    "torch_dtype": QUANTISATION["bnb_4bit_compute_dtype"],
    "attn_implementation": implied("data.max_length and the card decide how attention is computed"),
    "trust_remote_code": lacking("code from a model's repository is never run"),
    "device_map": implied("the model is loaded where it is trained"),
    "token": lacking("a secret is never read from a file: hf auth login"),
    "full_finetuning": lacking("only LoRA is trained"),
    "fast_inference": lacking("halfbyte serve answers"),
    "dataset_name": _dataset,
    "dataset_config": put("data.subset"),
    "dataset_train_split": put("data.train_split"),
    "dataset_test_split": put("data.test_split"),
    "dataset_text_field": _text_column,
    "dataset_num_proc": implied(NO_WORKERS),
    "dataset_kwargs": lacking("has no twin", ({},)),
    "max_length": LENGTH,
    "max_seq_length": LENGTH,
    "packing": implied("rows of a pass are laid end to end, without attention between them"),
    "packing_strategy": implied("no row is cut to fill a pass"),
    "eval_packing": implied("rows of a pass are laid end to end"),
    "padding_free": implied("nothing is padded"),
    "pad_to_multiple_of": implied("nothing is padded"),
    "assistant_only_loss": _loss_on,
    "completion_only_loss": _loss_on,
    "eos_token": lacking("what ends an answer: data.stop"),
    "pad_token": implied("nothing is padded"),
    "chat_template_path": put("data.chat_template"),
    "use_liger_kernel": implied("speed.kernels"),
    "activation_offloading": lacking("has no twin"),
    "seed_of_model": fact("seed"),
    "lora_dropout": put("adapter.dropout"),
}


def is_trl(values: dict[str, Any]) -> bool:
    """Return whether a mapping has arguments of TRL's or Unsloth's scripts."""
    flat = flattened(values)
    return sum(key in RULES for key in flat) >= max(1, len(flat) // 2)


def flattened(values: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of all parts; those of a part that has no known name stay a mapping."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key.lower() in SECTIONS:
            flat |= flattened(value)
        else:
            flat[key] = value
    return flat


def read(values: dict[str, Any]) -> Draft:
    """Return the draft of the arguments of a script for TRL or Unsloth."""
    draft = Draft(facts={"default_rows": 8, "default_rate": 2e-5})
    flat = flattened(values)
    first = {key: flat[key] for key in ("seed",) if key in flat}
    draft.apply(first | flat, RULES)
    draft.put("adapter.r", draft.get("adapter.r") or 8)  # PEFT's defaults
    draft.put("adapter.alpha", draft.get("adapter.alpha") or 8)
    if draft.get("data.on_overlength") is None:
        draft.put("data.on_overlength", "truncate")  # what TRL does with a longer row
    draft.facts.setdefault("bits", 16)
    return draft
