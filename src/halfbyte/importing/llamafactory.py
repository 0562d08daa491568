"""Owns the keys of LLaMA-Factory's YAML, and its dataset_info.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from halfbyte.importing.draft import Draft, Rule, fact, implied, lacking, put, targets
from halfbyte.importing.hf_arguments import LORA, NO_SPLIT, NO_WORKERS, TRAINING

OWN_ROLES = ({"from", "value"}, {"role", "content"})
COLUMNS = {  # of dataset_info.json, and ours
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "system": "system",
    "messages": "messages",
    "tools": "tools",
}
INFO = "dataset_info.json"


def _stage(draft: Draft, value: Any) -> str | None:
    return None if value in ("sft", "pt") else "only supervised fine-tuning is done"


def _kind(draft: Draft, value: Any) -> str | None:
    return None if value == "lora" else "only LoRA is trained"


def _template(draft: Draft, value: Any) -> str | None:
    return None if value in ("default", "empty") else "the model's own chat template is used"


def _packing(draft: Draft, value: Any) -> str | None:
    return None


def _loss(on: str) -> Rule:
    def rule(draft: Draft, value: Any) -> str | None:
        if value:
            draft.put("data.loss_on", on)
        return None

    return rule


def _pissa(draft: Draft, value: Any) -> str | None:
    if value:
        draft.put("adapter.init", "pissa")
    return None


def _validation(draft: Draft, value: Any) -> str | None:
    if not 0 <= value < 1:
        return "give data.validation_frac, a share of the prompts"
    draft.put("data.validation_frac", value)
    return None


def _bits(draft: Draft, value: Any) -> str | None:
    if int(value) not in (4, 8):
        return "allowed: 4, 8"
    draft.facts["bits"] = int(value)
    return None


RULES: dict[str, Rule] = {
    **TRAINING,
    "model_name_or_path": put("model.name"),
    "model_revision": put("model.revision"),
    "trust_remote_code": lacking("code from a model's repository is never run"),
    "stage": _stage,
    "finetuning_type": _kind,
    "lora_rank": put("adapter.r"),
    "lora_alpha": put("adapter.alpha"),
    "lora_dropout": put("adapter.dropout"),
    "lora_target": targets,
    "use_rslora": put("adapter.rslora"),
    "use_dora": put("adapter.dora"),
    "pissa_init": _pissa,
    "additional_target": LORA["modules_to_save"],
    "loraplus_lr_ratio": lacking("has no twin"),
    "quantization_bit": _bits,
    "quantization_method": lacking("bitsandbytes is used", ("bnb", "bitsandbytes", "BNB")),
    "quantization_type": put("model.precision"),
    "double_quantization": put("model.double_quant"),
    "dataset": fact("datasets"),
    "eval_dataset": fact("eval_datasets"),
    "dataset_dir": fact("dataset_dir"),
    "template": _template,
    "cutoff_len": put("data.max_length"),
    "max_samples": fact("max_rows"),
    "val_size": _validation,
    "train_on_prompt": _loss("all"),
    "mask_history": _loss("last"),
    "packing": implied("rows of a pass are laid end to end"),
    "neat_packing": implied("rows of a pass are laid end to end, without attention between them"),
    "overwrite_cache": implied("prepared rows are made anew where anything differs"),
    "preprocessing_num_workers": implied(NO_WORKERS),
    "preprocessing_batch_size": implied(NO_WORKERS),
    "flash_attn": implied("data.max_length and the card decide how attention is computed"),
    "enable_liger_kernel": implied("speed.kernels"),
    "use_unsloth": implied("speed.kernels"),
    "upcast_layernorm": implied("norms compute in fp32"),
    "plot_loss": implied("the report has the curve"),
    "predict_with_generate": implied("halfbyte compare answers held-out rows"),
    "use_swanlab": lacking("trackers: track.wandb"),
    "ray_run_name": lacking(NO_SPLIT),
    "resize_vocab": lacking("data.new_tokens adds tokens"),
    "new_special_tokens": put("data.new_tokens"),
    "default_system": put("data.system"),
    "streaming": lacking("rows are read from files as they are, whatever their number"),
}


def is_llamafactory(values: dict[str, Any]) -> bool:
    """Return whether a mapping is a config of LLaMA-Factory."""
    return "finetuning_type" in values or "stage" in values or "cutoff_len" in values


def read(values: dict[str, Any], folder: Path) -> Draft:
    """Return the draft of a config of LLaMA-Factory in a folder."""
    draft = Draft(facts={"default_rows": 8, "default_rate": 5e-5})
    first = {key: values[key] for key in ("seed",) if key in values}
    draft.apply(first | values, RULES)
    rank = draft.get("adapter.r") or 8
    draft.put("adapter.r", rank)
    if draft.get("adapter.alpha") is None:
        draft.put("adapter.alpha", 2 * rank)
    if draft.get("data.on_overlength") is None:
        draft.put("data.on_overlength", "truncate")  # what LLaMA-Factory does with a longer row
    known = _dataset_info(folder, draft.facts.get("dataset_dir", "data"))
    for fact_name, path in (("datasets", "data.train"), ("eval_datasets", "data.test")):
        names = draft.facts.get(fact_name)
        if names:
            _put_sources(draft, path, names, known)
    return draft


def _dataset_info(folder: Path, named: Any) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the datasets, and what is known of them."""
    for base in (folder, Path.cwd(), *folder.parents):
        place = base / str(named)
        if (place / INFO).is_file():
            content: dict[str, Any] = json.loads((place / INFO).read_text(encoding="utf-8"))
            return place, content
    return folder, {}


