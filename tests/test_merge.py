"""The merge: equal to PEFT's in fp32, measured after reloading, refused where it is not the trained model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_adapter import disturb, load, logits
from toys import run_script

from halfbyte.config.schema import Adapter
from halfbyte.errors import RunError
from halfbyte.model.adapter import attach_adapter, load_adapter, save_adapter
from halfbyte.model.quantised import compute_in, dequantised_weight
from halfbyte.ship import measured_run, merge_math
from halfbyte.ship.merge_math import Update, merged_tensors, read_updates, write_shards
from halfbyte.trained.fidelity import fidelity, reference, torch_predict


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to write into."""
    copy = tmp_path / "run"
    shutil.copytree(trained_run, copy)
    return copy


def report_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "merged" / "merge_report.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "settings",
    [{}, {"rslora": True}, {"dora": True}, {"init": "pissa"}, {"init": "olora", "rslora": True}],
)
def test_fold_equals_peft_s_merge_in_fp32(
    tiny_llama: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    loaded = load(tiny_llama, "fp32")
    model = attach_adapter(loaded, Adapter(r=4, alpha=8, **settings), 0, tmp_path)
    disturb(model)
    wanted_logits = logits(model)
    save_adapter(model, loaded, tmp_path / "adapter", tmp_path)
    wanted = model.merge_and_unload(safe_merge=True).state_dict()
    fresh = load(tiny_llama, "fp32").model
    updates = read_updates(tmp_path / "adapter")
    assert len(updates) == 14
    found = dict(merged_tensors(fresh, updates, torch.float32))
    assert set(found) == set(wanted) - {"lm_head.weight"}  # tied: once
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5)
    fresh.load_state_dict(found, strict=False)
    torch.testing.assert_close(logits(fresh), wanted_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"dora": True}])
def test_merge_into_the_dequantised_base_is_the_trained_model(
    tiny_llama: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    loaded = load(tiny_llama, "nf4")
    model = attach_adapter(loaded, Adapter(r=4, alpha=8, **settings), 0, tmp_path)
    disturb(model)
    save_adapter(model, loaded, tmp_path / "adapter", tmp_path)
    wanted = logits(model)
    tensors = dict(
        merged_tensors(model.get_base_model(), read_updates(tmp_path / "adapter"), torch.float32)
    )
    plain = load(tiny_llama, "fp32").model
    plain.load_state_dict(tensors, strict=False)
    torch.testing.assert_close(logits(plain), wanted, rtol=1e-4, atol=1e-4)


def test_update_without_a_layer_is_refused(tiny_llama: Path) -> None:
    update = Update(torch.zeros(2, 64), torch.zeros(64, 2), 1.0)
    with pytest.raises(
        RunError, match=r"1 adapted layers are not in the base: \['model\.layers\.9"
    ):
        list(
            merged_tensors(
                load(tiny_llama, "fp32").model, {"model.layers.9.q_proj": update}, torch.float32
            )
        )


def test_overflow_of_the_storage_dtype_is_refused(tiny_llama: Path) -> None:
    model = load(tiny_llama, "fp32").model
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    with pytest.raises(
        RunError, match=r"layers\.0\.mlp\.up_proj\.weight: NaN or infinity .*float16"
    ):
        list(merged_tensors(model, {}, torch.float16))


def test_shards_reload_as_one_model(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_math, "SHARD_BYTES", 60_000)
    model = load(tiny_llama, "fp32").model
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    total = write_shards(folder, merged_tensors(model, {}, torch.float32))
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert total == sum(t.nbytes for file in files for t in load_file(file).values())
    assert torch.equal(logits(load(folder, "fp32").model), logits(model))


def test_adapter_kinds_that_are_not_covered_are_refused(trained_run: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(trained_run / "adapter", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"modules_to_save": ["lm_head"]})
    )
    with pytest.raises(RunError, match="modules_to_save, which halfbyte does not merge"):
        read_updates(adapter)


