"""The traced step: a few layers stand for all exactly, and what is counted is what the libraries do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from halfbyte.config.schema import Adapter, Model, Speed
from halfbyte.errors import ModelError
from halfbyte.forward.loss import BLOCK_BYTES
from halfbyte.forward.recompute import recompute_first
from halfbyte.model.adapter import attach_adapter, trainable_parameters
from halfbyte.model.load import load_config, load_model
from halfbyte.model.precision import Compute
from halfbyte.model.resolve import resolve_base
from halfbyte.plan import recompute
from halfbyte.plan.layer_cut import Cut
from halfbyte.plan.phases import ACTIVATIONS, BACKWARD_END, FORWARD, GRADIENTS, HEAD, LOGITS, PHASES
from halfbyte.plan.shape import StepShape
from halfbyte.plan.step import TracedStep

SMALL: dict[str, Any] = {
    "vocab_size": 480,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA = {"model_type": "llama"}
GEMMA = {
    "model_type": "gemma3_text",
    "head_dim": 16,
    "sliding_window": 16,
    "num_hidden_layers": 6,
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
    capability: tuple[int, int] | None = None,
    attention: Any = "sdpa",
    speed: Speed | None = None,
) -> TracedStep:
    model = Model(name="x", precision=precision, attention=attention)
    return TracedStep(config, model, adapter or Adapter(r=4), speed or Speed(), dtype, capability)


def shape(rows: int = 2, *, checkpointing: bool = False, accumulates: bool = False) -> StepShape:
    return StepShape((LENGTH,) * rows, 0, rows * 10, checkpointing, accumulates)


def sizes(step: TracedStep, one: StepShape) -> dict[str, int]:
    return {phase: peak.total_bytes for phase, peak in step.peaks(one).items()}


@pytest.fixture(scope="module")
def llama() -> TracedStep:
    return make_step(configuration(LLAMA))


@pytest.fixture(scope="module")
def gemma() -> TracedStep:
    return make_step(configuration(GEMMA))


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        (LLAMA, {}),
        pytest.param(GEMMA, {}, marks=pytest.mark.slow),
    ],
    ids=["llama", "gemma"],
)
def test_cut_model_counts_as_the_whole_one(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], options: dict[str, Any]
) -> None:
    config = configuration(fields)
    step = make_step(config, **options)
    monkeypatch.setattr("halfbyte.plan.step.cut", lambda kinds: Cut(tuple(range(len(kinds))), ()))
    whole = make_step(config, **options)
    assert len(step.cut.layers) < config.num_hidden_layers == len(whole.cut.base)
    assert step.num_trainable == whole.num_trainable
    for checkpointing, accumulates in ((True, False), (False, True)):
        one = shape(8, checkpointing=checkpointing, accumulates=accumulates)
        ours, theirs = step.peaks(one), whole.peaks(one)
        assert sizes(step, one) == sizes(whole, one)
        assert {p: +peak.terms for p, peak in ours.items()} == {
            p: +peak.terms for p, peak in theirs.items()
        }
        assert step.kept(one) == whole.kept(one)
    assert step.evaluation(one).total_bytes == whole.evaluation(one).total_bytes
    assert step.cache(LENGTH) == whole.cache(LENGTH)


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        pytest.param(LLAMA, 1, id="llama-1"),
        pytest.param(LLAMA, 8, id="llama-8", marks=pytest.mark.slow),
        pytest.param(GEMMA, 1, id="gemma-1", marks=pytest.mark.slow),
        pytest.param(GEMMA, 8, id="gemma-8", marks=pytest.mark.slow),
    ],
)
def test_plan_of_first_layers_recomputed_is_never_too_low(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], rows: int
) -> None:
    """Beside a trace of every layer, the first ones of them recomputed."""
    config = configuration(fields)
    step = make_step(config)
    monkeypatch.setattr("halfbyte.plan.step.cut", lambda kinds: Cut(tuple(range(len(kinds))), ()))
    before = sum(sizes(step, shape(rows)).values())
    for num_layers in range(1, config.num_hidden_layers):
        whole = make_step(config)
        recompute_first(whole.model, num_layers)
        on = shape(rows, checkpointing=True)
        some = replace(on, recompute=num_layers)
        found = {phase: peak.total_bytes for phase, peak in recompute.peaks(step, some).items()}
        real = max(sizes(whole, on).values())
        assert real <= max(found.values()) <= 1.1 * real
        assert recompute.kept(step, some) == pytest.approx(whole.kept(on), rel=0.01)
        assert sum(found.values()) <= before
        before = sum(found.values())


def test_trace_leaves_nothing_behind_for_the_next_one() -> None:
    """Hooks, gradients, recomputation and the evaluation mode are gone when a trace ends."""
    shapes = [shape(checkpointing=True, accumulates=True), shape()]
    dropping = Adapter(r=4, dropout=0.1)
    step = make_step(configuration(LLAMA), dropping)
    step.cache(LENGTH)
    step.evaluation(shapes[1])
    found = [sizes(step, one) for one in shapes]
    assert found == [sizes(make_step(configuration(LLAMA), dropping), one) for one in shapes]
    assert [sizes(step, one) for one in shapes] == found
    assert all(p.grad is None for p in step.adapted.parameters())


def test_gradients_of_an_earlier_pass_are_there_from_the_start(llama: TracedStep) -> None:
    gradients = 4 * llama.num_trainable
    for checkpointing in (False, True):
        later = llama.peaks(shape(checkpointing=checkpointing, accumulates=True))
        first = llama.peaks(shape(checkpointing=checkpointing))
        assert {peak.terms[GRADIENTS] for peak in later.values()} == {gradients}
        assert first[FORWARD].terms[GRADIENTS] == first[HEAD].terms[GRADIENTS] == 0
        for phase in (FORWARD, HEAD):
            assert later[phase].total_bytes == first[phase].total_bytes + gradients
        kept = llama.kept(shape(checkpointing=checkpointing))
        assert llama.kept(shape(checkpointing=checkpointing, accumulates=True)) == kept
        # What ends the backward pass has all gradients but those of the first layer.
        share = first[BACKWARD_END].terms[GRADIENTS] / gradients
        assert 3 / 4 <= share < 1


def test_head_that_is_given_fp16_of_an_fp32_residual_is_plain() -> None:
    half = make_step(configuration(GEMMA), dtype=torch.float16, capability=(7, 5))
    assert half.tiled


def test_recomputation_keeps_one_state_a_layer(gemma: TracedStep) -> None:
    state = 2 * (LENGTH - 1) * 64 * 4  # the last token of a row is not read
    layers = gemma.kept_per_layer(shape(checkpointing=True))
    assert [(name.split("_")[0], count, kept) for name, count, kept in layers] == [
        ("sliding", 4, state),
        ("full", 2, state),
    ]
    everything = gemma.kept_per_layer(shape())
    assert all(kept > 10 * state for _, _, kept in everything)
    off, on = sizes(gemma, shape()), sizes(gemma, shape(checkpointing=True))
    assert max(on.values()) < max(off.values())


def test_dropout_of_the_adapter_keeps_its_masks(llama: TracedStep) -> None:
    """For each adapted layer the dropped-out input, and a mask of a byte for each number of it."""
    dropping = make_step(configuration(LLAMA), Adapter(r=4, dropout=0.1)).kept(shape())
    peft = make_step(configuration(LLAMA), speed=Speed(fused_lora=False)).kept(shape())
    inputs = 2 * LENGTH * (64 * 6 + 128) * 4  # q, k, v, o, gate, up; down; layers
    assert dropping - peft == pytest.approx(inputs * (4 + 1), rel=0.2)
    assert llama.kept(shape()) < peft


def test_loss_head_holds_a_few_blocks_of_logits_however_many_are_labelled() -> None:
    config = configuration(LLAMA | {"vocab_size": 1 << 17})
    step = make_step(config)
    block = BLOCK_BYTES["cpu"]
    found = [
        step.peaks(StepShape((LENGTH,) * 4, 0, num, False, False))[HEAD].terms[LOGITS]
        for num in (100, 1000, 10_000)
    ]
    states = 4 * 64 * 10_000  # the predicting states in fp32, their gradients, their head's rows
    assert all(block <= most < 1.1 * block + 8 * states for most in found)
    on_card = make_step(config, capability=(7, 5)).peaks(
        StepShape((LENGTH,) * 4, 0, 1000, False, False)
    )
    assert (
        # Logits, and beside them their exponentials.
        2 * BLOCK_BYTES["cuda"]
        <= on_card[HEAD].terms[LOGITS]
        < 2.1 * BLOCK_BYTES["cuda"] + 8 * states
    )


@pytest.mark.parametrize("fields", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_cache_is_what_transformers_keeps(fields: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    config = configuration(fields)
    model, step = AutoModelForCausalLM.from_config(config), make_step(config, precision="fp32")
    for context in (12, LENGTH):
        ids = torch.zeros((1, context), dtype=torch.long)
        layers = model(ids, use_cache=True).past_key_values.layers
        real = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        found, beside = step.cache(context)
        assert found == pytest.approx(real, abs=64)  # and where a window stands
        assert beside > 0


@pytest.mark.slow
def test_attention_without_flash_kernels_holds_all_scores(llama: TracedStep) -> None:
    """Grouped heads in fp32 on CUDA; on the CPU and in 16 bits on Ampere nobody holds them."""
    scores = 4 * 2 * 4 * LENGTH * LENGTH  # layers, rows, heads
    config = configuration(LLAMA)
    padded = Speed(no_padding=False, share_prefixes=False)
    half: dict[str, Any] = {"dtype": torch.bfloat16, "speed": padded}
    on_cpu = make_step(config, speed=padded).kept(shape())
    assert make_step(config, capability=(7, 5), speed=padded).kept(shape()) - on_cpu >= 4 * scores
    assert make_step(config, attention="eager").kept(shape()) - on_cpu >= 4 * scores
    # Laid out as a tree, keys are copied to each head instead, and no kernel holds scores.
    long = StepShape((8 * LENGTH,) * 2, 0, 20, False, False)
    kept = make_step(config, capability=(7, 5)).kept(long)
    assert kept < make_step(config, capability=(7, 5), speed=padded).kept(long) / 2
    turing = make_step(config, **half, capability=(7, 5)).kept(shape())
    ampere = make_step(config, **half, capability=(8, 0)).kept(shape())
    assert turing - ampere >= 2 * scores
    alone = configuration(LLAMA | {"num_key_value_heads": 4})
    assert make_step(alone, **half, capability=(7, 5)).kept(shape()) < ampere + scores


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
def test_mixture_of_experts_is_traced(fields: dict[str, Any]) -> None:
    step = make_step(configuration(fields), dtype=torch.bfloat16)
    for checkpointing in (False, True):
        peaks = step.peaks(shape(checkpointing=checkpointing))
        assert list(peaks) == list(PHASES)
        assert all(peak.total_bytes > 0 for peak in peaks.values())
        assert peaks[FORWARD].terms[ACTIVATIONS] > 0
    experts = [n for n, _ in trainable_parameters(step.adapted).items() if "experts" in n]
    assert experts


def test_model_that_cannot_be_traced_is_a_user_error() -> None:
    with pytest.raises(ModelError, match=r"Gemma2ForCausalLM .*model\.attention=auto"):
        make_step(configuration({"model_type": "gemma2", "head_dim": 16})).peaks(shape())
    with pytest.raises(ModelError, match="MptForCausalLM"):
        make_step(configuration({"model_type": "mpt"})).peaks(shape())
    heads = {"num_heads": 8, "head_dim": 16, "model_type": "mamba2"}
    with pytest.raises(ModelError, match="Mamba2ForCausalLM"):
        make_step(configuration(heads), Adapter(r=4, targets=["in_proj"])).cache(LENGTH)


@pytest.mark.slow
def test_longer_rows_and_more_of_them_take_more(llama: TracedStep) -> None:
    for checkpointing in (False, True):
        peaks = [
            max(sizes(llama, StepShape((length,) * rows, 0, rows, checkpointing, False)).values())
            for rows, length in ((2, LENGTH // 2), (2, LENGTH), (4, LENGTH))
        ]
        assert peaks == sorted(peaks)
        assert len(set(peaks)) == 3
