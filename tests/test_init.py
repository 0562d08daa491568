"""halfbyte init: columns, metrics, lengths, and configs that train as they stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import run_script, save_tiny_llama

from halfbyte.config import load_run
from halfbyte.errors import DataError
from halfbyte.initial.answers import goal_of
from halfbyte.initial.columns import choose_columns
from halfbyte.initial.draft import draft_config
from halfbyte.initial.files import find_rows
from halfbyte.initial.fit import length_for, nested
from halfbyte.initial.questions import Questions
from halfbyte.initial.text import config_text, path_from

QUESTIONS = Questions(asks=False)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sums(number: int) -> list[dict[str, Any]]:
    return [{"question": f"What is {n} plus {n}?", "answer": str(2 * n)} for n in range(number)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "base"
    save_tiny_llama(folder)
    return folder


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "completion": "b"}, ("prompt_completion", {})),
        ({"messages": [{"role": "user", "content": "a"}]}, ("messages", {})),
        ({"instruction": "a", "input": "", "output": "b"}, ("alpaca", {})),
        ({"text": "a"}, ("text", {})),
        ({"text": "a", "label": "b"}, ("prompt_completion", {"prompt": "text", "completion": "label"})),
        ({"Question": "a", "Best Answer": "b"}, ("prompt_completion", {"prompt": "Question", "completion": "Best Answer"})),
        (
            {"question": "a", "context": "c", "answers": {"text": ["b"], "answer_start": [1]}},
            ("alpaca", {"instruction": "question", "input": "context", "output": "answers.text.0"}),
        ),
        (
            {"question": "a", "mc1_targets": {"choices": ["b", "c"], "labels": [1, 0]}},
            ("prompt_completion", {"prompt": "question", "completion": "mc1_targets.choices.0"}),
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ("prompt_completion", {"prompt": "prompt", "completion": "chosen"})),
    ],
)  # fmt: skip
def test_columns_are_told_by_their_names(row: dict[str, Any], expected: tuple[str, Any]) -> None:
    form, names = choose_columns([row] * 3)
    if {"answers"} <= row.keys():
        assert names["instruction"] == "question"
        assert names["output"].startswith("answers")
    else:
        assert (form, names) == expected


def test_named_columns_decide_and_unknown_ones_are_an_error() -> None:
    rows = [{"spoken": "a", "meant": "b"}]
    named = choose_columns(rows, "spoken", "meant")
    assert named == ("prompt_completion", {"prompt": "spoken", "completion": "meant"})
    with pytest.raises(DataError, match="spoken, meant; none is known to hold answers"):
        choose_columns(rows)


@pytest.mark.parametrize(
    ("answers", "metrics"),
    [
        (['{"a": 1}', '{"a": 2}', "[1]"], ["exact_match", "field_match"]),
        (["so it is #### 4", "then\n#### 12"], ["exact_match"]),
        (["1", "2.5", "$3,000", "40%"], ["numeric_match"]),
        (["yes", "no"] * 40, ["exact_match"]),
        ([f"word {n}" for n in range(50)], ["exact_match", "normalised_match"]),
        ([f"a long sentence that says something about {n} and more" for n in range(50)], ["rouge_l", "held_out_loss"]),
    ],
)  # fmt: skip
def test_the_shape_of_answers_decides_the_metric(answers: list[str], metrics: list[str]) -> None:
    assert goal_of(answers).metrics == metrics


def test_calls_and_raw_text_have_metrics_of_their_own() -> None:
    assert goal_of(["", ""], calls=2).metrics == ["tool_match", "tool_valid"]
    assert goal_of(["", ""], texts=2).metrics == ["held_out_loss"]


@pytest.mark.parametrize(
    ("lengths", "limit", "expected"),
    [
        ([10, 20, 30], 4096, (64, 0)),
        ([100] * 99 + [150], 4096, (192, 0)),
        ([100] * 999 + [5000], 4096, (128, 1)),
        ([100, 9000], 4096, (4096, 1)),
    ],
)
def test_the_longest_row_counts_unless_it_is_far_longer(
    lengths: list[int], limit: int, expected: tuple[int, int]
) -> None:
    assert length_for(np.array(lengths), limit) == expected


def test_what_is_written_is_read_back_with_its_comments(tmp_path: Path) -> None:
    settings = {"train.learning_rate": 1e-3, "data.columns": {"prompt": "a: b"}, "name": "#x"}
    text = config_text(
        settings, {"data.columns": "as they are named"}, ["made by a test"], "s.json"
    )
    assert text.startswith("# yaml-language-server: $schema=s.json\n# made by a test\n")
    assert "# as they are named" in text
    from ruamel.yaml import YAML

    assert YAML(typ="safe").load(text) == nested(settings)


def test_a_path_is_relative_only_if_it_is_near() -> None:
    assert path_from(Path("/a/b"), Path("/a/c/d.csv")) == "../c/d.csv"
    assert path_from(Path("/a/b/c/d"), Path("/x/y.csv")) == "/x/y.csv"


def test_a_folder_of_several_kinds_is_an_error_that_names_them(tmp_path: Path) -> None:
    write_rows(tmp_path / "one.jsonl", sums(3))
    write_rows(tmp_path / "two.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r"several kinds; name one: one\.jsonl, two\.jsonl"):
        find_rows(str(tmp_path))


def test_files_of_splits_are_training_and_held_out_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", sums(100))
    write_rows(tmp_path / "test.jsonl", sums(60))
    for given in (tmp_path, tmp_path / "train.jsonl"):
        places = find_rows(str(given))
        assert places.train == str(tmp_path / "train.jsonl")
        assert places.test == str(tmp_path / "test.jsonl")


@pytest.mark.parametrize("given", ["none.jsonl", "/no/such/folder", "./x/y"])
def test_what_is_not_there_is_an_error(given: str) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        find_rows(given)


def test_questions_are_at_most_five_and_enter_takes_what_is_proposed(
    tmp_path: Path, base: Path
) -> None:
    prompts: list[str] = []
    answers = iter(["", "", "Add the numbers.", "exact_match"])

    def read(prompt: str) -> str:
        prompts.append(prompt)
        return next(answers)

    rows = write_rows(tmp_path / "sums.jsonl", sums(120))
    drafted = draft_config(
        str(rows),
        tmp_path / "sums.yaml",
        Questions(asks=True, read=read),
        model=str(base),
        device="cpu",
        columns=(None, None),
    )
    assert len(prompts) == 4
    assert prompts[0] == "Column of the prompts [question]: "
    assert drafted.settings["data.system"] == "Add the numbers."
    assert drafted.settings["eval.metrics"] == ["exact_match"]


def test_a_config_is_written_that_trains_as_it_stands(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = sums(120)
    write_rows(tmp_path / "sums.jsonl", [*rows, {"question": "broken", "answer": None}])
    out = tmp_path / "configs" / "sums.yaml"
    command = ["init", "sums.jsonl", "--yes", "--model", str(base), "--out", str(out)]
    run_command_line(monkeypatch, *command)
    shown = capsys.readouterr()
    assert f"next: halfbyte preview {out}" in shown.out
    assert "data.on_malformed=drop: some rows cannot be read" in shown.err
    run = load_run(out, [])
    assert run.eval.metrics == ["numeric_match"]
    assert run.data.on_malformed == "drop"
    schema = json.loads((out.parent / "halfbyte.schema.json").read_text(encoding="utf-8"))
    assert "properties" in schema
    run_script("train/sft.py", out, "train.max_steps=2", "train.num_samples=0", "track.wandb=off")
    assert list((out.parent / "runs").glob("*/adapter/adapter_model.safetensors"))
    with pytest.raises(SystemExit):
        run_command_line(monkeypatch, *command)
    assert "is there already" in capsys.readouterr().err


def run_command_line(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    from halfbyte import command_line

    monkeypatch.setattr("sys.argv", ["halfbyte", *words])
    command_line.main()
