"""The opponents that are named before any training are those that the comparison then has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_opponents import labelled
from toys import chatml_tokenizer

from halfbyte.config import model_run
from halfbyte.config.dataset import Data
from halfbyte.data.chat_template import load_template
from halfbyte.data.conversation import Row
from halfbyte.data.prepare import prepare
from halfbyte.data.prepared import Prepared
from halfbyte.data.render import Renderer
from halfbyte.eval import opponents
from halfbyte.eval.expected_opponents import expected_opponents


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(chatml_tokenizer(), load_template("hermes"))


def prepared_rows(rows: list[Row], folder: Path, renderer: Renderer) -> Prepared:
    pairs = {row.prompt + str(number): row.answer for number, row in enumerate(rows)}
    lines = [json.dumps({"prompt": prompt, "completion": said}) for prompt, said in pairs.items()]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return prepare(Data.model_validate({"train": str(path), "test_frac": 0.2}), renderer)


def test_a_closed_set_is_named_with_what_each_opponent_reads(
    renderer: Renderer, tmp_path: Path
) -> None:
    prepared = prepared_rows(labelled(90, 0), tmp_path, renderer)
    run = model_run("org/tiny", ["eval.max_opponent_growth=null"])
    text = expected_opponents(prepared, renderer, run, 9999)
    kind, counted, plain, *with_base = text.splitlines()
    assert kind == "answers: a closed set of 3"
    assert counted == "without a model: majority, nearest, linear"
    assert plain.startswith("the variants read ")
    names = [line.split(":")[0] for line in with_base]
    assert names == ["base-full-retrieval", "base-full-choices", "base-full-instructed"]


def test_only_those_that_take_part_are_named(
    renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepared_rows(labelled(90, 0), tmp_path, renderer)
    monkeypatch.setattr(opponents, "MAX_COEFFICIENTS", 10)
    run = model_run("org/tiny", ["eval.variants=[adapter]"])
    _, counted, note = expected_opponents(prepared, renderer, run, 9999).splitlines()
    assert counted == "without a model: majority, nearest"
    assert note.startswith("linear was left out")
    loss = model_run("org/tiny", ["eval.metrics=[held_out_loss]"])
    assert expected_opponents(prepared, renderer, loss, 9999).startswith("none")
