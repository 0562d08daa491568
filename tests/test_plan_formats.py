"""Sizes of GGUF and AWQ files, foretold from shapes and compared with real files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, PretrainedConfig

from halfbyte.errors import ModelError
from halfbyte.plan.formats import BLOCKS, GGUF_TYPES, awq_bytes, gguf_bytes

SMOLLM2_135M = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
GEMMA3_270M = {
    "model_type": "gemma3_text",
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262144,
}
# Bytes of whole files as the Hub lists them (read in stored copies of public catalogues of sizes).
# bartowski/Mistral-7B-Instruct-v0.3-GGUF at 61fd4167
MISTRAL_7B = {"model_type": "mistral", "vocab_size": 32768}
MISTRAL_7B_FILES = {
    "q2_k": 2722877664,
    "q3_k_m": 3522941152,
    "q4_k_m": 4372812000,
    "q5_k_m": 5136175328,
    "q6_k": 5947248864,
    "q8_0": 7702565088,
}
# ibm-granite/granite-3.3-8b-instruct-GGUF at e40e9dd7
GRANITE_8B = {
    "model_type": "granite",
    "hidden_size": 4096,
    "intermediate_size": 12800,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 49159,
    "tie_word_embeddings": True,
}
GRANITE_8B_FILES = {
    "q2_k": 3103605504,
    "q3_k_m": 3996599040,
    "q4_0": 4650910464,
    "q4_1": 5148984064,
    "q4_k_m": 4942873344,
    "q5_k_m": 5797462784,
    "q6_k": 6705464064,
    "q8_0": 8684264992,
    "f16": 16344139552,
}
# Qwen/Qwen2.5-0.5B-Instruct-GGUF at 9217f5db: rows of 896, and a head of its own
QWEN2_500M = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
QWEN2_500M_FILES = {"q4_0": 428730208, "q4_k_m": 491400032, "q8_0": 675710816}
# unsloth/Qwen3-30B-A3B-GGUF at d5b1d57b
QWEN3_30B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "vocab_size": 151936,
}
QWEN3_30B_FILES = {
    "q2_k": 11258610240,
    "q3_k_m": 14711847488,
    "q4_k_m": 18556686912,
    "q5_k_m": 21725581888,
    "q6_k": 25092532800,
    "q8_0": 32483932736,
}
# MaziyarPanahi/Mixtral-8x7B-Instruct-v0.1-GGUF: the rules for eight experts
MIXTRAL_8X7B = {"model_type": "mixtral", "vocab_size": 32000, "num_key_value_heads": 8}
MIXTRAL_8X7B_FILES = {
    "q2_k": 17309173632,
    "q3_k_m": 22544394112,
    "q4_k_m": 28446410624,
    "q5_k_m": 33227523968,
    "q6_k": 38378760064,
    "q8_0": 49624262528,
}
# bartowski/Llama-3.1-Nemotron-70B-Instruct-HF-GGUF: the rule for 70B
LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_70B_FILES = {"q2_k": 26375113632, "q3_k_m": 34267499424, "q4_k_m": 42520398752}
# bartowski/Phi-3.5-mini-instruct-GGUF, by an older llama.cpp; these types do not touch its QKV
PHI_3_5_MINI = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "tie_word_embeddings": False,
}
PHI_3_5_MINI_FILES = {"q6_k": 3135853344, "q8_0": 4061222688}


def build(fields: dict[str, Any]) -> tuple[nn.Module, PretrainedConfig]:
    rest = {key: value for key, value in fields.items() if key != "model_type"}
    config = AutoConfig.for_model(fields["model_type"], **rest)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config), config


def test_blocks_are_those_of_the_gguf_package_for_every_type() -> None:
    gguf = pytest.importorskip("gguf")
    theirs = {kind.name: sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {name: theirs[name] for name in BLOCKS} == BLOCKS


# python -c 'import gguf; print(sum(int(t.n_bytes) for t in gguf.GGUFReader(FILE).tensors))', with
# FILE in the wheels of src/halfbyte/model/packaged.py: SmolLM2-135M-Instruct.Q4_1.gguf (sha256
# b179c952…) and gemma-3-270m-q4_k_m.gguf (a5fd3b62…).
@pytest.mark.parametrize(
    ("fields", "file_type", "file_bytes"),
    [(SMOLLM2_135M, "q4_1", 96_576_768), (GEMMA3_270M, "q4_k_m", 246_587_904)],
    ids=["smollm2-135m", "gemma3-270m"],
)
def test_gguf_bytes_are_those_of_the_real_file_when_read_tensor_by_tensor(
    fields: dict[str, Any], file_type: str, file_bytes: int
) -> None:
    assert gguf_bytes(*build(fields), file_type) == file_bytes


@pytest.mark.parametrize(
    ("fields", "files"),
    [
        (MISTRAL_7B, MISTRAL_7B_FILES),
        (GRANITE_8B, GRANITE_8B_FILES),
        (QWEN2_500M, QWEN2_500M_FILES),
        (QWEN3_30B, QWEN3_30B_FILES),
        (MIXTRAL_8X7B, MIXTRAL_8X7B_FILES),
        (LLAMA_70B, LLAMA_70B_FILES),
        (PHI_3_5_MINI, PHI_3_5_MINI_FILES),
    ],
    ids=["mistral", "granite", "qwen2-0.5b", "qwen3-moe", "mixtral", "llama-70b", "phi-3.5"],
)
def test_gguf_bytes_leave_one_header_over_when_published_files_differ_in_type_alone(
    fields: dict[str, Any], files: dict[str, int]
) -> None:
    model, config = build(fields)
    headers = {files[file_type] - gguf_bytes(model, config, file_type) for file_type in files}
    assert len(headers) == 1


def test_gguf_bytes_are_the_same_when_the_config_is_that_of_the_multimodal_model() -> None:
    model, config = build(GEMMA3_270M)
    around = Gemma3Config(text_config=config.to_dict())
    assert gguf_bytes(model, around, "q4_k_m") == gguf_bytes(model, config, "q4_k_m")


def test_gguf_bytes_name_the_types_allowed_when_the_type_is_unknown() -> None:
    model, config = build(GEMMA3_270M)
    with pytest.raises(ModelError, match=r"'iq4_xs'.*" + ", ".join(GGUF_TYPES)):
        gguf_bytes(model, config, "iq4_xs")


def test_awq_bytes_are_those_of_packed_layers_when_added_up_one_by_one() -> None:
    model, config = build(QWEN2_500M)
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            rows, columns = module.in_features, module.out_features
            # The three tensors of AutoAWQ's WQLinear_GEMM.
            qweight = torch.empty(rows, columns // 8, dtype=torch.int32, device="meta")
            qzeros = torch.empty(rows // 128, columns // 8, dtype=torch.int32, device="meta")
            scales = torch.empty(rows // 128, columns, dtype=torch.float16, device="meta")
            total += qweight.nbytes + qzeros.nbytes + scales.nbytes
            total += 0 if module.bias is None else 2 * columns
        else:
            total += sum(2 * p.numel() for p in module.parameters(recurse=False))
    assert awq_bytes(model, config) == total


def test_awq_bytes_say_which_layer_fails_when_its_rows_are_no_whole_groups() -> None:
    model, config = build(SMOLLM2_135M)
    with pytest.raises(ModelError, match=r"q_proj\.weight has rows of 576.*group size"):
        awq_bytes(model, config)
    assert awq_bytes(model, config, group_size=64) < gguf_bytes(model, config, "q8_0")


def test_awq_bytes_take_the_inputs_for_rows_when_experts_are_stored_transposed() -> None:
    small = {"hidden_size": 512, "num_hidden_layers": 1, "num_local_experts": 4, "vocab_size": 64}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    model, config = build(
        {"model_type": "gpt_oss", "intermediate_size": 96, "pad_token_id": 0, **small, **heads}
    )
    with pytest.raises(ModelError, match="down_proj has rows of 96 weights and 2048 outputs"):
        awq_bytes(model, config)
