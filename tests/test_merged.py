"""A merge is not rounded back to the base it came from: shown on its weights, then refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toys import make_merge_report, run_script, write_config

from halfbyte.config import model_run
from halfbyte.config.section import Precision
from halfbyte.errors import ModelError
from halfbyte.model import load
from halfbyte.model.load import load_at_precision, load_model
from halfbyte.model.merged import grids_of, keeps_training
from halfbyte.model.precision import Compute
from halfbyte.model.resolve import resolve_base
from halfbyte.plan.advice import _stronger_changes
from halfbyte.plan.devices import DEVICES
from halfbyte.run_dir import read_json, write_json
from halfbyte.serve.targets import ServeTarget
from halfbyte.serve.vllm import vllm_command

CPU32 = Compute(torch.device("cpu"), torch.float32, "asked")
TAKES_BACK = "nf4 would round it back"


@pytest.fixture
def merged(merged_run: Path) -> Path:
    folder = merged_run / "merged"
    assert read_json(folder / "merge_report.json")["kept"]["base"] == "dequantised"
    return folder


def test_nf4_of_a_merge_is_nf4_of_its_base(merged: Path, small_base: Path) -> None:
    """The reason for the refusal: rounding finds the values of the untrained base again."""

    def loaded(folder: Path, precision: Precision) -> Any:
        model = load_model(resolve_base(str(folder)), precision, compute=CPU32).model
        return model.get_submodule("model.layers.0.mlp.up_proj")

    base, plain, rounded = (
        loaded(small_base, "nf4"),
        loaded(merged, "fp32"),
        loaded(merged, "nf4"),
    )
    from bitsandbytes.functional import dequantize_4bit

    before, after = (
        dequantize_4bit(layer.weight.data, layer.weight.quant_state) for layer in (base, rounded)
    )
    trained = (plain.weight - before).norm()
    assert trained > 0
    assert (base.weight.data == rounded.weight.data).float().mean() > 0.99
    assert (after - before).norm() < 0.5 * trained


@pytest.mark.parametrize(
    ("kept", "trained", "precision", "keeps"),
    [
        ("dequantised", "nf4", "nf4", False),
        ("dequantised", "nf4", "fp4", False),
        ("dequantised", "nf4", "int8", True),
        ("dequantised", "nf4", "bf16", True),
        ("dequantised", "int8", "int8", False),
        ("dequantised", "int8", "nf4", True),
        ("full", "nf4", "nf4", True),
    ],
)
def test_which_precisions_keep_a_merge(
    tmp_path: Path, kept: str, trained: str, precision: str, keeps: bool
) -> None:
    make_merge_report(kept, trained).write(tmp_path / "merge_report.json")
    assert keeps_training(tmp_path, precision) is keeps  # type: ignore[arg-type]


@pytest.mark.parametrize("kept", ["full", "dequantised"])
def test_what_is_trained_on_a_merge_lies_on_its_grid_still(
    merged: Path, tmp_path: Path, kept: str
) -> None:
    """A second adapter, trained in int8 on the first one's merge and merged in its turn."""
    assert read_json(merged / "merge_report.json")["grids"] == ["nf4"]
    grids = grids_of(merged, "int8", kept)
    assert grids == (["int8", "nf4"] if kept == "dequantised" else ["nf4"])
    make_merge_report(kept, "int8", grids=grids).write(tmp_path / "merge_report.json")
    assert not keeps_training(tmp_path, "nf4")
    assert keeps_training(tmp_path, "int8") is (kept == "full")
    assert keeps_training(tmp_path, "bf16")


def test_a_report_of_another_kind_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "merge_report.json", {"kept": "everything"})
    with pytest.raises(ModelError, match=r"merge_report\.json: is not a whole MergeReport"):
        keeps_training(tmp_path, "nf4")


def test_a_merge_is_loaded_in_a_dtype_that_holds_it(
    merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = Compute(torch.device("cpu"), torch.bfloat16, "as on a card with bf16")
    monkeypatch.setattr(load, "choose_compute", lambda wanted: half)
    asked: list[Any] = []
    monkeypatch.setattr(load, "load_model", lambda base, precision, **_: asked.append(precision))
    for compute_dtype in ("auto", "bf16"):  # stored in fp16, which bf16 would round
        load.load_at_precision(resolve_base(str(merged)), None, True, compute_dtype)
    assert asked == ["fp32", "bf16"]


def test_the_plan_does_not_suggest_what_training_refuses(merged: Path, small_base: Path) -> None:
    def suggested(model: Path) -> list[Any]:
        run = model_run(str(model), ["model.precision=fp32"])
        lengths: Any = SimpleNamespace(rows=[(512, 512)])
        return [
            step.get("model.precision") for step in _stronger_changes(run, lengths, DEVICES["t4"])
        ]

    assert "nf4" in suggested(small_base)
    assert set(suggested(merged)) == {None}


def test_folders_of_others_keep_whatever_they_hold(small_base: Path) -> None:
    assert keeps_training(small_base, "nf4")


def test_chat_takes_a_merge_unquantised_unless_told_and_refuses_nf4(
    merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = resolve_base(str(merged))
    assert load_at_precision(base, None, True, "fp32").precision == "fp32"
    asked = (merged, "--prompt", "Code this", "--max-new-tokens", "2")
    run_script("eval/generate.py", *asked, "--compute-dtype", "fp32")
    assert "fp32" in capsys.readouterr().out
    for more, told in (
        (("--precision", "nf4"), TAKES_BACK),
        (("--no-double-quant",), "leave out --no-double-quant"),
    ):
        with pytest.raises(SystemExit):
            run_script("eval/generate.py", *asked, *more)
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("script", ["train/sft.py", "train/plan.py", "eval/serve.py"])
def test_scripts_refuse_it_before_anything_is_made(
    script: str, merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, merged)
    target = (merged, "--precision", "nf4") if script == "eval/serve.py" else (config,)
    with pytest.raises(SystemExit):
        run_script(script, *target)
    told = capsys.readouterr().err
    assert TAKES_BACK in told
    assert "halfbyte export" in told


def test_vllm_is_not_started_to_quantise_it(merged: Path) -> None:
    asked = [ServeTarget(None, str(merged))]
    assert str(merged) in vllm_command(asked, "localhost", 8000, None, [])
    with pytest.raises(ModelError, match=TAKES_BACK):
        vllm_command(asked, "localhost", 8000, None, ["--quantization", "bitsandbytes"])


def test_merge_trains_on_at_a_precision_that_keeps_it(merged: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, merged, model={"precision": "fp32"}, train={"max_steps": 1})
    run_script("train/sft.py", config)
    assert (tmp_path / "runs" / "tiny" / "adapter").is_dir()


def test_refusal_names_the_ways_out(merged: Path) -> None:
    with pytest.raises(ModelError, match=r"fp32, bf16 or fp16.*merge\.base=full"):
        load_at_precision(resolve_base(str(merged)), "nf4", True, "fp32")
