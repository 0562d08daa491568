"""Owns the keys of Axolotl's YAML."""

from __future__ import annotations

from typing import Any

from halfbyte.importing.axolotl_rows import read_datasets
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
from halfbyte.importing.hf_arguments import (
    ATTENTION,
    NO_PATTERN,
    NO_PUSH,
    NO_SECRET,
    NO_SPLIT,
    NO_WORKERS,
    ONLY_LORA,
    ONLY_SFT,
    QUANTISATION,
    TRAINING,
    flag,
    is_pattern,
    packing,
    start_weights,
)

DEFAULTS = {
    "seed": 42,
    "data.max_length": 512,
    "data.on_overlength": "drop",
    "data.loss_on": "completion",
    "train.epochs": 1.0,
    "train.scheduler": "cosine",
    "train.warmup_frac": 0.03,
    "train.optimizer": "adamw_torch_fused",
    "train.weight_decay": 0.0,
    "adapter.dropout": 0.0,
    "track.wandb": "off",
}


def _template(draft: Draft, value: Any) -> str | None:
    ours = {"chatml": "chatml", "gemma": "gemma", "gemma3": "gemma"}.get(text(value))
    if value == "tokenizer_default":
        return Covered("is the default")
    if ours is None:
        return "the model's own is used; for a base model without one: data.chat_template"
    draft.put("data.chat_template", ours)
    return None


def _adapter(draft: Draft, value: Any) -> str | None:
    if value not in ("lora", "qlora"):
        raise BadValueError(ONLY_LORA)
    if value == "qlora":
        draft.facts.setdefault("bits", 4)
    draft.facts["adapter"] = value
    return None


def _peft(draft: Draft, value: Any) -> str | None:
    if value != {"loftq_config": {"loftq_bits": 4}}:
        return "of peft only loftq_config with loftq_bits 4 is taken"
    draft.put("adapter.init", "loftq")
    draft.taken["peft.loftq_config.loftq_bits"] = "taken"
    return None


def _names(draft: Draft, value: Any) -> str | None:
    names = texts(value)
    if is_pattern(value):
        return NO_PATTERN
    draft.facts["targets"] = names
    return None


def _validation(draft: Draft, value: Any) -> str | None:
    if not 0 <= number(value) < 1:
        return "a number of rows; data.validation_frac is a share of the prompts"
    draft.put("data.validation_frac", number(value))
    return None


def _wandb_mode(draft: Draft, value: Any) -> str | None:
    modes = {"offline": "offline", "online": "online", "disabled": "off"}
    if text(value) not in modes:
        return f"allowed: {', '.join(modes)}"
    draft.facts["wandb"] = modes[value]
    return None


def _loss_on(draft: Draft, value: Any) -> str | None:
    draft.put("data.loss_on", "all" if switch(value) else "completion")
    return None


def _bnb(draft: Draft, value: Any) -> str | None:
    if not isinstance(value, dict):
        raise BadValueError("a mapping is expected")
    draft.apply(value, QUANTISATION, "bnb_config_kwargs.")
    return None


def _same_as_model(draft: Draft, value: Any) -> str | None:
    same = value == draft.get("model.name")
    return Covered("is the model's own") if same else "tokenizer and config are the model's own"


