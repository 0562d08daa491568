"""The traced step: a few layers stand for all exactly, and what is counted is what the libraries do."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from halfbyte.config.schema import Adapter, Model
from halfbyte.errors import ModelError
from halfbyte.model.adapter import attach_adapter, trainable_parameters
from halfbyte.model.load import load_config, load_model
from halfbyte.model.precision import Compute
from halfbyte.model.resolve import resolve_base
from halfbyte.plan import skeleton
from halfbyte.plan.step import ACTIVATIONS, FORWARD, GRADIENTS, HEAD, LOGITS, PHASES, Shape, Step

SMALL: dict[str, Any] = {
    "vocab_size": 480,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA = {"model_type": "llama"}
GEMMA = {
    "model_type": "gemma3_text",
    "head_dim": 16,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}
QWEN_MOE = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "head_dim": 16,
}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4}
LENGTH = 40  # more than a sliding window


def configuration(fields: dict[str, Any]) -> PretrainedConfig:
    values = SMALL | fields
    config: PretrainedConfig = AutoConfig.for_model(values.pop("model_type"), **values)
    return config


def make_step(
    config: PretrainedConfig,
    adapter: Adapter | None = None,
    *,
    precision: Any = "nf4",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    flash: bool = False,
    attention: Any = "sdpa",
) -> Step:
    model = Model(name="x", precision=precision, attention=attention)
    return Step(config, model, adapter or Adapter(r=4), dtype, device, flash)


def shape(rows: int = 2, *, checkpointing: bool = False, accumulates: bool = False) -> Shape:
    return Shape(rows, LENGTH, rows * 10, checkpointing, accumulates)


def sizes(step: Step, one: Shape) -> dict[str, int]:
    return {phase: peak.total_bytes for phase, peak in step.peaks(one).items()}


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        (LLAMA, {}),
        (LLAMA, {"precision": "fp32", "device": "cuda"}),
        (GEMMA, {}),
        (GEMMA, {"dtype": torch.bfloat16, "device": "cuda", "flash": True}),
        (QWEN_MOE | {"mlp_only_layers": [0]}, {}),
    ],
    ids=["llama", "llama-t4", "gemma", "gemma-bf16", "moe"],
)
def test_cut_model_counts_as_the_whole_one(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], options: dict[str, Any]
) -> None:
    config = configuration(fields)
    step = make_step(config, **options)
    monkeypatch.setattr(skeleton, "MAX_KINDS", 0)
    whole = make_step(config, **options)
    assert len(step.cut.layers) < 6 == len(whole.cut.base)
    assert step.num_trainable == whole.num_trainable
    for checkpointing, accumulates in itertools.product((False, True), repeat=2):
        one = shape(checkpointing=checkpointing, accumulates=accumulates)
        ours, theirs = step.peaks(one), whole.peaks(one)
        assert {p: +peak.terms for p, peak in ours.items()} == {
            p: +peak.terms for p, peak in theirs.items()
        }
        assert {p: peak.total_bytes for p, peak in ours.items()} == sizes(whole, one)
        assert step.kept(one) == whole.kept(one)
    assert step.evaluation(one).total_bytes == whole.evaluation(one).total_bytes
    assert step.cache(LENGTH) == whole.cache(LENGTH)


def test_trace_leaves_nothing_behind_for_the_next_one() -> None:
    """Hooks, gradients, recomputation and the evaluation mode are gone when a trace ends."""
    shapes = [
        shape(checkpointing=checkpointing, accumulates=accumulates)
        for checkpointing, accumulates in itertools.product((True, False), repeat=2)
    ]
    step = make_step(configuration(LLAMA), Adapter(r=4, dropout=0.1))
    step.evaluation(shapes[0])
    step.cache(LENGTH)
    found = [sizes(step, one) for one in shapes]
    fresh = [sizes(make_step(configuration(LLAMA), Adapter(r=4, dropout=0.1)), s) for s in shapes]
    assert found == fresh
    assert [sizes(step, one) for one in shapes] == found
    assert all(p.grad is None for p in step.adapted.parameters())


def test_gradients_of_an_earlier_pass_are_there_from_the_start() -> None:
    step = make_step(configuration(LLAMA))
    gradients = 4 * step.num_trainable
    for checkpointing in (False, True):
        later = step.peaks(shape(checkpointing=checkpointing, accumulates=True))
        first = step.peaks(shape(checkpointing=checkpointing))
        assert {peak.terms[GRADIENTS] for peak in later.values()} == {gradients}
        assert first[FORWARD].terms[GRADIENTS] == first[HEAD].terms[GRADIENTS] == 0
        for phase in (FORWARD, HEAD):
            assert later[phase].total_bytes == first[phase].total_bytes + gradients
        kept = step.kept(shape(checkpointing=checkpointing))
        assert step.kept(shape(checkpointing=checkpointing, accumulates=True)) == kept


def test_recomputation_keeps_one_state_a_layer() -> None:
    step = make_step(configuration(GEMMA))
    state = 2 * LENGTH * 64 * 4
    layers = step.kept_per_layer(shape(checkpointing=True))
    assert [(name.split("_")[0], count, kept) for name, count, kept in layers] == [
        ("sliding", 4, state),
        ("full", 2, state),
    ]
    everything = step.kept_per_layer(shape())
    assert all(kept > 10 * state for _, _, kept in everything)
    off, on = sizes(step, shape()), sizes(step, shape(checkpointing=True))
    assert max(on.values()) < max(off.values())


def test_dropout_of_the_adapter_keeps_its_masks() -> None:
    """For each adapted layer the dropped-out input, and the mask that says where."""
    plain = make_step(configuration(LLAMA)).kept(shape())
    dropping = make_step(configuration(LLAMA), Adapter(r=4, dropout=0.1)).kept(shape())
    inputs = 2 * LENGTH * (64 * 6 + 128) * 6  # q, k, v, o, gate, up; down; layers
    assert dropping - plain == pytest.approx(inputs * (4 + 1), rel=0.2)


def test_loss_head_holds_labelled_positions_and_two_tiles_at_most() -> None:
    step = make_step(configuration(LLAMA))
    peaks = [
        step.peaks(Shape(64, LENGTH, num, False, False))[HEAD].terms[LOGITS] for num in (32, 64)
    ]
    # fp32: positions picked from the states, and their gradients; logits, and their softmax
    assert peaks[1] - peaks[0] == pytest.approx(32 * 4 * (64 * 2 + 480 * 2), rel=0.3)
    big = make_step(configuration(LLAMA | {"vocab_size": 1 << 17}))
    tile = 48 * (1 << 17) * 4  # 24 MiB
    for num in (48, 96, 480):
        most = big.peaks(Shape(64, LENGTH, num, False, False))[HEAD].terms[LOGITS]
        assert tile < most < 3 * tile


@pytest.mark.parametrize("fields", [LLAMA, GEMMA], ids=["llama", "gemma"])
@pytest.mark.parametrize("context", [12, LENGTH])
def test_cache_is_what_transformers_keeps(fields: dict[str, Any], context: int) -> None:
    from transformers import AutoModelForCausalLM

    config = configuration(fields)
    cached = AutoModelForCausalLM.from_config(config)(
        torch.zeros((1, context), dtype=torch.long), use_cache=True
    ).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cached.layers)
    found, beside = make_step(config, precision="fp32").cache(context)
    assert found == pytest.approx(real, abs=64)  # and where a window stands
    assert beside > 0


def test_attention_without_flash_kernels_holds_all_scores() -> None:
    """Grouped heads in fp32 on CUDA; on the CPU and in 16 bits on Ampere nobody holds them."""
    scores = 2 * 4 * LENGTH * LENGTH * 4  # rows, heads, fp32
    config = configuration(LLAMA)
    kept = {
        "t4": make_step(config, device="cuda").kept(shape()),
        "cpu": make_step(config).kept(shape()),
        "eager": make_step(config, attention="eager").kept(shape()),
    }
    assert kept["t4"] - kept["cpu"] >= 6 * scores
    assert kept["eager"] - kept["cpu"] >= 6 * scores
    half = {"dtype": torch.bfloat16, "device": "cuda"}
    turing = make_step(config, **half).kept(shape())
    ampere = make_step(config, **half, flash=True).kept(shape())
    assert turing - ampere >= 6 * scores // 2
    alone = configuration(LLAMA | {"num_key_value_heads": 4})
    cards = [make_step(alone, **half, flash=flash).kept(shape()) for flash in (False, True)]
    assert cards[0] == cards[1]


@pytest.mark.parametrize(
    "adapter",
    [
        Adapter(r=4),
        Adapter(r=8, dora=True),
        Adapter(r=2, targets=["q_proj", "v_proj"], rslora=True),
        Adapter(r=4, init="loftq"),
    ],
    ids=["plain", "dora", "targets", "loftq"],
)
def test_trainable_weights_are_those_of_a_real_adapter(
    tiny_llama: Path, tmp_path: Path, adapter: Adapter
) -> None:
    base = resolve_base(str(tiny_llama))
    compute = Compute(torch.device("cpu"), torch.float32, "test")
    plain = adapter.model_copy(update={"init": "default"})
    real = attach_adapter(load_model(base, "nf4", compute=compute), plain, 0, tmp_path)
    step = make_step(load_config(base), adapter)
    shapes = sorted(tuple(p.shape) for p in trainable_parameters(real).values())
    assert step.num_trainable == sum(p.numel() for p in trainable_parameters(real).values())
    assert sorted(tuple(p.shape) for p in trainable_parameters(step.adapted).values()) == shapes
    largest = step.over_trainable(lambda p: p.shape[0])
    assert largest == sum(one[0] for one in shapes)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("fields", [QWEN_MOE, MIXTRAL], ids=["qwen3", "mixtral"])
@pytest.mark.parametrize("precision", ["nf4", "bf16"])
def test_mixture_of_experts_is_traced(fields: dict[str, Any], precision: str) -> None:
    step = make_step(configuration(fields), precision=precision, dtype=torch.bfloat16)
    for checkpointing in (False, True):
        peaks = step.peaks(shape(checkpointing=checkpointing))
        assert list(peaks) == list(PHASES)
        assert all(peak.total_bytes > 0 for peak in peaks.values())
        assert peaks[FORWARD].terms[ACTIVATIONS] > 0
    experts = [n for n, _ in trainable_parameters(step.adapted).items() if "experts" in n]
    assert experts


def test_model_that_cannot_be_traced_is_a_user_error() -> None:
    step = make_step(configuration({"model_type": "gemma2", "head_dim": 16}))
    for ask in (step.peaks, step.evaluation):
        with pytest.raises(ModelError, match=r"Gemma2ForCausalLM cannot be traced.*eager"):
            ask(shape())
    step = make_step(configuration({"model_type": "mpt"}))
    with pytest.raises(ModelError, match="MptForCausalLM cannot be traced"):
        step.peaks(shape())
    heads = {"num_heads": 8, "head_dim": 16, "model_type": "mamba2"}
    step = make_step(configuration(heads), Adapter(r=4, targets=["in_proj"]))
    with pytest.raises(ModelError, match="the prefill of Mamba2ForCausalLM cannot be traced"):
        step.cache(LENGTH)


def test_longer_rows_and_more_of_them_take_more() -> None:
    step = make_step(configuration(GEMMA))
    for checkpointing in (False, True):
        peaks = [
            max(sizes(step, Shape(rows, length, rows, checkpointing, False)).values())
            for rows, length in ((1, 10), (1, LENGTH), (2, LENGTH), (4, LENGTH))
        ]
        assert peaks == sorted(peaks)
        assert len(set(peaks)) == 4