def _put_sources(draft: Draft, path: str, named: Any, known: tuple[Path, dict[str, Any]]) -> None:
    names = named.split(",") if isinstance(named, str) else list(named)
    sources = [_source(draft, name.strip(), known) for name in names]
    limit = draft.facts.get("max_rows")
    if limit and path == "data.train":
        for source in sources:
            source["rows"] = int(limit)
    simple = len(sources) == 1 and set(sources[0]) == {"path"}
    draft.put(path, sources[0]["path"] if simple else sources)


def _source(draft: Draft, name: str, known: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    """Return our source of a dataset by its name in dataset_info.json."""
    folder, info = known
    entry = info.get(name)
    if entry is None:
        why = f"{INFO} with it was not found; say in data.train where its rows are"
        draft.left[f"dataset {name}"] = (name, why)
        return {"path": f"{name}.json"}
    source: dict[str, Any] = {}
    if "file_name" in entry:
        source["path"] = str(folder / entry["file_name"])
    elif "hf_hub_url" in entry:
        source["path"] = entry["hf_hub_url"]
    for key, ours in (("subset", "subset"), ("split", "split"), ("num_samples", "rows")):
        if entry.get(key):
            source[ours] = entry[key]
    formatting = entry.get("formatting", "alpaca")
    tags = entry.get("tags", {})
    roles = {tags.get("role_tag", "from"), tags.get("content_tag", "value")}
    if formatting == "sharegpt":
        source["format"] = "messages" if roles == OWN_ROLES[1] else "sharegpt"
    else:
        source["format"] = "alpaca"
    columns = {}
    for key, column in entry.get("columns", {}).items():
        ours = COLUMNS.get(key)
        if ours is None:
            draft.left[f"dataset {name}.columns.{key}"] = (column, "only text is trained on")
        elif ours == "messages":
            if column not in ("messages", "conversations"):
                columns["messages" if source["format"] == "messages" else "conversations"] = column
        elif column != ours:
            columns[ours] = column
    if columns:
        source["columns"] = columns
    if entry.get("ranking"):
        draft.left[f"dataset {name}.ranking"] = (True, "preferences are not trained on")
    return source
