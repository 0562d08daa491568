"""Tests of models without weights: they have the shapes, dtypes and layers of a real load; layer cuts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from halfbyte.errors import ModelError
from halfbyte.model.footprint import num_parameters, stored_tensors
from halfbyte.model.load import load_config, load_model
from halfbyte.model.precision import Compute
from halfbyte.model.resolve import resolve_base
from halfbyte.model.skeleton import (
    EXPERTS,
    build,
    layer_list,
    packed_layers,
    quantise,
    unquantised_weights,
)
from halfbyte.plan.layer_cut import MAX_KINDS, Cut, cut, keep_layers, layer_kinds

SMALL: dict[str, Any] = {
    "vocab_size": 480,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}


def small(model_type: str, **fields: Any) -> PretrainedConfig:
    config: PretrainedConfig = AutoConfig.for_model(model_type, **(SMALL | fields))
    return config


def storages(model: torch.nn.Module) -> Counter[tuple[tuple[int, ...], torch.dtype]]:
    return Counter((tuple(t.shape), t.dtype) for t in stored_tensors(model))


@pytest.mark.parametrize(
    ("folder", "precision", "double_quant", "dtype"),
    [
        ("tiny_llama", "fp32", False, torch.float32),
        ("tiny_llama", "int8", False, torch.bfloat16),
        ("tiny_llama", "nf4", False, torch.float32),
        ("tiny_llama", "fp4", True, torch.float32),
        ("tiny_gemma_vision", "nf4", True, torch.bfloat16),
    ],
)
def test_quantised_skeleton_has_the_tensors_of_a_real_load(
    request: pytest.FixtureRequest,
    folder: str,
    precision: Any,
    double_quant: bool,
    dtype: torch.dtype,
) -> None:
    base = resolve_base(str(request.getfixturevalue(folder)))
    compute = Compute(torch.device("cpu"), dtype, "test")
    real = load_model(base, precision, double_quant=double_quant, compute=compute).model
    model = build(load_config(base), dtype, text_only=True)
    quantise(model, precision, double_quant, dtype)
    assert type(model) is type(real)
    assert storages(model) == storages(real)
    assert all(tensor.is_meta for tensor in stored_tensors(model))
    assert num_parameters(model) == num_parameters(real)
    # PEFT chooses its layer classes by these flags.
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        assert getattr(model, flag, False) == getattr(real, flag, False)
    classes = [{n: type(m).__name__ for n, m in model.named_modules()} for model in (model, real)]
    assert classes[0] == classes[1]


def test_build_takes_the_language_model_alone_or_all(tiny_gemma_vision: Path) -> None:
    config = load_config(resolve_base(str(tiny_gemma_vision)))
    text = build(config, torch.bfloat16, text_only=True)
    whole = build(config, torch.bfloat16, text_only=False)
    assert type(text).__name__ == "Gemma3ForCausalLM"
    assert type(whole).__name__ == "Gemma3ForConditionalGeneration"
    assert {p.dtype for p in whole.parameters()} == {torch.bfloat16}
    assert text.get_output_embeddings().weight is text.get_input_embeddings().weight
    vision = [
        p for name, p in whole.named_parameters() if "vision" in name or "multi_modal" in name
    ]
    assert num_parameters(whole) - num_parameters(text) == sum(p.numel() for p in vision) > 0


def test_build_refuses_what_makes_no_model() -> None:
    with pytest.raises(ModelError, match="no model can be built from this vit configuration"):
        build(AutoConfig.for_model("vit"), torch.float32, text_only=True)


def test_quantise_refuses_a_model_without_linear_layers_to_pack() -> None:
    model = build(small("llama"), torch.bfloat16, text_only=True)
    keep_layers(model, {}, None)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: has no linear layer .*precision=bf16"):
        quantise(model, "nf4", True, torch.bfloat16)


@pytest.mark.parametrize("tied", [True, False])
def test_unquantised_weights_are_named_with_the_reason(tied: bool) -> None:
    model = build(small("llama", tie_word_embeddings=tied), torch.bfloat16, text_only=True)
    left = {entry.what: entry for entry in unquantised_weights(model)}
    table = 480 * 64
    names = ["embedding and head (one matrix)"] if tied else ["embedding", "head"]
    assert list(left) == [*names, "norms and biases"]
    assert all(left[name].num_parameters == table for name in names)
    assert left["norms and biases"].num_parameters == 64 * (2 * 3 + 1)
    packed = sum(layer.weight.numel() for layer in packed_layers(model).values())
    assert packed + sum(entry.num_parameters for entry in left.values()) == num_parameters(model)


@pytest.mark.parametrize(
    ("model_type", "fields", "experts"),
    [
        ("qwen3_moe", MOE, 3 * 4 * 3 * 64 * 32),
        ("mixtral", {"num_local_experts": 4}, 3 * 4 * 3 * 64 * 128),
    ],
)
def test_unquantised_weights_list_experts_first(
    model_type: str, fields: dict[str, Any], experts: int
) -> None:
    model = build(small(model_type, **fields), torch.bfloat16, text_only=True)
    left = unquantised_weights(model)
    assert (left[0].what, left[0].num_parameters, left[0].why) == ("experts", experts, EXPERTS)
    assert "packs only linear layers" in EXPERTS
    packed = packed_layers(model)
    assert packed
    assert not any("experts" in name for name in packed)


def test_layer_kinds_distinguish_attention_window_and_shapes() -> None:
    gemma = small("gemma3_text", num_hidden_layers=8, sliding_window=16, head_dim=16)
    kinds = layer_kinds(build(gemma, torch.bfloat16, text_only=True))
    assert [kind[0].split("_")[0] for kind in kinds] == ["sliding"] * 5 + ["full"] + ["sliding"] * 2
    assert len(set(kinds)) == 2
    assert {kind[1] for kind in kinds} == {16, None}
    mixed = small("qwen3_moe", **MOE, mlp_only_layers=[0])
    kinds = layer_kinds(build(mixed, torch.bfloat16, text_only=True))
    assert kinds[0] != kinds[1] == kinds[2]
    assert len(set(layer_kinds(build(small("llama"), torch.bfloat16, text_only=True)))) == 1


def test_layer_list_fails_when_the_layers_are_not_there() -> None:
    model = build(small("llama"), torch.bfloat16, text_only=True)
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="its 7 decoder layers are not found"):
        layer_list(model)


@pytest.mark.parametrize(
    ("kinds", "wanted"),
    [
        ("a", Cut((0,), ())),
        ("aa", Cut((0, 1), ())),
        ("aaaa", Cut((0, 3), ((1, 2),))),
        ("aaaaabaa", Cut((0, 5, 7), ((1, 5),))),
        ("aaaaabaaaaab", Cut((0, 10, 11), ((1, 8), (5, 1)))),
        ("abbbbb", Cut((0, 5), ((1, 4),))),
        ("abcdefg", Cut(tuple(range(7)), ())),
    ],
)
def test_cut_takes_the_first_the_last_of_each_kind_and_a_spare(kinds: str, wanted: Cut) -> None:
    actual = cut([(kind,) for kind in kinds])
    assert actual == wanted
    # Every layer of the whole model is counted once.
    assert len(actual.base) + sum(times for _, times in actual.extra) == len(kinds)
    assert actual.layers == tuple(sorted({*actual.base, *(layer for layer, _ in actual.extra)}))
    assert (actual.extra == ()) == (actual.layers == tuple(range(len(kinds))))
    assert len(set("abcdefg")) > MAX_KINDS


def test_keep_layers_leaves_a_shorter_model_of_the_same_layers() -> None:
    config = small("gemma3_text", num_hidden_layers=7, sliding_window=16, head_dim=16)
    model = build(config, torch.bfloat16, text_only=True)
    whole, types = list(layer_list(model)), list(model.config.layer_types)
    for layers in ((0, 5, 6), (1, 2), tuple(range(7))):
        keep_layers(model, {i: whole[i] for i in layers}, types)
        assert [id(layer) for layer in layer_list(model)] == [id(whole[i]) for i in layers]
        assert model.config.num_hidden_layers == len(layers)
        assert model.config.layer_types == [types[i] for i in layers]
        attention: list[Any] = [layer.self_attn for layer in layer_list(model)]
        assert [part.layer_idx for part in attention] == list(range(len(layers)))
