"""Questions: seeded held-out rows, with examples before the conversation and labels on the last answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from toys import chatml_tokenizer, gemma_tokenizer

from halfbyte.data.chat_template import load_template
from halfbyte.data.conversation import Message, Row
from halfbyte.data.encoded import IGNORED
from halfbyte.data.questions import fewshot_examples, held_out_rows, measuring_rows, questions
from halfbyte.data.render import Renderer
from halfbyte.errors import RunError
from halfbyte.run_dir import RunDir, write_jsonl


def conversation(place: str, *contents: str, system: str | None = None) -> Row:
    turns = tuple(
        Message("assistant" if n % 2 else "user", content) for n, content in enumerate(contents)
    )
    return Row(place, (Message("system", system), *turns) if system else turns)


ROWS = [conversation(f"t:{n}", f"heart {n}?", f"I{n}", system="Be brief.") for n in range(20)]
EXAMPLES = (
    Message("user", "fox?"),
    Message("assistant", "brown"),
    Message("user", "dog?"),
    Message("assistant", "lazy"),
)


def run_of(
    path: Path,
    *,
    test: Sequence[Row] = (),
    validation: Sequence[Row] = (),
    fewshot: Sequence[Row] = (),
) -> RunDir:
    folder = RunDir(path)
    for name, rows in (("test", test), ("validation", validation), ("fewshot", fewshot)):
        write_jsonl(folder.data / f"{name}.jsonl", [row.as_json() for row in rows])
    return folder


# --- held-out rows ---


def test_held_out_rows_are_the_same_sample_for_the_same_seed(tmp_path: Path) -> None:
    folder = run_of(tmp_path, test=ROWS)
    first = held_out_rows(folder, 8, seed=3)
    assert first == held_out_rows(folder, 8, seed=3)
    assert len({row.place for row in first}) == 8
    assert all(row in ROWS for row in first)
    assert first != held_out_rows(folder, 8, seed=4)


def test_held_out_rows_are_all_when_there_are_fewer_than_requested(tmp_path: Path) -> None:
    rows = held_out_rows(run_of(tmp_path, test=ROWS[:3]), 300, seed=0)
    assert sorted(row.place for row in rows) == ["t:0", "t:1", "t:2"]


def test_held_out_rows_come_from_validation_only_without_a_test_set(tmp_path: Path) -> None:
    both = run_of(tmp_path / "a", test=ROWS[:2], validation=ROWS[2:5])
    assert {row.place for row in held_out_rows(both, 9, seed=0)} == {"t:0", "t:1"}
    one = run_of(tmp_path / "b", validation=ROWS[2:5])
    assert {row.place for row in held_out_rows(one, 9, seed=0)} == {"t:2", "t:3", "t:4"}


def test_held_out_rows_refuses_a_run_that_held_nothing_out(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        held_out_rows(run_of(tmp_path, fewshot=ROWS), 5, seed=0)
    assert str(caught.value) == (
        f"{tmp_path}: no rows were held out; train with data.test, data.test_frac or"
        " data.validation_frac"
    )


def test_held_out_rows_names_the_file_that_an_unfinished_run_lacks(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        held_out_rows(RunDir(tmp_path), 5, seed=0)
    assert str(caught.value) == (
        f"{tmp_path / 'data' / 'test.jsonl'} is missing. Make it first: halfbyte train CONFIG"
    )


def test_question_of_raw_text_has_no_prompt_and_every_label(tmp_path: Path, gemma: Any) -> None:
    folder = run_of(tmp_path, test=[Row("t:9", text="once")])
    (question,) = questions(held_out_rows(folder, 1, seed=0), Renderer(gemma))
    assert question.prompt == []
    assert question.labels[1:] == question.ids[1:]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"test": ROWS[:2], "validation": ROWS[2:4], "fewshot": ROWS[4:6]}, {"t:0", "t:1"}),
        ({"validation": ROWS[2:4], "fewshot": ROWS[4:6]}, {"t:2", "t:3"}),
        ({"fewshot": ROWS[4:6]}, {"t:4", "t:5"}),
        ({"test": [Row("t:9", text="once")], "fewshot": ROWS[4:6]}, {"t:9"}),
        ({}, set()),
    ],
)
def test_measuring_rows_are_held_out_or_else_from_training(
    tmp_path: Path, parts: dict[str, list[Row]], expected: set[str]
) -> None:
    folder = run_of(tmp_path, **parts)
    rows = measuring_rows(folder, 5, seed=0)
    assert {row.place for row in rows} == expected
    assert len(rows) == len(expected)


def test_measuring_rows_are_the_same_sample_for_the_same_seed(tmp_path: Path) -> None:
    folder = run_of(tmp_path, test=ROWS)
    assert measuring_rows(folder, 8, seed=3) == measuring_rows(folder, 8, seed=3)
    assert measuring_rows(folder, 8, seed=3) != measuring_rows(folder, 8, seed=4)


# --- examples ---


def test_fewshot_examples_are_whole_rows_without_system_messages(tmp_path: Path) -> None:
    folder = run_of(tmp_path, fewshot=ROWS)
    turns = fewshot_examples(folder, 3, seed=1)
    assert [turn.role for turn in turns] == ["user", "assistant"] * 3
    pairs = [(turns[n], turns[n + 1]) for n in range(0, 6, 2)]
    assert all(any(pair == row.messages[1:] for row in ROWS) for pair in pairs)
    assert len(set(pairs)) == 3


def test_fewshot_examples_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    folder = run_of(tmp_path, fewshot=ROWS)
    assert fewshot_examples(folder, 5, seed=1) == fewshot_examples(folder, 5, seed=1)
    assert fewshot_examples(folder, 5, seed=1) != fewshot_examples(folder, 5, seed=2)


def test_fewshot_examples_refuses_more_than_the_run_kept(tmp_path: Path) -> None:
    folder = run_of(tmp_path, fewshot=ROWS[:2])
    assert len(fewshot_examples(folder, 2, seed=0)) == 4
    with pytest.raises(RunError) as caught:
        fewshot_examples(folder, 3, seed=0)
    assert str(caught.value) == "eval.fewshot is 3, but the run kept 2 training examples"


def test_fewshot_examples_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"fewshot\.jsonl is missing"):
        fewshot_examples(RunDir(tmp_path), 3, seed=0)


# --- questions ---


def renderers() -> list[object]:
    return [
        pytest.param(Renderer(chatml_tokenizer()), id="chatml"),
        pytest.param(Renderer(chatml_tokenizer(), loss_on="all"), id="chatml_all"),
        pytest.param(Renderer(gemma_tokenizer(), load_template("gemma")), id="gemma"),
        pytest.param(Renderer(gemma_tokenizer(), load_template("plain")), id="plain"),
    ]


@pytest.mark.parametrize("renderer", renderers())
@pytest.mark.parametrize("examples", [(), EXAMPLES], ids=["zeroshot", "fewshot"])
@pytest.mark.parametrize(
    "row",
    [
        conversation("t:1", "heart?", "I21 東京"),
        conversation("t:2", "heart?", "I21", system="Be brief."),
        conversation("t:3", "heart?", "I21", "wall <|im_end|>?", "I10 <end_of_turn>"),
    ],
    ids=["pair", "system", "two_answers"],
)
def test_question_labels_its_last_answer_alone_after_the_ids_of_its_prompt(
    renderer: Renderer, examples: tuple[Message, ...], row: Row
) -> None:
    [question] = questions([row], renderer, examples)
    size = len(question.prompt)
    assert question.row == row
    assert question.ids[:size] == question.prompt
    assert question.labels[:size] == [IGNORED] * size
    assert question.labels[size:] == question.ids[size:]
    assert len(question.ids) > size
    answer = renderer.tokenizer.decode(question.ids[size:], skip_special_tokens=False)
    assert answer == row.answer + renderer.tokenizer.convert_ids_to_tokens(renderer.stop_id)


@pytest.mark.parametrize("renderer", renderers())
def test_question_without_examples_has_the_ids_of_training(renderer: Renderer) -> None:
    ids = [question.ids for question in questions(ROWS, renderer)]
    assert ids == [renderer.encode_row(row).ids for row in ROWS]
    assert len(ids) == len(ROWS)


def test_questions_put_examples_between_system_message_and_conversation() -> None:
    renderer = Renderer(chatml_tokenizer())
    row = conversation("t:1", "heart?", "I21", "wall?", "I10", system="Be brief.")
    [question] = questions([row], renderer, EXAMPLES)
    expected = [
        ("system", "Be brief."),
        *[(turn.role, turn.content) for turn in EXAMPLES],
        ("user", "heart?"),
        ("assistant", "I21"),
        ("user", "wall?"),
    ]
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in expected)
    prompt = renderer.tokenizer.decode(question.prompt, skip_special_tokens=False)
    assert prompt == text + "<|im_start|>assistant\n"


def test_questions_begin_with_examples_when_there_is_no_system_message() -> None:
    renderer = Renderer(chatml_tokenizer())
    [question] = questions([conversation("t:1", "heart?", "I21")], renderer, EXAMPLES[:2])
    prompt = renderer.tokenizer.decode(question.prompt, skip_special_tokens=False)
    assert prompt == (
        "<|im_start|>user\nfox?<|im_end|>\n<|im_start|>assistant\nbrown<|im_end|>\n"
        "<|im_start|>user\nheart?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_each_call_of_a_conversation_is_a_question(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    (tmp_path / "data").mkdir()
    call = ["tide", '{"port": "Brest"}', "c1"]
    messages = [
        {"role": "user", "content": "Tide?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "5", "tool_call_id": "c1"},
        {"role": "assistant", "content": "5 m."},
    ]
    write_jsonl(folder.data / "test.jsonl", [{"place": "a:1", "messages": messages}])
    rows = held_out_rows(folder, 10, 0)
    assert sorted((row.place, len(row.messages)) for row in rows) == [
        ("a:1", 4),
        ("a:1, turn 2", 2),
    ]
