"""Owns the keys of Axolotl's YAML."""

from __future__ import annotations

from typing import Any

from halfbyte.importing.draft import Draft, Rule, fact, implied, lacking, put, targets
from halfbyte.importing.hf_arguments import NO_PUSH, NO_SPLIT, QUANTISATION, TRAINING, flag

OVERLENGTH = {"drop": "drop", "truncate": "truncate", "raise": "error"}
FORMATS = {
    "alpaca": "alpaca",
    "chat_template": "messages",
    "sharegpt": "sharegpt",
    "completion": "text",
    "pretrain": "text",
    "input_output": None,
}
FIELDS = {"field_instruction": "instruction", "field_input": "input", "field_output": "output"}
TEMPLATES = {"chatml": "chatml", "gemma": "gemma", "gemma3": "gemma"}


def _datasets(path: str) -> Rule:
    def rule(draft: Draft, value: Any) -> str | None:
        entries = [value] if isinstance(value, dict) else list(value)
        taken = [_dataset(draft, entry, f"{path}[{n}]") for n, entry in enumerate(entries)]
        if path == "test_datasets":
            draft.put("data.test", taken if len(taken) > 1 or len(taken[0]) > 1 else taken[0]["path"])
        elif len(taken) == 1:
            only = dict(taken[0])
            draft.put("data.train", only.pop("path"))
            split = only.pop("split", None)
            if split:
                draft.put("data.train_split", split)
            for key, setting in only.items():
                if key == "rows":
                    draft.put("data.train", [{"path": taken[0]["path"], "rows": setting}])
                else:
                    draft.put(f"data.{key}", setting)
        else:
            draft.put("data.train", taken)
        return None

    return rule


def _dataset(draft: Draft, entry: dict[str, Any], name: str) -> dict[str, Any]:
    """Return our source of an entry of ``datasets``."""
    source: dict[str, Any] = {}
    columns: dict[str, str] = {}
    for key, value in entry.items():
        if value is None:
            continue
        if key in ("path", "split", "revision"):
            source[key] = value
        elif key == "name":
            source["subset"] = value
        elif key == "data_files":
            source["path"] = value if isinstance(value, str) else value[0]
            if not isinstance(value, str) and len(value) > 1:
                draft.left[f"{name}.data_files"] = (value, "name each file as an entry of data.train")
        elif key == "type":
            _format(draft, value, source, columns, f"{name}.type")
        elif key == "field":
            columns["text"] = value
        elif key in ("field_messages", "conversation_field"):
            columns["messages"] = value
        elif key in ("field_tools", "field_system"):
            columns[key.removeprefix("field_")] = value
        elif key in ("ds_type", "roles_to_train", "message_property_mappings", "chat_template"):
            _told_by_rows(draft, key, value, f"{name}.{key}")
        else:
            draft.left[f"{name}.{key}"] = (value, "has no twin")
    if columns.get("messages") == "conversations":
        source["format"] = "sharegpt"
        del columns["messages"]
    if columns:
        source["columns"] = columns
    return source


def _format(
    draft: Draft, value: Any, source: dict[str, Any], columns: dict[str, str], name: str
) -> None:
    if isinstance(value, dict):
        source["format"] = "alpaca"
        for key, setting in value.items():
            if key in FIELDS:
                columns[FIELDS[key]] = setting
            elif key == "system_prompt":
                source["system"] = setting
            else:
                draft.left[f"{name}.{key}"] = (setting, "rows are rendered by the chat template")
        return
    kind = str(value).partition(".")[0].partition(":")[0]
    ours = FORMATS.get(kind)
    if ours is None or (kind == "alpaca" and value != "alpaca"):
        draft.left[name] = (value, f"formats: {', '.join(filter(None, FORMATS.values()))}, or data.columns")
    else:
        source["format"] = ours


def _told_by_rows(draft: Draft, key: str, value: Any, name: str) -> None:
    standard = {
        "ds_type": True,
        "roles_to_train": value in (["assistant"], ["gpt"], ["assistant", "gpt"]),
        "message_property_mappings": value
        in ({"role": "role", "content": "content"}, {"role": "from", "content": "value"}),
        "chat_template": value in ("tokenizer_default", *TEMPLATES),
    }[key]
    if standard:
        draft.taken[name] = "is read off the rows"
    else:
        draft.left[name] = (value, "roles and keys of turns are read by their usual names")


def _template(draft: Draft, value: Any) -> str | None:
    if value == "tokenizer_default":
        return None
    if value not in TEMPLATES:
        return "the model's own is used; for a base model: data.chat_template"
    draft.put("data.chat_template", TEMPLATES[value])
    return None


def _adapter(draft: Draft, value: Any) -> str | None:
    if value not in ("lora", "qlora"):
        return "only LoRA is trained"
    draft.facts.setdefault("bits", 4 if value == "qlora" else 16)
    return None


def _linear(draft: Draft, value: Any) -> str | None:
    if value:
        draft.put("adapter.targets", "all-linear")
    return None


def _validation(draft: Draft, value: Any) -> str | None:
    if not 0 <= value < 1:
        return "give data.validation_frac, a share of the prompts"
    draft.put("data.validation_frac", value)
    return None


