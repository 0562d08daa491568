"""Owns where a model's configuration comes from: this disk, the table of known models, or the Hub.

``python -m halfbyte.plan.catalogue`` prints the table; with ``--update`` it works out anew what each
model takes to train.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.config.paths import MODEL_SUFFIXES
from halfbyte.errors import ModelError
from halfbyte.model.load import load_config
from halfbyte.model.resolve import Base, cached_config, config_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Every configuration says these two; what else is left out has the architecture's own default.
NEEDED = ("hidden_size", "num_hidden_layers")
LENGTH = 512


@dataclass(frozen=True)
class Known:
    """A model whose configuration is public.

    Attributes:
        names: under which it is found; the first one is its own, the others have the same shapes.
        parameters: the published number of parameters.
        source: where that number is published.
        config: the fields of config.json that decide shapes and attention.
        training: bytes that one row of 512 tokens takes in the least hungry settings, by compute dtype.
    """

    names: tuple[str, ...]
    parameters: int
    source: str
    config: dict[str, Any]
    training: dict[str, int]


def known_models() -> list[Known]:
    """The table of known models, the smallest first."""
    text = files("halfbyte.plan").joinpath("catalogue.json").read_text(encoding="utf-8")
    return [
        Known(
            tuple(entry["names"]),
            entry["parameters"],
            entry["source"],
            entry["config"],
            entry.get("training", {}),
        )
        for entry in json.loads(text)
    ]


def model_config(name: str, revision: str | None = None) -> tuple[PretrainedConfig, str]:
    """A model's configuration, and where it comes from. Weights are neither read nor downloaded.

    A GGUF file's header says what it was made from. A Hub model is looked up in the local cache, then in the table of known models, then on the Hub.

    Raises:
        ModelError: it is not found, is gated, is no JSON, lacks fields, or names an architecture
            that transformers does not know.
    """
    on_disk = Path(name).is_absolute()
    if not on_disk and revision is None:
        cached = None if name.startswith("pypi:") else cached_config(name)
        if cached is not None:
            return _read(name, cached), f"{name} in the local cache"
        for known in known_models():
            if name in known.names:
                return configuration(known), f"{name} in halfbyte's table of known models"
    if on_disk and name.endswith(MODEL_SUFFIXES):
        return _gguf_config(Path(name)), f"the header of {Path(name).name}"
    folder, origin = config_folder(name, revision)
    return _read(name, folder), origin


def configuration(known: Known) -> PretrainedConfig:
    """A known model's configuration."""
    from transformers import AutoConfig

    fields = dict(known.config)
    config: PretrainedConfig = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return config


def training_bytes(known: Known) -> dict[str, int]:
    """Bytes of NF4 training in the least hungry settings, by compute dtype, without the process's own.

    One row of 512 tokens at a time, recomputation, rank 16, AdamW in fp32.
    """
    from halfbyte.config import model_run
    from halfbyte.plan.devices import DEVICES
    from halfbyte.plan.memory import Planner
    from halfbyte.plan.shape import Lengths

    # SDPA has no kernel for capped scores (Gemma-2).
    capped = known.config.get("attn_logit_softcapping") is not None
    run = model_run(known.names[0], ["model.attention=eager"] if capped else [])
    found = {}
    for dtype, card in (("bf16", "h100"), ("fp32", "v100")):
        planner = Planner(run, configuration(known), DEVICES[card])
        plan = planner.train(Lengths.all_of(LENGTH, 1), 1, checkpointing=True)
        found[dtype] = plan.held_bytes
    return found


def as_markdown() -> str:
    """The table of known models for the docs."""
    lines = [
        "| model | parameters | trains in, GB (bf16) | (fp32) | published by |",
        "| --- | --- | --- | --- | --- |",
    ]
    for known in known_models():
        lines.append(
            f"| {known.names[0]} | {known.parameters:,} | {known.training['bf16'] / 1e9:.2f} |"
            f" {known.training['fp32'] / 1e9:.2f} | {known.source} |"
        )
    return "\n".join(lines) + "\n"


def update() -> None:
    """Rewrite the table's file with what each model takes to train."""
    lines = []
    for known in known_models():
        entry = {
            "names": known.names,
            "parameters": known.parameters,
            "source": known.source,
            "training": training_bytes(known),
            "config": known.config,
        }
        print(known.names[0], entry["training"], file=sys.stderr)
        lines.append(json.dumps(entry))
    path = Path(str(files("halfbyte.plan").joinpath("catalogue.json")))
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def _gguf_config(path: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except ImportError:
        raise ModelError(
            f"{path}: reading GGUF needs an extra: pip install 'halfbyte[gguf]'"
        ) from None
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"{path}: transformers cannot read its header: {error}") from error
    return config


def _read(name: str, folder: Path) -> PretrainedConfig:
    path = folder / "config.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: no readable JSON: {error}") from None
    if not isinstance(told, dict) or not isinstance(told.get("model_type"), str):
        raise ModelError(
            f"{path}: names no model_type, so it is no transformers model; found the fields:"
            f" {', '.join(list(told)[:8]) if isinstance(told, dict) else type(told).__name__}"
        )
    config = load_config(Base(name, str(folder), None, "", ""))
    other = getattr(type(config.get_text_config()), "attribute_map", {})
    written = _text_fields(told, config.get_text_config().model_type)
    missing = [key for key in NEEDED if not {key, other.get(key, key)} & written]
    if missing:
        raise ModelError(
            f"{path}: lacks {' and '.join(missing)}, without which transformers would take the size of"
            " another model; a complete config.json is needed"
        )
    return config


def _text_fields(told: dict[str, Any], model_type: str) -> set[str]:
    """Keys of the part that describes the language model: the whole, or a section of its type."""
    sections = [value for value in told.values() if isinstance(value, dict)]
    own = [section for section in sections if section.get("model_type") == model_type]
    return set(own[0] if own and told["model_type"] != model_type else told)


if __name__ == "__main__":
    if sys.argv[1:] == ["--update"]:
        update()
    print(as_markdown(), end="")
