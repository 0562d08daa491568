"""The longest row by card: the lengths that it gives fit when they are traced, longer ones do not."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig

from halfbyte.config import model_run
from halfbyte.plan.devices import DEVICES
from halfbyte.plan.longest import CLAMPED_TO, longest_rows
from halfbyte.plan.memory import Planner
from halfbyte.plan.shape import Lengths

WIDE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
}
OLD = {"gtx1080ti", "p100", "v100", "v100-32gb"}  # without attention in one call


def configuration(kind: str, **fields: Any) -> PretrainedConfig:
    config: PretrainedConfig = AutoConfig.for_model(kind, **(WIDE | fields))
    return config


@pytest.mark.parametrize(
    "fields", [{"kind": "llama"}, {"kind": "gemma3_text", "sliding_window": 512}], ids=str
)
def test_the_longest_row_fits_and_a_longer_one_does_not(fields: dict[str, Any]) -> None:
    run = model_run("x", ["train.batch_size=1"])
    config = configuration(**fields, max_position_embeddings=10_000_000)
    by_card = longest_rows(run, config)
    for card in ("t4", "rtx4090"):
        planner = Planner(run, config, DEVICES[card])
        margins = [
            planner.margin_bytes(planner.train(Lengths.all_of(length, 1), 1, checkpointing=True))
            for length in (by_card[card], by_card[card] + CLAMPED_TO)
        ]
        assert by_card[card] > 1000
        assert margins[0] >= 0 > margins[1], card


def test_no_row_is_longer_than_the_positions_and_larger_models_have_shorter_ones() -> None:
    run = model_run("x", [])
    small = longest_rows(run, configuration("llama", max_position_embeddings=3000))
    assert set(small) == set(DEVICES) - OLD
    assert small["h100"] == small["t4"] == 3000
    large = configuration("llama", num_hidden_layers=200, max_position_embeddings=3000)
    tokens = longest_rows(run, large)
    assert tokens["rtx2060"] == 0
    assert tokens["h100"] == 3000


def test_cards_and_settings_without_attention_in_one_call_are_left_out() -> None:
    config = configuration("llama", max_position_embeddings=3000)
    assert longest_rows(model_run("x", ["speed.varlen_attention=false"]), config) == {}
    in_bf16 = longest_rows(model_run("x", ["model.compute_dtype=bf16"]), config)
    assert in_bf16
    assert all(DEVICES[name].has_bf16 for name in in_bf16)
