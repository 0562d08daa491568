"""The speed benchmark: its rows, the work it counts, what it refuses, and what it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

from benchmarks.harness.models import Model
from benchmarks.harness.report import as_markdown, check_losses, summary
from benchmarks.harness.rows import STEP_ROWS, Row, make_rows
from benchmarks.harness.work import num_labelled, work_of

DRAWN = Model("drawn")


@pytest.fixture
def words(tmp_path: Path) -> Path:
    vocabulary = {str(n): n for n in range(4000)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="3"))
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(tmp_path)
    return tmp_path


def starts(rows: list[Row]) -> set[int]:
    return {ids[0] for ids, _ in rows}


def test_equal_rows_share_no_beginning(words: Path) -> None:
    rows = make_rows("equal", DRAWN, words, 3, 0, None)
    assert {len(ids) for ids, _ in rows.drawn} == {256}
    assert len(starts(rows.drawn + rows.held_out)) == len(rows.drawn + rows.held_out)
    assert num_labelled(rows.drawn) == 102 * len(rows.drawn)


def test_chat_rows_have_the_lengths_that_they_were_fitted_to(words: Path) -> None:
    rows = make_rows("chat", DRAWN, words, 20, 0, None)
    lengths = sorted(len(ids) for ids, _ in rows.drawn)
    assert 70 < lengths[len(lengths) // 2] < 95
    assert 0.35 < num_labelled(rows.drawn) / sum(lengths) < 0.45


def test_prompt_rows_share_460_tokens(words: Path) -> None:
    rows = make_rows("prompt460", DRAWN, words, 2, 0, None)
    assert len({tuple(ids[:460]) for ids, _ in rows.drawn}) == 1
    assert len({ids[460] for ids, _ in rows.drawn}) == len(rows.drawn)


def test_rows_are_the_same_for_a_seed_and_the_same_in_each_step(words: Path) -> None:
    rows, again = (make_rows("chat", DRAWN, words, 3, 0, None) for _ in range(2))
    assert rows == again
    assert sorted(rows.in_steps) == sorted(rows.drawn)
    assert rows.in_steps != rows.drawn
    lengths = [len(ids) for ids, _ in rows.in_steps]
    for start in range(0, len(lengths), STEP_ROWS):
        step = lengths[start : start + STEP_ROWS]
        assert step == sorted(step)


def test_work_counts_what_training_needs(tmp_path: Path) -> None:
    LlamaConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    body, adapter = 4 * 8 * 8 + 3 * 8 * 16, 4 * (4 * 16 + 3 * 24)
    row: Row = ([1] * 10, [-100] * 6 + [1] * 4)
    attention = 3.5 * (2 + 2) * 8 * 10 * 10 / 2
    expected = 10 * (4 * body + 6 * adapter) + 4 * (4 * 8 * 32) + attention
    assert work_of(tmp_path, 4).of([row]) == expected


@pytest.mark.parametrize(("loss", "fits"), [(4.0003, True), (4.001, False)])
def test_losses_that_differ_at_the_first_step_stop_the_report(loss: float, fits: bool) -> None:
    runs = [{"tool": "trl", "losses": [4.0]}, {"tool": "halfbyte", "losses": [loss]}]
    if fits:
        check_losses(runs, "fp32")
        return
    with pytest.raises(SystemExit, match=r"no report.*trl 4\.000000, halfbyte 4\.001000"):
        check_losses(runs, "fp32")


def run(tool: str, seconds: float, peak: float) -> dict[str, Any]:
    return {
        "tool": tool,
        "load": 0.1,
        "losses": [4.0, 3.0, 2.0, 1.0],
        "step_s": [9.0, 9.0, seconds, seconds],
        "first_step_s": 20.0,
        "peak_bytes": peak,
        "micro_batch": 8,
        "checkpointing": False,
        "adapter_dtype": "float32",
    }


def test_report_takes_medians_and_names_what_failed() -> None:
    slow = [run("trl-tuned", seconds, 4e9) for seconds in (4.0, 5.0, 40.0)]
    fast = [run("halfbyte", 2.0, 2e9)] * 3
    cell = {
        "model": "smollm2",
        "dataset": "equal",
        "about": "rows",
        "reference": "trl-tuned",
        "steps": [{"tokens": 100, "labelled": 40, "flop": 1e9}] * 4,
        "sweeps": [{"tool": "trl-tuned", "micro_batch": 16, "failed": "exit -9"}],
        "runs": [*slow, *fast, {"tool": "unsloth", "load": 0.1, "failed": "exit -9"}],
        "held_out_losses": {"base": 4.0, "trl-tuned": 1.0, "halfbyte": 1.0},
    }
    lines = {line["tool"]: line for line in summary(cell, 1e10)}
    assert lines["trl-tuned"]["steps_per_s"] == pytest.approx(0.2)
    assert lines["halfbyte"]["tokens_per_s"] == pytest.approx(50)
    assert lines["halfbyte"]["gemm_frac"] == pytest.approx(0.05)
    settings = dict.fromkeys(("rank", "learning_rate", "step_rows", "num_steps", "reps"), 1)
    report = {
        "command": "python -m benchmarks.speed",
        "processor": "cpu",
        "gemm_flops": 1e10,
        "settings": settings | {"dtype": "fp32", "threads": 1},
        "versions": {},
        "cells": [cell],
    }
    text = as_markdown(report)
    assert "| unsloth | failed: exit -9 |" in text
    assert "trl-tuned 16: exit -9" in text
    assert "| 2.50× | 2.00× |" in text
