"""Owns the models and rows of which operators are counted: real kinds of layers, tiny widths."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from benchmarks.harness.models import TINY_VOCABULARY
from benchmarks.harness.rows import ALPACA_MU, ALPACA_SIGMA, LONGEST, STEP_ROWS, Row, in_steps

KINDS = ("gemma", "llama", "qwen")
DATASETS = ("chat", "icd10", "prompt460")
SHORT = "short"  # rows of few tokens, whose arithmetic takes no time beside its launches
SHORTEST = 2
REAL_VOCABULARY = {"gemma": 262_208, "llama": 128_256, "qwen": 151_936}
FULL_EVERY = 6  # of Gemma-3's layers one has full attention
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": TINY_VOCABULARY,
    "max_position_embeddings": 8192,
}


# So narrow that arithmetic takes no time on any CPU: one without bf16 multiplies it a hundred times slower than fp32.
NARROWEST = SIZES | {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def tiny_model(
    kind: str, num_layers: int, folder: Path, sizes: dict[str, int] | None = None
) -> Path:
    """Folder with drawn weights in bf16 of a model of this kind, made on the first call."""
    sizes = sizes or SIZES
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    path = folder / f"{kind}-{num_layers}-{sizes['hidden_size']}"
    if (path / "config.json").exists():
        return path
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(kind, num_layers, sizes), dtype=torch.bfloat16)
    words = {str(n): n for n in range(TINY_VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="3")),
        pad_token="0",
        eos_token="1",
    )
    tokenizer.save_pretrained(path)
    model.save_pretrained(path)
    return path


def _config(kind: str, num_layers: int, sizes: dict[str, int]) -> Any:
    from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config

    if kind == "llama":
        return LlamaConfig(num_hidden_layers=num_layers, tie_word_embeddings=False, **sizes)
    if kind == "qwen":
        return Qwen3Config(num_hidden_layers=num_layers, **sizes)
    types = [
        "sliding_attention" if (layer + 1) % FULL_EVERY else "full_attention"
        for layer in range(num_layers)
    ]
    return Gemma3TextConfig(
        num_hidden_layers=num_layers,
        layer_types=types,
        sliding_window=1024,
        query_pre_attn_scalar=16,
        **sizes,
    )


def write_tiny_rows(dataset: str, steps: int, seed: int, path: Path) -> None:
    """Rows of random tokens, as long and as labelled as those of the speed benchmark."""
    source = random.Random(seed)
    prompts = {"icd10": _tokens(source, 24), "prompt460": _tokens(source, 460)}
    drawn = [_drawn(dataset, source, prompts.get(dataset, [])) for _ in range(STEP_ROWS * steps)]
    parts = {"drawn": drawn, "in_steps": in_steps(drawn, seed), "held_out": []}
    path.write_text(json.dumps(parts))


def _tokens(source: random.Random, number: int) -> list[int]:
    return [source.randrange(3, TINY_VOCABULARY) for _ in range(number)]


def _drawn(dataset: str, source: random.Random, prompt: list[int]) -> Row:
    if dataset == SHORT:
        length, num_labelled = SHORTEST + source.randrange(3), 1
    elif dataset == "chat":
        length = min(max(round(source.lognormvariate(ALPACA_MU, ALPACA_SIGMA)), 6), LONGEST)
        num_labelled = max(1, round(source.uniform(0.2, 0.6) * length))
    else:
        length, num_labelled = (source.randrange(20, 50), 12) if dataset == "icd10" else (40, 20)
    ids = prompt + _tokens(source, length)
    begin = len(ids) - num_labelled
    return ids, [-100] * begin + ids[begin:]
