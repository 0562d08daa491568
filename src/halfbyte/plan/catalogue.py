"""Owns where a model's configuration comes from: this disk, the table of known models, or the Hub.

``python -m halfbyte.plan.catalogue`` prints the table; with ``--update`` it computes again what each
model needs for training.
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
from halfbyte.model.load import read_config
from halfbyte.model.resolve import cached_config, config_folder
from halfbyte.model.untrusted import check_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Every configuration has these two; any other missing field takes the architecture's default.
REQUIRED_FIELDS = ("hidden_size", "num_hidden_layers")
LENGTH = 512  # tokens of a row


@dataclass(frozen=True)
class KnownModel:
    """Describes a model whose configuration is public.

    Attributes:
        names: the model's name, then the names of models with the same shapes.
        parameters: the published number of parameters.
        source: where that number is published.
        config: the fields of config.json that determine shapes and attention.
        training: bytes to train on one row of 512 tokens with the settings that need the least memory,
            by compute dtype.
    """

    names: tuple[str, ...]
    parameters: int
    source: str
    config: dict[str, Any]
    training: dict[str, int]


def known_models() -> list[KnownModel]:
    """Read the table of known models, the smallest first."""
    text = files("halfbyte.plan").joinpath("catalogue.json").read_text(encoding="utf-8")
    return [
        KnownModel(
            tuple(entry["names"]),
            entry["parameters"],
            entry["source"],
            entry["config"],
            entry.get("training", {}),
        )
        for entry in json.loads(text)
    ]


def model_config(name: str, revision: str | None = None) -> tuple[PretrainedConfig, str]:
    """Return a model's configuration, and where it comes from. Weights are neither read nor downloaded.

    A GGUF file's configuration is read from its header. A Hub model is looked up in the local cache, then
    in the table of known models, then on the Hub.

    Raises:
        ModelError: the configuration is missing, gated or no JSON, lacks fields, or names an
            architecture that transformers does not know.
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


def configuration(known: KnownModel) -> PretrainedConfig:
    """Build the configuration of a known model."""
    from transformers import AutoConfig

    fields = dict(known.config)
    config: PretrainedConfig = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return config


def training_bytes(known: KnownModel) -> dict[str, int]:
    """Return the bytes that NF4 training needs at least, by compute dtype, without those of the process.

    The settings are one row of 512 tokens at a time, checkpointing, rank 16 and AdamW in fp32.
    """
    from halfbyte.config import model_run
    from halfbyte.plan.devices import DEVICES
    from halfbyte.plan.memory import Planner
    from halfbyte.plan.shape import Lengths

    run = model_run(known.names[0], [])
    training = {}
    for dtype, card in (("bf16", "h100"), ("fp32", "v100")):
        planner = Planner(run, configuration(known), DEVICES[card])
        plan = planner.train(Lengths.all_of(LENGTH, 1), 1, checkpointing=True)
        training[dtype] = plan.held_bytes
    return training


def as_markdown() -> str:
    """Return the table of known models for the docs."""
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
    """Rewrite the table's file with what each model needs for training."""
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
    fields = check_config(path)
    if not isinstance(fields.get("model_type"), str):
        raise ModelError(
            f"{path}: names no model_type, so it is not a transformers model; its fields are:"
            f" {', '.join(list(fields)[:8])}"
        )
    config = read_config(folder, name)
    aliases = getattr(type(config.get_text_config()), "attribute_map", {})
    present = _text_fields(fields, config.get_text_config().model_type)
    missing = [key for key in REQUIRED_FIELDS if not {key, aliases.get(key, key)} & present]
    if missing:
        raise ModelError(
            f"{path}: lacks {' and '.join(missing)}, without which transformers would assume the size of"
            " another model; a complete config.json is needed"
        )
    return config


def _text_fields(fields: dict[str, Any], model_type: str) -> set[str]:
    """Return the keys that describe the language model: those of its section, else those of the whole."""
    sections = [value for value in fields.values() if isinstance(value, dict)]
    matching = [section for section in sections if section.get("model_type") == model_type]
    return set(matching[0] if matching and fields["model_type"] != model_type else fields)


if __name__ == "__main__":
    if sys.argv[1:] == ["--update"]:
        update()
    print(as_markdown(), end="")