BY_CARD = implied(ATTENTION)
KERNELS = implied("speed.kernels")
NO_LISTENER = lacking("the only tracker is Weights & Biases")
PREFERENCES = refused(ONLY_SFT)
RULES: dict[str, Rule] = {
    **TRAINING,
    "base_model": put("model.name", text),
    "revision_of_model": put("model.revision", text),
    "model_revision": put("model.revision", text),
    "base_model_config": _same_as_model,
    "tokenizer_config": _same_as_model,
    "model_type": implied("it is read from the model's config"),
    "type_of_model": implied("it is read from the model's config"),
    "tokenizer_type": implied("it is read from the model's files"),
    "tokenizer_use_fast": implied("the fast tokenizer is used", (False,)),
    "is_llama_derived_model": implied("it is read from the model's config"),
    "is_mistral_derived_model": implied("it is read from the model's config"),
    "is_falcon_derived_model": implied("it is read from the model's config"),
    "trust_remote_code": lacking("code from a model's repository is never run"),
    "adapter": _adapter,
    "lora_model_dir": lacking("an adapter of a run is continued by train.resume_from"),
    "load_in_4bit": flag(4),
    "load_in_8bit": flag(8),
    "bnb_config_kwargs": _bnb,
    "gptq": lacking("the base is quantised while it is loaded"),
    "lora_r": put("adapter.r", whole),
    "lora_alpha": put("adapter.alpha", number),
    "lora_dropout": put("adapter.dropout", number),
    "lora_target_modules": _names,
    "lora_target_linear": fact("linear", switch),
    "lora_fan_in_fan_out": implied("it is read from the layers"),
    "lora_modules_to_save": lacking("only LoRA is trained; new tokens: data.new_tokens"),
    "lora_mlp_kernel": KERNELS,
    "lora_qkv_kernel": KERNELS,
    "lora_o_kernel": KERNELS,
    "peft": _peft,
    "peft_use_dora": put("adapter.dora", switch),
    "peft_use_rslora": put("adapter.rslora", switch),
    "peft_init_lora_weights": start_weights,
    "datasets": read_datasets("datasets"),
    "test_datasets": read_datasets("test_datasets"),
    "pretraining_dataset": read_datasets("pretraining_dataset", pretrains=True),
    "dataset_prepared_path": implied("prepared rows are kept in the cache"),
    "dataset_processes": implied(NO_WORKERS),
    "dataset_num_proc": implied(NO_WORKERS),
    "dataset_keep_in_memory": implied(NO_WORKERS),
    "shuffle_merged_datasets": implied("rows of all sources are mixed", (False,)),
    "val_set_size": _validation,
    "sequence_len": put("data.max_length", whole),
    "excess_length_strategy": one_of(
        "data.on_overlength", {"drop": "drop", "truncate": "truncate", "raise": "error"}
    ),
    "sample_packing": packing(),
    "eval_sample_packing": implied("rows of a pass are laid end to end"),
    "multipack_real_batches": implied("rows of a pass are laid end to end"),
    "batch_flattening": implied("rows of a pass are laid end to end"),
    "pad_to_sequence_len": implied("nothing is padded"),
    "sample_packing_eff_est": implied("nothing is padded"),
    "train_on_inputs": _loss_on,
    "chat_template": _template,
    "default_system_message": put("data.system", text),
    "special_tokens": lacking("the tokenizer's own are used; what ends an answer: data.stop"),
    "tokens": put("data.new_tokens", texts),
    "micro_batch_size": fact("rows", count),
    "batch_size": fact("total_rows", count),
    "eval_batch_size": implied("scoring passes choose their own size"),
    "num_epochs": put("train.epochs", number),
    "optimizer": TRAINING["optim"],
    "lr_scheduler": TRAINING["lr_scheduler_type"],
    "noisy_embedding_alpha": TRAINING["neftune_noise_alpha"],
    "activation_offloading": lacking("activations stay on the device; train.checkpointing"),
    "unsloth_cross_entropy_loss": KERNELS,
    "liger_rope": KERNELS,
    "liger_rms_norm": KERNELS,
    "liger_glu_activation": KERNELS,
    "liger_layer_norm": KERNELS,
    "liger_fused_linear_cross_entropy": KERNELS,
    "cut_cross_entropy": KERNELS,
    "plugins": lacking("code of plugins is never run; their kernels: speed.kernels"),
    "processor_type": lacking("only text is trained on"),
    "eot_tokens": lacking("what ends an answer: data.stop"),
    "saves_per_epoch": lacking("give train.save_steps, a number of steps"),
    "evals_per_epoch": lacking("give train.eval_steps, a number of steps"),
    "eval_table_size": implied("train.num_samples answers are shown"),
    "eval_max_new_tokens": put("train.sample_tokens", whole),
    "wandb_project": put("track.project", text),
    "wandb_entity": put("track.entity", text),
    "wandb_name": fact("name", text),
    "wandb_mode": _wandb_mode,
    "wandb_run_id": lacking("each run folder has its own"),
    "wandb_watch": lacking("gradient norms are recorded", (False, "false")),
    "wandb_log_model": lacking(NO_PUSH, (False, "false")),
    "use_wandb": implied("wandb_project decides it"),
    "use_tensorboard": NO_LISTENER,
    "use_mlflow": NO_LISTENER,
    "hf_use_auth_token": lacking(NO_SECRET),
    "flash_attention": BY_CARD,
    "sdp_attention": BY_CARD,
    "xformers_attention": BY_CARD,
    "eager_attention": BY_CARD,
    "flex_attention": BY_CARD,
    "attn_implementation": BY_CARD,
    "strict": lacking("all keys are checked", (False, True)),
    "debug": lacking("has no twin"),
    "auto_resume_from_checkpoints": implied("a run goes on by itself", (False,)),
    "early_stopping_patience": lacking("the last step is kept"),
    "device_map": implied("the model is loaded where it is trained"),
    "fsdp_version": lacking(NO_SPLIT),
    "ddp": lacking(NO_SPLIT),
    "rl": PREFERENCES,
    "reward_model": PREFERENCES,
    "process_reward_model": PREFERENCES,
    "relora": refused(ONLY_LORA),
    "relora_steps": refused(ONLY_LORA, (0,)),
    "unfrozen_parameters": refused(ONLY_LORA),
    "float16": TRAINING["fp16"],
    "bfloat16": TRAINING["bf16"],
}


def is_axolotl(values: dict[str, Any]) -> bool:
    """Return whether a mapping is a config of Axolotl."""
    return "base_model" in values


def read(values: dict[str, Any]) -> tuple[Draft, dict[str, Any]]:
    """Return the draft of a config of Axolotl, and Axolotl's defaults."""
    draft = Draft(facts={"default_rows": 1, "eval_default": "steps", "log_steps": 500})
    first = {key: values[key] for key in ("base_model", "seed") if key in values}
    draft.apply(first | values, RULES)
    if not values.get("adapter"):
        draft.refuse("adapter", values.get("adapter"), f"all weights would be trained; {ONLY_LORA}")
    _targets(draft)
    for key in ("adapter.r", "adapter.alpha"):
        if draft.get(key) is None:
            draft.note(key, "has no value in the source: PEFT's 8 is written")
            draft.put(key, 8)
    if draft.get("track.project"):
        draft.default("track.wandb", draft.facts.get("wandb", "auto"))
    if not values.get("learning_rate"):
        draft.refuse("learning_rate", None, "Axolotl has no default for it")
    return draft, DEFAULTS


def _targets(draft: Draft) -> None:
    """Take the target modules: all linear layers outrank a list, as Axolotl joins both."""
    names, linear = draft.facts.get("targets"), draft.facts.get("linear")
    if linear or {*(names or ())} & {"all-linear"}:
        draft.put("adapter.targets", "all-linear")
        more = [name for name in names or () if name in ("lm_head", "embed_tokens")]
        if more:
            draft.note("adapter.targets", f"are all linear layers, without {', '.join(more)}")
    elif names:
        draft.put("adapter.targets", names)
    else:
        draft.put("adapter.targets", "all-linear")
        draft.note("adapter.targets", "PEFT chooses them by architecture; here: all linear layers")
