"""What a training step launches on CUDA stays within its budget; counted on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import step_ops
from benchmarks.harness.models import ROOT
from benchmarks.harness.tiny import DATASETS, KINDS

# A layer forward and backward, a whole step of 34 layers, autograd nodes of a layer (issue 25).
MOST_A_LAYER = {"gemma": 120, "llama": 110, "qwen": 110}
MOST_A_STEP, MOST_NODES = 4_500, 60
MOST_HOST_RATIO = 0.25
TABLE = ROOT / "benchmarks" / "results" / "step_ops.json"


def assert_within(kind: str, figures: step_ops.Figures) -> None:
    assert figures["launches_per_layer"] <= MOST_A_LAYER[kind]
    assert figures["launches_34_layers"] <= MOST_A_STEP
    assert figures["autograd_nodes_per_layer"] <= MOST_NODES
    assert figures["list_tensors"] == 0
    assert figures["syncs"] <= 1
    assert figures["index_put_backward"] == 0


@pytest.mark.parametrize(
    "kind",
    [kind if kind == "gemma" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS],
)
def test_a_step_launches_no_more_than_its_budget(kind: str, tmp_path: Path) -> None:
    dataset = {"gemma": "prompt460", "llama": "chat", "qwen": "icd10"}[kind]
    assert_within(kind, step_ops.figures(tmp_path, "halfbyte", kind, dataset))


def test_the_table_is_within_the_budget() -> None:
    table = json.loads(TABLE.read_text())
    for kind in KINDS:
        for dataset in DATASETS:
            assert_within(kind, table[kind][dataset])
    trl = table["trl"]["chat"]["launches_34_layers"]
    assert trl >= 2 * table["gemma"]["chat"]["launches_34_layers"]


def test_the_host_s_time_is_within_the_budget() -> None:
    assert json.loads(TABLE.read_text())["host_ratio_to_trl"] <= MOST_HOST_RATIO
