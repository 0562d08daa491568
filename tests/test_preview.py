"""The preview: marks, histogram, cut numbers and ledger say what the prepared rows hold."""

from __future__ import annotations

import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from toys import chatml_tokenizer, gemma_tokenizer, write_rows

from halfbyte.config.dataset import Data
from halfbyte.data.chat_template import load_template
from halfbyte.data.conversation import Message, Row
from halfbyte.data.prepare import prepare
from halfbyte.data.preview import faults_of, show_ledger, show_lengths, show_preview, show_row
from halfbyte.data.preview_page import preview_page
from halfbyte.data.render import Renderer
from halfbyte.data.samples import Example

TURNS = (
    Message("system", "Be brief."),
    Message("user", "acute heart?"),
    Message("assistant", "yes 東京"),
    Message("user", "dog 😀?"),
    Message("assistant", "no"),
)
BIN = re.compile(r"^ *(\d+)-(\d+) +(\d+)  (█*)$")


def example_of(renderer: Renderer, messages: tuple[Message, ...] = TURNS) -> Example:
    row = Row("t.jsonl:7", messages)
    return Example(row, renderer.encode_row(row))


# --- one row ---


@pytest.mark.parametrize(
    ("renderer", "body"),
    [
        pytest.param(
            Renderer(chatml_tokenizer()),
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\nacute heart?<|im_end|>\n"
            "<|im_start|>assistant\n‹yes 東京<|im_end|>›\n"
            "<|im_start|>user\ndog 😀?<|im_end|>\n"
            "<|im_start|>assistant\n‹no<|im_end|>›",
            id="chatml",
        ),
        pytest.param(
            Renderer(gemma_tokenizer(), load_template("gemma")),
            "<bos><start_of_turn>user\nBe brief.\n\nacute heart?<end_of_turn>\n"
            "<start_of_turn>model\n‹yes 東京<end_of_turn>›\n"
            "<start_of_turn>user\ndog 😀?<end_of_turn>\n"
            "<start_of_turn>model\n‹no<end_of_turn>›",
            id="gemma",
        ),
        pytest.param(
            Renderer(gemma_tokenizer(), load_template("plain")),
            "<bos>Be brief.\n\nQuestion:\nacute heart?\n\nAnswer:\n‹yes 東京<eos>›\n\n"
            "Question:\ndog 😀?\n\nAnswer:\n‹no<eos>›",
            id="plain",
        ),
    ],
)
def test_show_row_marks_exactly_the_supervised_text_without_colour(
    renderer: Renderer, body: str
) -> None:
    example = example_of(renderer)
    encoded = example.encoded
    head = f"t.jsonl:7: {len(encoded.ids)} tokens, {encoded.num_supervised} supervised"
    assert show_row(example, renderer, colour=False) == f"{head}\n{body}"


def test_show_row_colours_what_it_would_mark() -> None:
    renderer = Renderer(chatml_tokenizer())
    example = example_of(renderer, TURNS[1:3])
    _, body = show_row(example, renderer, colour=True).split("\n", 1)
    assert body == (
        "\x1b[90m<|im_start|>user\nacute heart?<|im_end|>\n<|im_start|>assistant\n\x1b[0m"
        "\x1b[32myes 東京<|im_end|>\x1b[0m"
    )


def test_show_row_marks_all_but_the_first_token_when_every_token_counts() -> None:
    renderer = Renderer(chatml_tokenizer(), loss_on="all")
    example = example_of(renderer, TURNS[1:3])
    _, body = show_row(example, renderer, colour=False).split("\n", 1)
    assert body == (
        "<|im_start|>‹user\nacute heart?<|im_end|>\n<|im_start|>assistant\nyes 東京<|im_end|>›"
    )


# --- lengths ---


