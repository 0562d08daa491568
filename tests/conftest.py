"""Small tokenizers, models, datasets and configs, all built in code; nothing here touches a network."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.pop("WANDB_API_KEY", None)

from halfbyte.libraries import quiet_libraries

quiet_libraries()

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from halfbyte.data.render import load_template

ROOT = Path(__file__).resolve().parents[1]
CORPUS = [
    "acute chronic heart attack myocardial infarction of the anterior wall",
    "The quick brown fox jumps over the lazy dog. 0123456789 (I21) I10 I95",
    "system user assistant model Question Answer Name the category of this diagnosis: title (code).",
    "def main():\n    return {'key': [1, 2, 3]}\n\n\nüöä é 東京 😀 <tag> | <| |> ###",
]
VOCABULARY = 480


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML tokens; adds no BOS (as SmolLM2's)."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(
        CORPUS,
        BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=controls,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=load_template("chatml"),
    )


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer with Gemma's control tokens, spaces as ▁, and a BOS on every text."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    controls = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    core.train_from_iterator(
        CORPUS,
        BpeTrainer(vocab_size=VOCABULARY, special_tokens=controls + bytes_, show_progress=False),
    )
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


@pytest.fixture
def chatml() -> PreTrainedTokenizerFast:
    return chatml_tokenizer()


@pytest.fixture
def gemma() -> PreTrainedTokenizerFast:
    """Without a chat template, as Gemma's base models."""
    return gemma_tokenizer()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama and the ChatML tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = chatml_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


MakeConfig = Callable[..., Path]


@pytest.fixture
def make_config(tmp_path: Path, tiny_llama: Path) -> MakeConfig:
    """A function that writes a small working config, with sections updated by keyword."""

    def make(**sections: dict[str, Any]) -> Path:
        rows = [
            {"prompt": f"diagnosis {n} of the heart", "completion": f"Heart attack (I{n % 7})"}
            for n in range(40)
        ]
        write_rows(tmp_path / "train.jsonl", rows[:32])
        write_rows(tmp_path / "test.jsonl", rows[32:])
        content: dict[str, Any] = {
            "runs_dir": "runs",
            "model": {"name": str(tiny_llama), "precision": "nf4", "compute_dtype": "fp32"},
            "adapter": {"r": 4, "alpha": 8},
            "data": {"train": "train.jsonl", "test": "test.jsonl", "max_length": 128},
            "train": {
                "learning_rate": 1e-2,
                "max_steps": 4,
                "batch_size": 4,
                "micro_batch_size": 2,
                "log_steps": 1,
                "num_samples": 1,
                "sample_tokens": 4,
            },
            "eval": {"rows": 8, "max_new_tokens": 8, "fewshot": 2, "resamples": 200},
            "merge": {"rows": 4, "dtype": "fp32"},
        }
        for section, values in sections.items():
            if isinstance(values, dict):
                content[section] = {**content.get(section, {}), **values}
            else:
                content[section] = values
        path = tmp_path / "tiny.yaml"
        # JSON is YAML 1.2.
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        return path

    return make
