"""The refusal: before anything is loaded, with the line to paste."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import MakeConfig
from toys import run_script
from transformers import JambaConfig, PretrainedConfig

from halfbyte.config import Run, load_run, model_run
from halfbyte.errors import PlanError, UntraceableError
from halfbyte.plan.catalogue import model_config
from halfbyte.plan.devices import Device, find_device
from halfbyte.plan.gate import check_weights, gate
from halfbyte.plan.memory import Planner, TrainPlan
from halfbyte.plan.shape import Lengths

LENGTHS = Lengths.all_of(512, 16)


def device_with(total_bytes: int) -> Device:
    return replace(find_device("rtx3060"), total_bytes=total_bytes)


def need(run: Run, rows: int, *, checkpointing: bool) -> int:
    """Return the bytes that a device must have for these settings."""
    planner = Planner(run, model_config(run.model.name)[0], find_device("rtx3060"))
    return planner.train(LENGTHS, rows, checkpointing=checkpointing).needed_bytes


def settled(
    run: Run, config: PretrainedConfig, device: Device, lengths: Lengths = LENGTHS
) -> TrainPlan:
    """Return the plan with which the gate lets a run pass."""
    plan = gate(run, config, device, lengths)[1]
    assert plan is not None
    return plan


@pytest.fixture
def run(make_config: MakeConfig) -> Run:
    train = {"batch_size": 16, "micro_batch_size": 16, "checkpointing": "off"}
    return load_run(make_config(model={"compute_dtype": "auto"}, train=train), [])


def test_gate_lets_pass_what_fits(run: Run) -> None:
    config = model_config(run.model.name)[0]
    plan = settled(run, config, find_device("t4"))
    assert plan.needed_bytes < find_device("t4").total_bytes
    assert (plan.micro_batch_size, plan.accumulation, plan.checkpointing) == (16, 1, False)


def test_gate_refuses_with_lines_that_make_it_fit(run: Run) -> None:
    config = model_config(run.model.name)[0]
    device = device_with(need(run, 4, checkpointing=False))
    with pytest.raises(PlanError) as caught:
        gate(run, config, device, LENGTHS)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert "16 rows of 512 tokens at a time, checkpointing off" in message
    assert "\n  train.micro_batch_size=4 train.checkpointing=off " in message
    assert message.endswith("train.ignore_plan=true trains in spite of it")


@pytest.mark.slow
def test_gate_only_warns_when_the_plan_is_to_be_ignored(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    config = model_config(run.model.name)[0]
    ignoring = run.model_copy(update={"train": run.train.model_copy(update={"ignore_plan": True})})
    device = device_with(need(run, 4, checkpointing=False))
    plan = settled(ignoring, config, device)
    assert plan.micro_batch_size == 16
    assert "warning: training would need" in capsys.readouterr().err


@pytest.mark.slow
def test_gate_settles_auto_at_the_same_effective_batch(run: Run) -> None:
    config = model_config(run.model.name)[0]
    auto = {"micro_batch_size": "auto", "checkpointing": "auto"}
    run = run.model_copy(update={"train": run.train.model_copy(update=auto)})
    for rows in (16, 8, 2):
        plan = settled(run, config, device_with(need(run, rows, checkpointing=False)))
        assert (plan.micro_batch_size, plan.checkpointing) == (rows, False)
        assert plan.micro_batch_size * plan.accumulation == 16
    smallest = need(run, 1, checkpointing=False)
    plan = settled(run, config, device_with(smallest - 1))
    assert plan.checkpointing


def test_weights_that_no_setting_makes_fit_are_refused_before_a_download() -> None:
    run = model_run("meta-llama/Llama-3.1-70B", [])
    with pytest.raises(PlanError) as caught:
        check_weights(run, find_device("t4"))
    message = str(caught.value)
    assert "the weights of meta-llama/Llama-3.1-70B take 39.52 GB in nf4" in message
    assert "Models that it can train in 4 bits: microsoft/phi-4 (14.7 B)" in message
    check_weights(run, find_device("h100"))


def test_weights_of_a_local_folder_are_checked_by_its_config(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=16384, num_hidden_layers=200).save_pretrained(tmp_path)
    with pytest.raises(PlanError, match="the weights of "):
        check_weights(model_run(str(tmp_path), []), find_device("rtx3060"))


def test_weights_that_do_not_fit_are_only_a_warning_when_the_plan_is_to_be_ignored(
    capsys: pytest.CaptureFixture[str],
) -> None:
    check_weights(
        model_run("meta-llama/Llama-3.1-70B", ["train.ignore_plan=true"]), find_device("t4")
    )
    warning = capsys.readouterr().err
    assert warning.startswith(
        "warning: the weights of meta-llama/Llama-3.1-70B take 39.52 GB in nf4"
    )
    assert warning.endswith("train.ignore_plan is true: continuing\n")


def test_training_stops_before_it_looks_for_weights_that_cannot_fit(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of a giant's config alone: without the check, the error would be about its missing weights."""
    from transformers import LlamaConfig

    giant = tmp_path / "giant"
    LlamaConfig(
        hidden_size=1 << 17, num_hidden_layers=100, intermediate_size=1 << 19,
        num_attention_heads=128, vocab_size=1000,
    ).save_pretrained(giant)  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        run_script("train/sft.py", make_config(model={"name": str(giant)}))
    assert stop.value.code == 2
    out, error = capsys.readouterr()
    assert error.startswith(f"error: the weights of {giant} take ")
    assert "train.ignore_plan=true trains in spite of it" in error
    assert ".safetensors" not in error
    assert "rows" not in out
    with pytest.raises(SystemExit) as stop:
        run_script(
            "train/sft.py", make_config(model={"name": str(giant)}), "train.ignore_plan=true"
        )
    assert stop.value.code == 1
    assert "holds no .safetensors file" in capsys.readouterr().err


def test_model_that_cannot_be_planned_trains_only_if_the_plan_is_ignored(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Jamba works its kinds of layers out from their number."""
    config = JambaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, num_experts=2, mamba_d_state=8,
    )  # fmt: skip
    with pytest.raises(UntraceableError, match=r"cannot be cut(.|\n)*trains without a plan"):
        gate(run, config, find_device("h100"), LENGTHS)
    ignoring = run.model_copy(update={"train": run.train.model_copy(update={"ignore_plan": True})})
    _, plan = gate(ignoring, config, find_device("h100"), LENGTHS)
    assert plan is None
    assert "training without a plan" in capsys.readouterr().err


def test_scoring_long_held_out_rows_counts(run: Run) -> None:
    config = model_config(run.model.name)[0]
    short, long = Lengths.all_of(16, 16), Lengths.all_of(512, 16)
    alone = gate(run, config, find_device("t4"), short)[1]
    scored = gate(run, config, find_device("t4"), short, long)[1]
    assert alone is not None
    assert scored is not None
    assert scored.when == "evaluation"
    assert scored.peak_bytes > alone.peak_bytes
