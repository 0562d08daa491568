"""Owns the export of the adapter as a PEFT folder that vLLM and PEFT can load as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from halfbyte.errors import RunError
from halfbyte.run_dir import file_sha256, read_json
from halfbyte.trained.artefact import VLLM_RANKS, vllm_rank
from halfbyte.trained.reference_logprobs import FILE as REFERENCE_FILE
from halfbyte.trained.run import TrainedRun


def make_peft_folder(trained: TrainedRun, folder: Path) -> dict[str, Any]:
    """Copy the adapter, its tokenizer and template into ``folder``; return how to serve it.

    Raises:
        RunError: vLLM does not support this kind of adapter.
    """
    source = trained.folder.adapter
    config = read_json(source / "adapter_config.json")
    wrong = [key for key in ("use_dora", "modules_to_save", "alpha_pattern") if config.get(key)]
    if config.get("bias", "none") != "none":
        wrong.append("bias")
    if wrong:
        raise RunError(
            f"{source}: vLLM serves no adapter with {', '.join(wrong)}. Ship the merged model instead:"
            f" halfbyte merge {trained.folder.path}"
        )
    rank = vllm_rank(config["r"])
    if rank is None:
        raise RunError(f"{source}: rank {config['r']}; vLLM serves at most {VLLM_RANKS[-1]}")
    for path in source.iterdir():
        if path.name == REFERENCE_FILE:
            continue  # contains rows of the data
        if path.is_file() and path.suffix in (".json", ".safetensors", ".jinja", ".model", ".txt"):
            shutil.copy2(path, folder / path.name)
    config["inference_mode"] = True
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    name = trained.run.name
    return {
        "serve": f"vllm serve BASE --enable-lora --max-lora-rank {rank} --lora-modules {name}=FOLDER",
        "weights_sha256": file_sha256(folder / "adapter_model.safetensors"),
    }
