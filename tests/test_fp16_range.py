"""fp16 products: a residual stream that fp16 could not hold, and the probe that decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.config import model_run
from halfbyte.config.schema import Adapter, Speed
from halfbyte.data.conversation import Row
from halfbyte.data.encoded import Encoded
from halfbyte.data.prefix_tree import lay_out
from halfbyte.data.samples import Example, Samples
from halfbyte.forward.fp16_range import FP16_MAX, largest_product, settle_half
from halfbyte.forward.fuse import fuse
from halfbyte.forward.packed import add_token_loss
from halfbyte.model.adapter import attach_adapter, trainable_parameters
from halfbyte.model.load import Loaded, load_model
from halfbyte.model.precision import Compute
from halfbyte.model.resolve import resolve_base
from halfbyte.train.settle_dtype import settle_compute

ROWS: list[tuple[list[int], list[int]]] = [
    (row, [-100, *row[1:]])
    for row in ([*range(5, 40), 41, 42], [*range(5, 40), 50, 51, 52], [60, 61, 62, 63])
]

EXAMPLES = Samples.of(
    Example(Row(f"row {number}", (), None), Encoded(f"row {number}", *row))
    for number, row in enumerate(ROWS)
)


def load(folder: Path, dtype: torch.dtype, tmp_path: Path) -> tuple[Loaded, Any]:
    compute = Compute(torch.device("cpu"), dtype, "test")
    loaded = load_model(resolve_base(str(folder)), "nf4", compute=compute)
    model = attach_adapter(loaded, Adapter(r=4), 0, tmp_path)
    torch.manual_seed(1)
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return loaded, model


def grow_embedding(model: Any, factor: float) -> None:
    """A residual stream as large as Gemma's: the norms take it away again before each product."""
    with torch.no_grad():
        weight = model.get_base_model().get_input_embeddings().weight
        weight.copy_((weight.float() * factor).clamp(-60_000, 60_000))


@pytest.fixture(scope="module")
def untied_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma-3 with a head of its own, so that its embedding can grow by itself."""
    from toys import gemma_tokenizer
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    folder, tokenizer = tmp_path_factory.mktemp("untied"), gemma_tokenizer()
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=16,
        tie_word_embeddings=False, bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def outcome(folder: Path, dtype: torch.dtype, tmp_path: Path) -> tuple[float, list[torch.Tensor]]:
    _, model = load(folder, dtype, tmp_path)
    grow_embedding(model, 50_000.0)
    add_token_loss(model.get_base_model())
    fuse(model, Speed())
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model(layout=lay_out(ROWS, share=True))
    (loss * 64).backward()  # as the scaler would
    gradients = [p.grad for p in trainable_parameters(model).values() if p.grad is not None]
    return float(loss.detach()), gradients


def test_fp16_holds_a_residual_stream_beyond_its_range(untied_gemma: Path, tmp_path: Path) -> None:
    exact, wanted = outcome(untied_gemma, torch.float32, tmp_path)
    loss, gradients = outcome(untied_gemma, torch.float16, tmp_path)
    assert loss == pytest.approx(exact, rel=0.01)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    flat, true = (torch.cat([g.flatten() for g in part]) for part in (gradients, wanted))
    assert (flat - true).norm() < 0.05 * true.norm()


def test_probe_keeps_fp16_where_products_are_small(untied_gemma: Path, tmp_path: Path) -> None:
    loaded, model = load(untied_gemma, torch.float16, tmp_path)
    grow_embedding(model, 50_000.0)
    size, name = largest_product(model, ROWS)
    assert 0 < size < 1000
    assert "proj" in name
    assert "residual stream is fp32" in settle_half(loaded, model, ROWS)
    assert loaded.compute.dtype == torch.float16


def test_probe_goes_over_to_fp32_where_products_overflow(
    untied_gemma: Path, tmp_path: Path
) -> None:
    loaded, model = load(untied_gemma, torch.float16, tmp_path)
    with torch.no_grad():
        for layer in model.get_base_model().model.layers:
            layer.pre_feedforward_layernorm.weight.fill_(30_000.0)
    size, _ = largest_product(model, ROWS)
    assert not size <= FP16_MAX
    run = model_run(str(untied_gemma), [])
    settled = settle_compute(run, loaded, model, EXAMPLES)
    assert settled.model.compute_dtype == "fp32"
    assert "no room" in loaded.compute.reason
    add_token_loss(loaded.model)
    assert torch.isfinite(model(layout=lay_out(ROWS, share=True)))


def test_compute_that_is_no_question_is_left_alone(untied_gemma: Path, tmp_path: Path) -> None:
    loaded, model = load(untied_gemma, torch.float16, tmp_path)
    chosen = model_run(str(untied_gemma), ["model.compute_dtype=fp16"])
    assert settle_compute(chosen, loaded, model, EXAMPLES) is chosen
    fp32, other = load(untied_gemma, torch.float32, tmp_path)
    run = model_run(str(untied_gemma), [])
    assert settle_compute(run, fp32, other, EXAMPLES) is run
