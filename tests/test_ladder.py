"""The quantisation ladder: every precision of one model, held against the full one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig
from toys import run_script

from halfbyte.eval.ladder import qlora_lines
from halfbyte.model.precision import device_name


def test_ladder_of_a_config_measures_every_rung(make_config: MakeConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rungs = ("fp32", "int8", "nf4", "nf4+dq", "fp4", "fp4+dq")
    run_script("eval/ladder.py", make_config(), "--rungs", *rungs, "--out", out)
    whole = json.loads((out / "ladder.json").read_text())
    assert whole["command"].startswith("halfbyte ladder ")
    assert whole["command"].endswith(f"--rungs {' '.join(rungs)} --out {out}")
    assert whole["device"] == device_name()
    assert whole["libraries"]["torch"] == torch.__version__
    told = whole["rungs"]
    assert [rung["name"] for rung in told] == list(rungs)
    full, *others = told
    assert full["kl_nats_per_token"] == 0
    assert full["top1_agreement"] == 1
    for rung in others:
        assert 0 < rung["kl_nats_per_token"] < 1
        assert rung["weights_bytes"] < full["weights_bytes"]
        assert rung["perplexity"] > 1
        assert rung["num_weights"] == full["num_weights"]
        assert rung["exact_match"]["n"] == full["exact_match"]["n"] > 0
    by_name = {rung["name"]: rung for rung in told}
    assert by_name["int8"]["kl_nats_per_token"] < by_name["nf4"]["kl_nats_per_token"]
    text = (out / "ladder.md").read_text()
    assert all(f"| {name} |" in text for name in rungs)
    assert "nf4 vs fp4: perplexity" in text


@pytest.mark.slow
@pytest.mark.real
def test_ladder_of_a_run_takes_its_merged_model_and_its_artefacts(
    exported_run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(exported_run, copy)
    run_script("eval/ladder.py", copy, "--rungs", "fp32", "nf4+dq", "eval.rows=6")
    told = json.loads((copy / "eval" / "ladder.json").read_text())["rungs"]
    names = [rung["name"] for rung in told]
    assert names[:2] == ["fp32", "nf4+dq"]
    assert {"gguf-f16", "gguf-q8_0", "gguf-q4_k_m"} == set(names[2:])
    by_name = {rung["name"]: rung for rung in told}
    assert by_name["gguf-f16"]["kl_nats_per_token"] < 1e-3
    assert by_name["gguf-f16"]["kl_nats_per_token"] < by_name["gguf-q4_k_m"]["kl_nats_per_token"]


def test_raw_text_has_a_ladder_by_its_loss(make_config: MakeConfig, tmp_path: Path) -> None:
    rows = [{"text": f"The heart has {n} chambers, the lung {n + 1} lobes."} for n in range(40)]
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(data={"train": str(data), "test": None, "test_frac": 0.2})
    run_script(
        "eval/ladder.py",
        *(config, "eval.metrics=[held_out_loss]", "--rungs", "fp32", "nf4", "--out", tmp_path),
    )
    told = json.loads((tmp_path / "ladder.json").read_text())["rungs"]
    assert told[1]["perplexity"] != told[0]["perplexity"]
    assert "| fp32 |" in (tmp_path / "ladder.md").read_text()


def test_unknown_rungs_are_refused(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    for rungs in (("fp32", "int3"), ("nf4", "fp32")):
        with pytest.raises(SystemExit) as stop:
            run_script("eval/ladder.py", make_config(), "--rungs", *rungs)
        assert stop.value.code == 2
        assert "allowed: fp32, bf16" in capsys.readouterr().err


def test_the_order_is_said_as_it_was_found() -> None:
    def rung(name: str, perplexity: float, kl: float, size: int) -> dict[str, object]:
        return {
            "name": name,
            "perplexity": perplexity,
            "kl_nats_per_token": kl,
            "weights_bytes": size,
            "num_weights": 800,
        }

    good = [rung("fp32", 9, 0, 3200), rung("nf4", 10, 0.1, 450), rung("fp4", 11, 0.2, 450)]
    assert qlora_lines(good) == [
        "nf4 vs fp4: perplexity 10.0000 vs 11.0000, KL 1.000e-01 vs 2.000e-01: as in QLoRA, Table 2."
    ]
    bad = [*good[:2], rung("fp4", 9.5, 0.2, 450), rung("nf4+dq", 10.1, 0.11, 412)]
    first, second = qlora_lines(bad)
    assert first.endswith("NOT as in QLoRA.")
    assert "perplexity +1.00%" in second
    assert "0.380 bits per weight" in second