def test_fidelity_of_a_copy_is_exact_and_of_another_model_is_not(tiny_llama: Path) -> None:
    rows = [(list(range(5, 25)), [-100] * 10 + list(range(15, 25))), ([5, 6, 7], [-100, 6, 7])]
    model = load(tiny_llama, "fp32").model
    told = reference(torch_predict(model, 2), rows, model.config.vocab_size)
    same = fidelity(torch_predict(load(tiny_llama, "fp32").model, 2), rows, told)
    assert same.kl_nats_per_token == pytest.approx(0, abs=1e-9)
    assert same.top1_agreement == 1
    assert same.num_positions == 19 + 2
    assert same.loss == pytest.approx(told.loss)
    other = load(tiny_llama, "nf4").model
    apart = fidelity(torch_predict(other, 2), rows, told)
    probabilities = torch.cat([torch.log_softmax(logits_of(other, ids), -1) for ids, _ in rows])
    exact = (told.log_probs.exp() * (told.log_probs - probabilities)).sum(-1).mean()
    assert apart.kl_nats_per_token == pytest.approx(float(exact), rel=1e-3)
    assert apart.kl_nats_per_token > 1e-6


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, :-1].float()  # type: ignore[no-any-return]


def test_compute_dtype_of_training_does_not_change_the_dequantised_weights(
    tiny_llama: Path,
) -> None:
    model = load(tiny_llama, "nf4").model
    layer = model.model.layers[0].mlp.up_proj
    before = dequantised_weight(layer)
    compute_in(model, torch.bfloat16)
    assert torch.equal(dequantised_weight(layer), before)


def test_merge_keeps_the_closer_base_and_reports_both(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_script("train/merge.py", run)
    report = report_of(run)
    assert {candidate["base"] for candidate in report["candidates"]} == {"full", "dequantised"}
    assert report["kept"]["base"] == "dequantised"
    assert report["kept"]["kl_nats_per_token"] < 1e-6
    assert report["kept"]["top1_agreement"] >= 0.99
    assert report["measured"]["reloaded_from_disk"] is True
    names = {path.name for path in (run / "merged").iterdir()}
    assert names >= {
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    assert not list(run.glob(".merging-*"))
    settings = json.loads((run / "merged" / "generation_config.json").read_text())
    assert settings["eos_token_id"] in (2, [2])
    card = (run / "merged" / "README.md").read_text()
    assert f"{report['kept']['kl_nats_per_token']:.2e}" in card
    assert "kept the dequantised base" in capsys.readouterr().out


def test_merge_of_the_base_that_is_asked_for(run: Path) -> None:
    run_script("train/merge.py", run, "merge.base=full", "merge.max_kl=10", "merge.min_top1=0.01")
    assert report_of(run)["kept"]["base"] == "full"
    run_script("train/merge.py", run, "merge.dtype=fp16", "merge.min_top1=0.9")
    kept = report_of(run)["kept"]
    assert (kept["base"], kept["dtype"]) == ("dequantised", "fp16")


def test_unfaithful_merge_keeps_nothing_and_shows_the_figures(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_script("train/merge.py", run, "merge.base=full", "merge.max_kl=1e-9")
    assert stop.value.code == 1
    text = capsys.readouterr().err
    assert "the merged model is not the trained one" in text
    assert "KL 1e-09" in text
    assert not (run / "merged").exists()
    assert not list(run.glob(".merging-*"))


def test_merge_of_an_untrained_run_names_the_command(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "adapter")
    with pytest.raises(SystemExit):
        run_script("train/merge.py", run)
    assert "halfbyte train" in capsys.readouterr().err


def test_an_adapter_that_predicts_otherwise_than_when_it_was_trained_is_not_merged(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files are those that were written, and what a library makes of them is not."""

    def half(*arguments: Any) -> Any:
        model = load_adapter(*arguments)
        for layer in model.modules():
            scaling = getattr(layer, "scaling", None)
            if isinstance(scaling, dict):
                scaling.update({name: value / 2 for name, value in scaling.items()})
        return model

    monkeypatch.setattr(measured_run, "load_adapter", half)
    with pytest.raises(SystemExit):
        run_script("train/merge.py", run)
    assert "what is loaded is not the adapter that was trained" in capsys.readouterr().err
    assert not (run / "merged").exists()
