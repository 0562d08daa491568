"""Batches of rows: the same ids, labels and errors as a plain rendering of each row by itself."""

from __future__ import annotations

import random
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_render import CONVERSATIONS, renderers, row_of
from toys import chatml_tokenizer, gemma_tokenizer

from halfbyte.data import tokenise
from halfbyte.data.chat_template import load_template
from halfbyte.data.conversation import Message, Row
from halfbyte.data.encoded import IGNORED, Encoded
from halfbyte.data.render import Renderer
from halfbyte.data.tokenise import plain_ids
from halfbyte.errors import DataError

ODD = ["<|im_end|>", "<|im_start|>", "<|im_", "end|>", "<eos>", "<bos>", "<end_of_turn>", "<end_"]
ODD += [
    "<",
    ">",
    "|",
    " ",
    "\n",
    "\u2003",
    "\u00a0",
    "é",
    "東",
    "😀",
    "e\u0301",
    "\x00",
    "\r\n",
    "x",
]
ODD += [
    "heart attack",
    "Answer:",
    "assistant",
    "{{ x }}",
    "</s>",
    "▁",
    "\ufeff",
    "of_turn>",
    "<pad>",
]
ROLES = [
    ("user", "assistant"),
    ("system", "user", "assistant"),
    ("user", "assistant", "user", "assistant"),
    ("system", "user", "assistant", "user", "assistant", "user", "assistant"),
]


def odd_row(source: random.Random, place: str) -> Row:
    if source.random() < 0.1:
        return Row(place, text="".join(source.choices(["heart", " ", "é", "attack\n"], k=5)) + ".")
    contents = ["".join(source.choices(ODD, k=source.randint(1, 6))) for _ in range(7)]
    filled = [content if content.strip() else "a" for content in contents]
    return row_of(list(zip(source.choice(ROLES), filled, strict=False)), place)


def veiled(content: str) -> str:
    """Each character replaced by another that stands for it; spaces stay, because templates trim."""
    return "".join(c if c.isspace() else chr(0x100000 + ord(c) % 0xFFF0) for c in content)


def tokens(renderer: Renderer, text: str, unveil: dict[str, str], anchor: str | None) -> list[int]:
    """Ids of veiled text, one call for each segment; what stands unveiled in it was written by the template."""
    tokenizer: Any = renderer.tokenizer
    longest_first = sorted(renderer._special_tokens.strings, key=lambda token: (-len(token), token))
    special_tokens = re.compile("|".join(map(re.escape, longest_first)))
    ids: list[int] = []
    parts = re.split(f"({special_tokens.pattern})", text)
    for plain, token in zip(parts[::2], [*parts[1::2], None], strict=True):
        shown = "".join(unveil.get(char, char) for char in plain)
        cuts = [0, *(match.start() + 1 for match in special_tokens.finditer(shown)), len(shown)]
        for start, end in pairwise(cuts):
            if start < end:
                new = tokenizer((anchor or "") + shown[start:end], add_special_tokens=False)
                ids += new.input_ids[1:] if anchor else new.input_ids
        if token is not None:
            ids.append(tokenizer.convert_tokens_to_ids(token))
            anchor = token
    return ids


def plainly(renderer: Renderer, messages: tuple[Message, ...]) -> tuple[list[int], list[int]]:
    """Ids and labels by the rules alone, with the template run for the whole and for each answer."""
    tokenizer: Any = renderer.tokenizer
    stop, bos = renderer.tokenizer.convert_ids_to_tokens(renderer.stop_id), str(tokenizer.bos_token)
    unveil = {veiled(char): char for message in messages for char in message.content}
    adds_bos = tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]

    def rendered(turns: list[dict[str, str]], prompt: bool) -> str:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        return bos + str(text) if adds_bos and not text.startswith(bos) else str(text)

    turns = [{"role": m.role, "content": veiled(m.content)} for m in messages]
    whole = rendered(turns, prompt=False)
    ids: list[int] = []
    labels: list[int] = []
    at = 0
    for number, message in enumerate(messages):
        if message.role == "assistant":
            begin = len(rendered(turns[:number], prompt=True))
            end = whole.index(stop, begin) + len(stop)
            before = tokens(renderer, whole[at:begin], unveil, stop if at else None)
            answer = tokens(renderer, whole[begin:end], unveil, stop)
            ids += before + answer
            labels += [IGNORED] * len(before) + answer
            at = end
    return ids, labels


def results_of(renderer: Renderer, rows: list[Row]) -> list[Encoded | str]:
    return [str(e) if isinstance(e, DataError) else e[0] for e in renderer.try_rows(rows)]


def one_by_one(renderer: Renderer, rows: list[Row]) -> list[Encoded | str]:
    results: list[Encoded | str] = []
    for row in rows:
        try:
            results.append(renderer.encode_row(row))
        except DataError as error:
            results.append(str(error))
    return results


