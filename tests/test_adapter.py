"""Tests of the adapter: where it sits, what is refused, and that the saved one equals the one in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.config.schema import Adapter
from halfbyte.errors import ModelError, RunError
from halfbyte.model.adapter import (
    adapted_layers,
    attach_adapter,
    load_adapter,
    save_adapter,
    trainable_parameters,
)
from halfbyte.model.load import Loaded, load_model
from halfbyte.model.precision import Compute
from halfbyte.model.resolve import resolve_base

CPU32 = Compute(torch.device("cpu"), torch.float32, "test")
IDS = torch.arange(5, 21)[None]


def load(folder: Path, precision: Any = "nf4") -> Loaded:
    return load_model(resolve_base(str(folder)), precision, compute=CPU32)


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(IDS).logits.float()  # type: ignore[no-any-return]


def disturb(model: Any, seed: int = 0) -> None:
    """Change the trainable weights as training would."""
    torch.manual_seed(seed)
    for parameter in trainable_parameters(model).values():
        parameter.data += 0.05 * torch.randn_like(parameter)


def test_all_linear_adapts_every_linear_layer_but_the_head(
    tiny_llama: Path, tmp_path: Path
) -> None:
    loaded = load(tiny_llama)
    model = attach_adapter(loaded, Adapter(r=4, alpha=8), 0, tmp_path)
    names = set(adapted_layers(model))
    assert len(names) == 14
    assert {name.rpartition(".")[2] for name in names} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert not any("lm_head" in name for name in names)


def test_no_vision_module_is_adapted_on_the_gemma_twin(
    tiny_gemma_vision: Path, tmp_path: Path
) -> None:
    loaded = load(tiny_gemma_vision)
    model = attach_adapter(loaded, Adapter(r=4), 0, tmp_path)
    names = list(adapted_layers(model))
    assert len(names) == 49  # 7 linear layers in each of 7 blocks
    assert not [name for name in names if "vision" in name or "multi_modal" in name]


def test_trainable_weights_follow_the_formula(tiny_llama: Path, tmp_path: Path) -> None:
    model = attach_adapter(
        load(tiny_llama), Adapter(r=4, targets=["q_proj", "down_proj"]), 0, tmp_path
    )
    num_trainable = sum(p.numel() for p in trainable_parameters(model).values())
    assert num_trainable == 2 * 4 * ((64 + 64) + (128 + 64))


def test_misspelt_target_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """PEFT alone would train q_proj without a warning."""
    with pytest.raises(
        ModelError, match=r"'v_prj' matches no linear layer; allowed: all-linear, .*v_proj"
    ):
        attach_adapter(load(tiny_llama), Adapter(targets=["q_proj", "v_prj"]), 0, tmp_path)


def test_loftq_without_cuda_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="loftq, which PEFT computes only on CUDA"):
        attach_adapter(load(tiny_llama), Adapter(r=4, alpha=4, init="loftq"), 0, tmp_path)


@pytest.mark.parametrize(
    ("precision", "settings"),
    [
        ("nf4", {}),
        ("nf4", {"rslora": True}),
        ("nf4", {"dora": True}),
        ("int8", {}),
        ("fp32", {}),
        ("fp32", {"init": "pissa"}),
        ("fp32", {"init": "olora", "rslora": True}),
    ],
)
def test_adapter_from_disk_on_a_fresh_base_is_the_one_in_memory(
    tiny_llama: Path, tmp_path: Path, precision: Any, settings: dict[str, Any]
) -> None:
    """This holds for initialisations that change the base, too: they are saved against the published one."""
    loaded = load(tiny_llama, precision)
    model = attach_adapter(loaded, Adapter(r=4, alpha=8, **settings), 0, tmp_path)
    disturb(model)
    wanted = logits(model)
    save_adapter(model, loaded, tmp_path / "adapter", tmp_path)
    fresh = load(tiny_llama, precision)
    plain = logits(fresh.model)
    reloaded = logits(load_adapter(fresh, tmp_path / "adapter"))
    torch.testing.assert_close(reloaded, wanted, rtol=1e-4, atol=1e-5)
    assert (reloaded - plain).abs().max() > 1e-3


def test_disabled_adapter_is_the_base_bit_for_bit(tiny_llama: Path, tmp_path: Path) -> None:
    loaded = load(tiny_llama)
    plain = logits(loaded.model)
    model = attach_adapter(loaded, Adapter(r=4), 0, tmp_path)
    disturb(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


@pytest.fixture
def saved(tiny_llama: Path, tmp_path: Path) -> Path:
    loaded = load(tiny_llama)
    model = attach_adapter(loaded, Adapter(r=4), 0, tmp_path)
    disturb(model)
    save_adapter(model, loaded, tmp_path / "adapter", tmp_path)
    return tmp_path / "adapter"


def test_adapter_on_another_base_is_refused(saved: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """The shapes fit; PEFT alone would load it without a warning."""
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        RunError, match=r"was trained on the base .*tiny-llama.*, and .*other.* is here now"
    ):
        load_adapter(load(other), saved)


def test_adapter_with_renamed_or_missing_weights_is_refused(saved: Path, tiny_llama: Path) -> None:
    """PEFT alone only warns, and the model is the plain base."""
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name.replace("layers.0", "layers.9"): t for name, t in tensors.items()}, path)
    with pytest.raises(RunError, match=r"28 adapter weights do not fit the model"):
        load_adapter(load(tiny_llama), saved)


def test_adapter_that_changes_nothing_is_refused(saved: Path, tiny_llama: Path) -> None:
    path = saved / "adapter_model.safetensors"
    save_file({n: t * 0 if "lora_B" in n else t for n, t in load_file(path).items()}, path)
    with pytest.raises(RunError, match="changes nothing: every B matrix is zero"):
        load_adapter(load(tiny_llama), saved)


def test_adapter_with_nan_is_not_saved(tiny_llama: Path, tmp_path: Path) -> None:
    loaded = load(tiny_llama)
    model = attach_adapter(loaded, Adapter(r=4), 0, tmp_path)
    next(iter(trainable_parameters(model).values())).data[0, 0] = float("nan")
    with pytest.raises(RunError, match="1 tensors hold NaN or infinity"):
        save_adapter(model, loaded, tmp_path / "adapter", tmp_path)
    assert not (tmp_path / "adapter").exists()


def test_saved_adapter_names_its_base(saved: Path, tiny_llama: Path) -> None:
    base = json.loads((saved / "base.json").read_text())
    assert base["fingerprint"] == resolve_base(str(tiny_llama)).fingerprint
    assert base["precision"] == "nf4"
    assert base["model_class"] == "LlamaForCausalLM"


def test_saved_adapter_names_no_path_on_this_disk(saved: Path, tiny_llama: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == resolve_base(str(tiny_llama)).name
    assert "path" not in json.loads((saved / "base.json").read_text())
    assert not (saved / "README.md").exists()