def _overlength(draft: Draft, value: Any) -> str | None:
    if value not in OVERLENGTH:
        return f"allowed: {', '.join(OVERLENGTH)}"
    draft.put("data.on_overlength", OVERLENGTH[value])
    return None


def _loss_on(draft: Draft, value: Any) -> str | None:
    draft.put("data.loss_on", "all" if value else "completion")
    return None


def _checkpointing(draft: Draft, value: Any) -> str | None:
    draft.put("train.checkpointing", "on" if value else "off")
    return None


def _special(draft: Draft, value: Any) -> str | None:
    return "the tokenizer's own are used; what ends an answer: data.stop"


def _kwargs(draft: Draft, value: Any) -> str | None:
    draft.apply(value, QUANTISATION, "bnb_config_kwargs.")
    return None


ATTENTION = implied("data.max_length and the card decide how attention is computed")
RULES: dict[str, Rule] = {
    **TRAINING,
    "base_model": put("model.name"),
    "revision_of_model": put("model.revision"),
    "base_model_config": lambda draft, value: _same_as_model(draft, value),
    "tokenizer_config": lambda draft, value: _same_as_model(draft, value),
    "model_type": implied("it is read from the model's config"),
    "tokenizer_type": implied("it is read from the model's files"),
    "trust_remote_code": lacking("code from a model's repository is never run"),
    "adapter": _adapter,
    "load_in_4bit": flag(4),
    "load_in_8bit": flag(8),
    "bnb_config_kwargs": _kwargs,
    "lora_r": put("adapter.r"),
    "lora_alpha": put("adapter.alpha"),
    "lora_dropout": put("adapter.dropout"),
    "lora_target_modules": targets,
    "lora_target_linear": _linear,
    "lora_fan_in_fan_out": lacking("it is read from the layers"),
    "lora_modules_to_save": lacking("only LoRA is trained; new tokens: data.new_tokens"),
    "lora_mlp_kernel": implied("speed.kernels"),
    "lora_qkv_kernel": implied("speed.kernels"),
    "lora_o_kernel": implied("speed.kernels"),
    "peft_use_dora": put("adapter.dora"),
    "peft_use_rslora": put("adapter.rslora"),
    "datasets": _datasets("datasets"),
    "test_datasets": _datasets("test_datasets"),
    "dataset_prepared_path": implied("prepared rows are kept in the cache"),
    "val_set_size": _validation,
    "sequence_len": put("data.max_length"),
    "excess_length_strategy": _overlength,
    "sample_packing": implied("rows of a pass are laid end to end, without attention between them"),
    "eval_sample_packing": implied("rows of a pass are laid end to end"),
    "pad_to_sequence_len": implied("nothing is padded"),
    "sample_packing_eff_est": implied("nothing is padded"),
    "train_on_inputs": _loss_on,
    "chat_template": _template,
    "default_system_message": put("data.system"),
    "special_tokens": _special,
    "tokens": put("data.new_tokens"),
    "micro_batch_size": fact("rows"),
    "eval_batch_size": implied("scoring passes choose their own size"),
    "num_epochs": put("train.epochs"),
    "optimizer": TRAINING["optim"],
    "lr_scheduler": TRAINING["lr_scheduler_type"],
    "gradient_checkpointing": _checkpointing,
    "saves_per_epoch": lacking("give train.save_steps, a number of steps"),
    "evals_per_epoch": lacking("give train.eval_steps, a number of steps"),
    "eval_table_size": implied("train.num_samples answers are shown"),
    "eval_max_new_tokens": put("train.sample_tokens"),
    "wandb_project": put("track.project"),
    "wandb_entity": put("track.entity"),
    "wandb_name": put("name"),
    "wandb_run_id": lacking("each run folder has its own"),
    "wandb_watch": lacking("gradient norms are recorded"),
    "wandb_log_model": lacking(NO_PUSH, (False, "false")),
    "flash_attention": ATTENTION,
    "sdp_attention": ATTENTION,
    "xformers_attention": ATTENTION,
    "eager_attention": ATTENTION,
    "attn_implementation": ATTENTION,
    "s2_attention": lacking("has no twin"),
    "strict": lacking("all keys are checked", (False, True)),
    "auto_resume_from_checkpoints": implied("a run goes on by itself", (False,)),
    "early_stopping_patience": lacking("the last step is kept"),
    "local_rank": implied("the launcher decides it"),
    "fsdp_version": lacking(NO_SPLIT),
    "rl": lacking("preferences are not trained on"),
    "plugins": lacking("has no twin"),
    "float16": TRAINING["fp16"],
    "bfloat16": TRAINING["bf16"],
}


def _same_as_model(draft: Draft, value: Any) -> str | None:
    same = value == draft.get("model.name")
    return None if same else "tokenizer and config are the model's own"


def is_axolotl(values: dict[str, Any]) -> bool:
    """Return whether a mapping is a config of Axolotl."""
    return "base_model" in values


def read(values: dict[str, Any]) -> Draft:
    """Return the draft of a config of Axolotl."""
    draft = Draft(facts={"default_rows": 1, "bits": None})
    draft.facts.pop("bits")
    first = {key: values[key] for key in ("base_model", "seed") if key in values}
    draft.apply(first | values, RULES)
    if draft.get("data.on_overlength") is None:
        draft.put("data.on_overlength", "drop")  # what Axolotl does with a longer row
    return draft