@pytest.mark.parametrize("make", renderers())
def test_encode_rows_gives_what_the_rules_give_for_each_row(make: Any) -> None:
    renderer: Renderer = make()
    source = random.Random(0)
    rows = [row_of(turns, name) for name, turns in CONVERSATIONS.items()]
    rows += [row for n in range(150) if (row := odd_row(source, f"row {n}")).text is None]
    results = renderer.encode_rows(rows)
    assert len(results) > 100
    for row, encoded in zip(rows, results, strict=True):
        ids, labels = plainly(renderer, row.messages)
        assert (encoded.ids, encoded.labels) == (ids, [IGNORED, *labels[1:]]), row
        assert encoded.place == row.place


@pytest.mark.parametrize("make", renderers())
def test_encode_rows_equals_encode_row_in_batches_of_any_size(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer: Renderer = make()
    source = random.Random(1)
    rows = [odd_row(source, f"row {n}") for n in range(90)]
    # Rows that cannot be rendered stand between the others.
    rows[7] = row_of([("user", "\U000f0000"), ("assistant", "x")], "bad 7")
    rows[40] = Row("bad 40", text=f"raw {renderer.tokenizer.eos_token}")
    alone = one_by_one(renderer, rows)
    assert [place for place in alone if isinstance(place, str)]
    assert results_of(renderer, rows) == alone
    for size, min_texts in ((1, 1), (13, 1), (64, 10**6)):
        monkeypatch.setattr(tokenise, "BATCH_ROWS", size)
        monkeypatch.setattr(tokenise, "MIN_PARALLEL_TEXTS", min_texts)
        assert results_of(renderer, rows) == alone
    assert renderer.encode_rows([]) == []


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(
            st.text(st.characters(codec="utf-8", max_codepoint=0xEFFFF), min_size=1).filter(
                str.strip
            ),
            min_size=2,
            max_size=2,
        ),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(["gemma", "plain", "chatml", "hermes"]),
)
def test_encode_rows_equals_the_rules_for_any_content(
    pairs: list[list[str]], template: str
) -> None:
    tokenizer = chatml_tokenizer() if template in ("chatml", "hermes") else gemma_tokenizer()
    renderer = Renderer(tokenizer, load_template(template))
    rows = [row_of([("user", prompt), ("assistant", answer)]) for prompt, answer in pairs]
    for row, encoded in zip(rows, renderer.encode_rows(rows), strict=True):
        chars = {char for message in row.messages for char in message.content}
        if len(set(map(veiled, chars))) == len(chars):
            ids, labels = plainly(renderer, row.messages)
            assert (encoded.ids, encoded.labels) == (ids, [IGNORED, *labels[1:]])


def test_encode_rows_raises_the_error_of_encode_row_for_the_first_bad_row() -> None:
    renderer = Renderer(chatml_tokenizer())
    good = row_of([("user", "a"), ("assistant", "b")])
    bad = [row_of([("user", "\U000f0000"), ("assistant", "b")], f"rows:{n}") for n in (2, 3)]
    with pytest.raises(DataError) as alone:
        renderer.encode_row(bad[0])
    with pytest.raises(DataError) as together:
        renderer.encode_rows([good, *bad, good])
    assert str(together.value) == str(alone.value)
    assert str(alone.value).startswith("rows:2: a user message holds a private-use character")


REJECTS = """\
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{- raise_exception('no system here') -}}{%- endif -%}
<|im_start|>{{ m.role }}\n{{ m.content if 'secret' not in m.content else 'hidden' }}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"""


@pytest.mark.parametrize("looks", [True, False])
def test_rows_that_a_template_rejects_get_its_message(looks: bool) -> None:
    template = (
        REJECTS if looks else REJECTS.replace(" if 'secret' not in m.content else 'hidden'", "")
    )
    renderer = Renderer(chatml_tokenizer(), template)
    rows = [
        row_of([("user", "a"), ("assistant", "b")], "good"),
        row_of([("system", "be brief"), ("user", "a"), ("assistant", "b")], "rejected"),
    ]
    results = results_of(renderer, rows)
    assert isinstance(results[0], Encoded)
    assert results[1] == (
        "rejected: the chat template rejects it: no system here. data.system_as=user puts a system message"
        " into the first user turn"
    )


def test_template_that_looks_into_contents_is_run_for_each_row() -> None:
    """A secret answer is hidden in the text of its row, and is no secret in another row."""
    renderer = Renderer(chatml_tokenizer(), REJECTS)
    rows = [row_of([("user", text), ("assistant", "b")]) for text in ("open", "secret", "open")]
    shown = [renderer.decode(e.ids) for e in renderer.encode_rows(rows)]
    assert ["hidden" in text for text in shown] == [False, True, False]
    assert renderer.encode_rows(rows)[1].changed


def test_plain_ids_do_not_depend_on_how_the_tokenizer_was_called_before() -> None:
    tokenizer = chatml_tokenizer()
    texts = ["heart attack of the wall", "fox"]
    wanted = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    tokenizer(texts, padding="max_length", truncation=True, max_length=3)
    assert plain_ids(tokenizer, texts) == wanted
