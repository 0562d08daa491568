"""What only CUDA can show: NF4 training in each compute dtype, the fp16 scaler, loftq, memory counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from toys import run_script

from halfbyte.run_dir import read_jsonl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_jsonl(run / "metrics.jsonl") if "loss" in record]


@pytest.mark.parametrize("compute", ["fp32", "fp16", "bf16"])
def test_training_merging_and_comparing_on_cuda(
    make_config: MakeConfig, tmp_path: Path, compute: str
) -> None:
    """Under fp16 the adapters must be fp32: GradScaler has no kernel for TRL's bf16 ones."""
    if compute == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no bf16 on this card")
    config = make_config(
        model={"compute_dtype": compute}, train={"max_steps": 20}, track={"wandb": "off"}
    )
    run_script("train/sft.py", config)
    folder = tmp_path / "runs" / "tiny"
    found = losses(folder)
    assert found[-1] < found[0]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["device"].startswith("cuda")
    assert 0 < manifest["peak_memory_bytes"] < 4 << 30
    run_script("train/merge.py", folder)
    run_script("eval/compare.py", folder)


def test_loss_does_not_depend_on_the_compute_dtype(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(track={"wandb": "off"})
    for compute in ("fp32", "fp16"):
        run_script("train/sft.py", config, f"model.compute_dtype={compute}", f"name={compute}")
    first: list[Any] = [losses(tmp_path / "runs" / name)[0] for name in ("fp32", "fp16")]
    assert first[0] == pytest.approx(first[1], rel=2e-2)


def test_loftq_trains(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(adapter={"r": 8, "alpha": 8}, track={"wandb": "off"})
    run_script("train/sft.py", config, "adapter.init=loftq", "name=loftq")
    found = losses(tmp_path / "runs" / "loftq")
    assert found[-1] < found[0]


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_bitsandbytes_optimizers_train(
    make_config: MakeConfig, tmp_path: Path, optimizer: str
) -> None:
    config = make_config(train={"optimizer": optimizer, "max_steps": 20}, track={"wandb": "off"})
    run_script("train/sft.py", config)
    found = losses(tmp_path / "runs" / "tiny")
    assert found[-1] < found[0]