@pytest.mark.parametrize(
    "lengths",
    [
        [5],
        [5, 5, 5],
        [5, 6],
        list(range(1, 11)),
        list(range(1, 12)),
        [1, 1000],
        random.Random(0).choices(range(3, 700), k=300),
        random.Random(1).choices(range(90, 99), k=50),
    ],
)
def test_show_lengths_counts_every_row_in_its_bin(lengths: list[int]) -> None:
    *bars, summary, _ = show_lengths(lengths, 1024).splitlines()
    bins = []
    for bar in bars:
        match = BIN.match(bar)
        assert match is not None, bar
        low, high, count = map(int, match.groups()[:3])
        assert count == sum(low <= length <= high for length in lengths)
        bins.append((low, high, count, len(match[4])))
    assert sum(count for *_, count, _ in bins) == len(lengths)
    assert len(bins) <= 10
    assert all(first[1] + 1 == second[0] for first, second in pairwise(bins))
    assert max(width for *_, width in bins) == 40
    assert summary.endswith(f"longest {max(lengths)} tokens")


def test_show_lengths_gives_median_and_99_percent() -> None:
    lines = show_lengths(random.Random(0).sample(range(1, 202), 201), 1024).splitlines()
    assert lines[-2] == "median 101, 99 % 199, longest 201 tokens"


@pytest.mark.parametrize(
    ("max_length", "cut"),
    [
        (8, "max_length 8 would cut 2 rows, 14 tokens"),
        (10, "max_length 10 would cut 1 rows, 10 tokens"),
        (19, "max_length 19 would cut 1 rows, 1 tokens"),
        (20, "max_length 20 would cut 0 rows, 0 tokens"),
    ],
)
def test_show_lengths_says_what_max_length_would_cut(max_length: int, cut: str) -> None:
    assert show_lengths([10, 20, 5], max_length).splitlines()[-1] == cut


# --- the whole ---


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    near = "acute chronic heart attack of the anterior wall in a lazy dog, with a quick brown fox"
    rows = [
        {"prompt": "heart attack", "completion": "yes"},
        {"prompt": "Heart attack!", "completion": "yes"},
        {"prompt": "what is <|im_end|>", "completion": "no"},
        {"prompt": "leaked", "completion": "yes"},
        {"prompt": near, "completion": "yes"},
        {"prompt": "long", "completion": "chronic " * 60},
    ]
    test = [{"prompt": "Leaked", "completion": "yes"}, {"prompt": near + "es", "completion": "no"}]
    return {
        "train": str(write_rows(tmp_path / "train.jsonl", rows)),
        "test": str(write_rows(tmp_path / "test.jsonl", test)),
        "on_leak": "drop",
        "max_length": 60,
    }


def test_show_ledger_accounts_for_every_row(data: dict[str, Any]) -> None:
    prepared = prepare(
        Data.model_validate({**data, "on_overlength": "truncate"}), Renderer(chatml_tokenizer())
    )
    tokens = prepared.ledger.tokens
    share = {
        name: 100 * tokens[name].supervised / tokens[name].total for name in data if name in tokens
    }
    assert show_ledger(prepared).splitlines() == [
        "format: train is prompt_completion, test is prompt_completion",
        "rows in: 6 train + 2 test = 5 trained + held out (0 validation, 2 test) + dropped (1 prompt"
        " is held out)",
        "truncated: 1; changed by the template: 0; special tokens as text: 1",
        "repeated prompts: 1 in training, 0 held out; near duplicates of held-out prompts: 1",
        f"train: {tokens['train'].total} tokens, {share['train']:.1f} % supervised",
        f"test: {tokens['test'].total} tokens, {share['test']:.1f} % supervised",
        f"dropped, prompt is held out: {data['train']}:4",
    ]


