"""Owns the keys of LLaMA-Factory's YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    LORA,
    NO_SECRET,
    NO_SPLIT,
    NO_WORKERS,
    ONLY_LORA,
    ONLY_SFT,
    TRAINING,
    packing,
    sets,
    targets,
)
from halfbyte.importing.llamafactory_rows import put_rows

DEFAULTS = {
    "seed": 42,
    "adapter.r": 8,
    "adapter.dropout": 0.0,
    "adapter.targets": "all-linear",
    "data.max_length": 2048,
    "data.on_overlength": "truncate",
    "data.loss_on": "completion",
    "train.learning_rate": 5e-5,
    "train.epochs": 3.0,
    "train.scheduler": "linear",
    "train.warmup_frac": 0.0,
    "train.optimizer": "adamw_torch_fused",
    "train.weight_decay": 0.0,
    "train.max_grad_norm": 1.0,
    "train.save_steps": 500,
    "track.wandb": "off",
}


def _stage(draft: Draft, value: Any) -> str | None:
    if value not in ("sft", "pt"):
        raise BadValueError(ONLY_SFT)
    draft.facts["stage"] = value
    return None


def _template(draft: Draft, value: Any) -> str | None:
    ours = {"chatml": "chatml", "gemma": "gemma"}.get(text(value))
    if ours is None:
        return "the model's own chat template is used; another: data.chat_template"
    draft.put("data.chat_template", ours)
    return None


def _validation(draft: Draft, value: Any) -> str | None:
    if not 0 <= number(value) < 1:
        return "a number of rows; data.validation_frac is a share of the prompts"
    draft.put("data.validation_frac", number(value))
    return None


def _bits(draft: Draft, value: Any) -> str | None:
    if whole(value) not in (4, 8):
        return "allowed: 4, 8"
    draft.facts["bits"] = whole(value)
    return None


def _resize(draft: Draft, value: Any) -> str | None:
    switch(value)
    return Covered("data.new_tokens makes room for what it adds")


def _tokens(draft: Draft, value: Any) -> str | None:
    known = draft.get("data.new_tokens") or []
    draft.put("data.new_tokens", [*known, *(name for name in texts(value) if name not in known)])
    return None


ONLY_TEXT = lacking("only text is trained on")
NO_GALORE = lacking("optimizers are those of train.optimizer")
SWANLAB = lacking("the only tracker is Weights & Biases")
GENERATES = implied("halfbyte compare and halfbyte serve answer, with settings of their own")
RULES: dict[str, Rule] = {
    **TRAINING,
    "model_name_or_path": put("model.name", text),
    "model_revision": put("model.revision", text),
    "adapter_name_or_path": lacking("an adapter of a run is continued by train.resume_from"),
    "trust_remote_code": lacking("code from a model's repository is never run"),
    "use_fast_tokenizer": implied("the fast tokenizer is used", (False,)),
    "cache_dir": lacking("the environment says where downloads are: HF_HOME"),
    "hf_hub_token": lacking(NO_SECRET),
    "stage": _stage,
    "finetuning_type": refused(ONLY_LORA, ("lora",)),
    "lora_rank": put("adapter.r", whole),
    "lora_alpha": put("adapter.alpha", number),
    "lora_dropout": put("adapter.dropout", number),
    "lora_target": targets,
    "use_rslora": put("adapter.rslora", switch),
    "use_dora": put("adapter.dora", switch),
    "pissa_init": sets("adapter.init", "pissa"),
    "pissa_iter": lacking("PEFT's exact start is used", (-1,)),
    "pissa_convert": lacking("the adapter is saved as it is trained"),
    "create_new_adapter": implied("a run has an adapter of its own"),
    "additional_target": LORA["modules_to_save"],
    "loraplus_lr_ratio": lacking("A and B have one learning rate"),
    "quantization_bit": _bits,
    "quantization_method": lacking("bitsandbytes is used", ("bnb", "bitsandbytes", "BNB")),
    "quantization_type": one_of("model.precision", {"nf4": "nf4", "fp4": "fp4"}),
    "double_quantization": put("model.double_quant", switch),
    "quantization_device_map": implied("the model is loaded where it is trained"),
    "dataset": fact("datasets", texts),
    "eval_dataset": fact("eval_datasets", texts),
    "dataset_dir": fact("dataset_dir", text),
    "template": _template,
    "cutoff_len": put("data.max_length", whole),
    "max_samples": fact("max_rows", count),
    "val_size": _validation,
    "train_on_prompt": sets("data.loss_on", "all"),
    "mask_history": sets("data.loss_on", "last"),
    "packing": packing(),
    "neat_packing": packing(),
    "mix_strategy": lacking("weight of an entry of data.train", ("concat",)),
    "overwrite_cache": implied("prepared rows are made anew where anything differs"),
    "preprocessing_num_workers": implied(NO_WORKERS),
    "preprocessing_batch_size": implied(NO_WORKERS),
    "tokenized_path": lacking("prepared rows are kept in the cache"),
    "flash_attn": implied(ATTENTION),
    "shift_attn": lacking("attention is computed as the model does"),
    "enable_liger_kernel": implied("speed.kernels"),
    "use_unsloth": implied("speed.kernels"),
    "use_unsloth_gc": implied("train.checkpointing"),
    "use_reentrant_gc": implied("recomputing is never reentrant"),
    "disable_gradient_checkpointing": sets("train.checkpointing", "off"),
    "upcast_layernorm": implied("norms compute in fp32"),
    "upcast_lmhead_output": implied("the loss computes in fp32"),
    "pure_bf16": TRAINING["bf16"],
    "low_cpu_mem_usage": implied("weights are read one by one"),
    "use_galore": NO_GALORE,
    "use_apollo": NO_GALORE,
    "use_badam": NO_GALORE,
    "use_adam_mini": NO_GALORE,
    "use_muon": NO_GALORE,
    "use_llama_pro": refused(ONLY_LORA),
    "image_max_pixels": ONLY_TEXT,
    "video_max_pixels": ONLY_TEXT,
    "media_dir": ONLY_TEXT,
    "freeze_vision_tower": implied("only text is trained on"),
    "freeze_multi_modal_projector": implied("only text is trained on"),
    "plot_loss": implied("the report has the curve"),
    "predict_with_generate": GENERATES,
    "infer_backend": GENERATES,
    "infer_dtype": GENERATES,
    "use_swanlab": SWANLAB,
    "swanlab_project": SWANLAB,
    "ray_run_name": lacking(NO_SPLIT),
    "ray_num_workers": lacking(NO_SPLIT, (1,)),
    "resize_vocab": _resize,
    "add_tokens": _tokens,
    "add_special_tokens": _tokens,
    "new_special_tokens": _tokens,
    "default_system": put("data.system", text),
    "streaming": lacking("rows are read from files as they are, whatever their number"),
}


def is_llamafactory(values: dict[str, Any]) -> bool:
    """Return whether a mapping is a config of LLaMA-Factory."""
    return bool({"finetuning_type", "stage", "cutoff_len", "lora_rank"} & values.keys())


def read(values: dict[str, Any], folder: Path) -> tuple[Draft, dict[str, Any]]:
    """Return the draft of a config of LLaMA-Factory in a folder, and LLaMA-Factory's defaults."""
    draft = Draft(facts={"default_rows": 8, "eval_default": "no", "log_steps": 500})
    first = {key: values[key] for key in ("seed",) if key in values}
    draft.apply(first | values, RULES)
    draft.default("adapter.alpha", 2 * (draft.get("adapter.r") or 8))
    if draft.facts.get("stage") == "pt":
        if values.get("packing") is None:
            draft.facts["packs"] = True  # LLaMA-Factory's default of this stage
        draft.default("data.format", "text")
    else:
        draft.note(
            "rows that are too long",
            "LLaMA-Factory cuts question and answer in proportion; here the end of a row is cut off",
        )
    if not draft.faults:
        put_rows(draft, folder)
    return draft, DEFAULTS