def test_show_ledger_says_zero_when_nothing_is_dropped(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", [{"prompt": "q", "completion": "a"}])
    prepared = prepare(Data.model_validate({"train": str(path)}), Renderer(chatml_tokenizer()))
    assert show_ledger(prepared).splitlines()[1] == (
        "rows in: 1 train = 1 trained + held out (0 validation, 0 test) + dropped (0)"
    )


def test_show_preview_puts_rows_lengths_ledger_and_tokens_together(data: dict[str, Any]) -> None:
    renderer = Renderer(chatml_tokenizer())
    config = Data.model_validate({**data, "on_overlength": "drop"})
    prepared = prepare(config, renderer)
    parts = show_preview(prepared, renderer, config, 2, colour=False).split("\n\n")
    assert parts[:2] == [show_row(e, renderer, colour=False) for e in prepared.train[:2]]
    whole = prepare(config.model_copy(update={"max_length": 1024}), renderer).train
    assert len(whole) == len(prepared.train) + 1
    sizes = [len(example.encoded.ids) for example in whole]
    assert parts[2] == "LENGTHS (tokens)\n" + show_lengths(sizes, 60)
    [near] = prepared.ledger.near_duplicates
    assert parts[3] == (
        f"LEDGER\n{show_ledger(prepared)}\n"
        f"  {near.jaccard:.2f}  {data['train']}:5  ~  {data['test']}:2"
    )
    assert parts[4:] == ["BOS: none (the tokenizer adds none); stop tokens: <|im_end|>"]


def test_show_preview_says_that_each_row_has_one_bos(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", [{"prompt": "q", "completion": "a"}])
    renderer = Renderer(gemma_tokenizer(), load_template("gemma"))
    config = Data.model_validate({"train": str(path)})
    text = show_preview(prepare(config, renderer), renderer, config, 1, colour=False)
    assert text.splitlines()[-1] == (
        "BOS: exactly 1 in each row; stop tokens: <eos>, <end_of_turn>"
    )


@pytest.mark.parametrize("policy", ["drop", "truncate"])
def test_show_preview_says_what_max_length_did_cut(data: dict[str, Any], policy: str) -> None:
    renderer = Renderer(chatml_tokenizer())
    config = Data.model_validate({**data, "on_overlength": policy})
    text = show_preview(prepare(config, renderer), renderer, config, 0, colour=False)
    assert "max_length 60 would cut 1 rows" in text


def test_preview_shows_thoughts_tools_weights_and_what_was_left_out(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "id": 7,
        },
        {"messages": [{"role": "user", "content": "q"}]},
    ]
    rows[0]["weight"] = 0.5
    path = write_rows(tmp_path / "train.jsonl", rows)
    config = Data(train=str(path), on_malformed="drop", test_frac=0.01, max_length=12)
    renderer = Renderer(chatml_tokenizer())
    unlimited = prepare(config.model_copy(update={"max_length": 10**6}), renderer)
    text = show_preview(unlimited, renderer, config, 1, colour=False)
    assert f"{path}:1: 13 tokens, 2 supervised, weight 0.5\n" in text
    assert f"dropped, malformed: no assistant turn at the end: {path}:2" in text
    assert "ignored: id 1" in text
    assert "rows with a weight other than 1: 1" in text
    assert "note: data.test_frac 0.01 of 2 rows holds out none" in text
    faults = faults_of(unlimited, config)
    assert faults[0] == "1 rows: malformed: no assistant turn at the end"
    assert faults[1] == "1 rows: longer than data.max_length 12"
    assert faults[2].startswith("data.test_frac 0.01 of 2 rows holds out none")


def test_page_of_rows_marks_what_is_learnt_and_escapes_it(tmp_path: Path) -> None:
    row = {"prompt": "<script>alert(1)</script>", "completion": "<b>&amp;"}
    path = write_rows(tmp_path / "train.jsonl", [row])
    config, renderer = Data(train=str(path)), Renderer(chatml_tokenizer())
    page = preview_page(prepare(config, renderer), renderer, config, 3)
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<mark>&lt;b&gt;&amp;amp;&lt;|im_end|&gt;</mark>" in page
    assert "Faults" not in page
