"""Opponents with the base: retrieved examples, the allowed answers in the prompt, ranked answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from test_opponents import COLOURS, labelled, row
from toys import OPENS_THOUGHTS

from halfbyte.config import Run, model_run
from halfbyte.data.chat_template import load_template
from halfbyte.data.conversation import Row
from halfbyte.data.questions import questions
from halfbyte.data.render import Renderer
from halfbyte.eval.base_opponents import NEEDS, BaseOpponent, base_opponents, rank
from halfbyte.eval.likeness import Examples, Likeness
from halfbyte.eval.measure import Variant, measure
from halfbyte.eval.opponents import opponent_names
from halfbyte.eval.variants import Contender, load_scored
from halfbyte.generate import continuous
from halfbyte.generate.continuous import SlotGenerator
from halfbyte.generate.grammar import Grammars, consume
from halfbyte.generate.slot_model import SlotModel
from halfbyte.model.load import Loaded
from halfbyte.model.precision import Compute
from halfbyte.model.resolve import resolve_base
from halfbyte.model.tokenizer import load_tokenizer

CPU32 = Compute(torch.device("cpu"), torch.float32, "test")
ALL = "eval.opponents=[base-full-retrieval, base-full-choices, base-full-instructed]"
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["blue", "green"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> Loaded:
    return load_scored(resolve_base(str(tiny_llama)), "fp32", CPU32, model_run("org/tiny", []))


@pytest.fixture(scope="module")
def renderer(tiny_llama: Path) -> Renderer:
    return Renderer(load_tokenizer(resolve_base(str(tiny_llama))), load_template("hermes"))


def opponents_of(
    train: list[Row], held: list[Row], renderer: Renderer, run: Run, context: int = 9999
) -> tuple[dict[str, BaseOpponent], list[str]]:
    likeness = Likeness(Examples.of(train, renderer), Examples.of(held, renderer))
    made, notes = base_opponents(likeness, questions(held, renderer), renderer, run, context)
    return {one.name: one for one in made}, notes


def measured(opponent: BaseOpponent, loaded: Loaded, renderer: Renderer, run: Run) -> Variant:
    contender = Contender(
        opponent.name, "", loaded.model, 0, opponent.questions, renderer, (), opponent
    )
    return measure(contender, run)


def test_retrieval_shows_each_question_its_nearest_rows(renderer: Renderer) -> None:
    run = model_run("org/tiny", [ALL, "eval.fewshot=2"])
    made, _ = opponents_of(labelled(60, 0), [row("leaf, please, 1", "green")], renderer, run)
    (asked,) = made["base-full-retrieval"].questions
    text = renderer.decode(asked.prompt)
    before, question = text.rsplit("leaf, please, 1", 1)
    assert "green" not in question
    assert before.count("green") == 2
    assert before.count("leaf, please, 1") == 2  # the same prompt is the most similar one


def test_retrieval_shows_as_many_rows_as_the_base_can_read(renderer: Renderer) -> None:
    run = model_run("org/tiny", [ALL, "eval.fewshot=4", "eval.max_new_tokens=8"])
    held = [row("leaf, please, 1", "green")]
    made, _ = opponents_of(labelled(60, 0), held, renderer, run)
    (whole,) = made["base-full-retrieval"].questions
    made, _ = opponents_of(labelled(60, 0), held, renderer, run, len(whole.ids) + 7)
    (cut,) = made["base-full-retrieval"].questions
    assert whole.ids[-len(cut.ids) :] == cut.ids
    assert renderer.decode(cut.prompt).count("green") == 3
    made, _ = opponents_of(labelled(60, 0), held, renderer, run, 1)
    assert made["base-full-retrieval"].questions == questions(held, renderer)


def test_ranked_answers_are_scored_as_the_harness_scores_choices(
    loaded: Loaded, renderer: Renderer, tiny_llama: Path
) -> None:
    run = model_run("org/tiny", [ALL])
    made, _ = opponents_of(labelled(60, 0), labelled(12, 1), renderer, run)
    opponent = made["base-full-choices"]
    assert opponent.choices is not None
    assert opponent.choices.texts == sorted(COLOURS.values())
    ours = rank(loaded.model, opponent.questions, opponent.choices.ids, 4)
    tokenizer = load_tokenizer(resolve_base(str(tiny_llama)))
    lm = HFLM(pretrained=loaded.model, tokenizer=tokenizer, batch_size=1)
    requests = [
        (("", ""), one.prompt, ids) for one in opponent.questions for ids in opponent.choices.ids
    ]
    theirs = [score for score, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)]
    assert ours.flatten().tolist() == pytest.approx(theirs, abs=1e-6 * max(map(abs, theirs)))
    # From texts the harness counts the line's end before the answer with the answer: the same for all of them.
    one = opponent.questions[0]
    context = tokenizer.decode(one.prompt)
    texts = [Instance("loglikelihood", {}, (context, text), 0) for text in opponent.choices.texts]
    from_text = [score for score, _ in lm.loglikelihood(texts, disable_tqdm=True)]
    (end,) = lm._loglikelihood_tokens([(("", ""), one.prompt[:-1], one.prompt[-1:])])
    assert context.endswith("\n")
    assert (ours[0] + end[0]).tolist() == pytest.approx(from_text, rel=1e-6)


def test_the_ranked_answer_is_the_likeliest(loaded: Loaded, renderer: Renderer) -> None:
    run = model_run("org/tiny", [ALL])
    made, _ = opponents_of(labelled(60, 0), labelled(12, 1), renderer, run)
    opponent = made["base-full-choices"]
    assert opponent.choices is not None
    scores = rank(loaded.model, opponent.questions, opponent.choices.ids, 4)
    variant = measured(opponent, loaded, renderer, run)
    assert variant.losses == []
    lengths = [len(text) for text in opponent.choices.texts]
    scaled = scores / lengths if "per character" in variant.what else scores
    best = [opponent.choices.texts[number] for number in scaled.argmax(axis=1)]
    assert variant.answers == best


def test_instructed_answers_are_of_the_set(loaded: Loaded, renderer: Renderer) -> None:
    run = model_run("org/tiny", [ALL])
    made, _ = opponents_of(labelled(60, 0), labelled(12, 1), renderer, run)
    opponent = made["base-full-instructed"]
    prompt = renderer.decode(opponent.questions[0].prompt)
    assert "one of these:\nblue\ngreen\nred" in prompt
    free = replace(opponent, allowed=None)
    assert not set(measured(free, loaded, renderer, run).answers) & set(COLOURS.values())
    variant = measured(opponent, loaded, renderer, run)
    assert set(variant.answers) <= set(COLOURS.values())
    assert variant.finish_reasons == ["stop"] * 12
    assert variant.losses == []


def test_instructed_answers_follow_the_schema(
    loaded: Loaded, renderer: Renderer, tmp_path: Path
) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    keys = [ALL, "eval.metrics=[schema_valid]", f"eval.json_schema={path}"]
    run = model_run("org/tiny", keys)
    rows = [row(f"thing {n}", json.dumps({"colour": "blue", "n": n})) for n in range(9)]
    made, _ = opponents_of(rows, rows[:3], renderer, run)
    assert list(made) == ["base-full-retrieval", "base-full-instructed"]
    variant = measured(made["base-full-instructed"], loaded, renderer, run)
    assert variant.scores["schema_valid"] == [1.0] * 3
    assert all(set(json.loads(answer)) == {"colour"} for answer in variant.answers)


def test_what_costs_too_much_is_left_out_with_a_note(renderer: Renderer) -> None:
    words = [f"{a}{b}" for a in "abcdefgh" for b in "klmnopqr"]
    train = [row(f"{n} {word}", f"{word} and {word}") for word in words for n in range(2)]
    held = train[:60]
    made, notes = opponents_of(train, held, renderer, model_run("org/tiny", []))
    assert list(made) == ["base-full-retrieval"]
    assert [note.split(" was")[0] for note in notes] == [
        "base-full-choices",
        "base-full-instructed",
    ]
    assert "with base-full-retrieval it reads" in notes[1]
    # Where the others leave enough, the set of answers is named too.
    made, notes = opponents_of(
        train,
        held,
        renderer,
        model_run("org/tiny", ["eval.max_opponent_growth=9", "eval.fewshot=1"]),
    )
    assert list(made) == ["base-full-retrieval", "base-full-instructed"]
    for free in ("eval.max_opponent_growth=null", ALL):
        made, notes = opponents_of(train, held, renderer, model_run("org/tiny", [free]))
        assert "base-full-choices" in made
        assert notes == []


@pytest.mark.parametrize(("named", "reason"), NEEDS.items())
def test_one_that_is_named_and_does_not_apply_is_said(
    renderer: Renderer, named: str, reason: str
) -> None:
    rows = [row(f"Which {word} is it?", f"{word} it is") for word in "abcdefghijkl"]
    likeness = Likeness(Examples.of(rows[:9], renderer), Examples.of(rows[9:], renderer))
    run = model_run("org/tiny", [f"eval.opponents=[{named}]"])
    names, notes = opponent_names(likeness, run)
    plain = questions(rows[9:], renderer)
    made, more = base_opponents(likeness, plain, renderer, run, 4096)
    assert [*names, *made] == []
    assert [*notes, *more] == [f"{named} was left out: {reason}."]
    _, notes = opponent_names(likeness, model_run("org/tiny", []))
    assert notes == []


def test_retrieval_shows_as_many_rows_as_the_limit_leaves(renderer: Renderer) -> None:
    held = labelled(12, 1)
    plain = sum(len(one.ids) for one in questions(held, renderer))
    sizes = {}
    for growth in (0.1, 2.5, 4.0, 99.0):
        run = model_run("org/tiny", [f"eval.max_opponent_growth={growth}"])
        made, _ = opponents_of(labelled(60, 0), held, renderer, run)
        opponent = made.get("base-full-retrieval")
        if opponent is not None:
            sizes[growth] = sum(len(one.ids) for one in opponent.questions) / plain
            assert (" leaves " in opponent.what) == (growth < 99)
    assert sorted(sizes) == [2.5, 4.0, 99.0]
    assert sizes[2.5] <= 2.5 < sizes[4.0] <= 4.0 < sizes[99.0]


def test_tokens_without_a_choice_are_not_generated(
    loaded: Loaded, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab_size = len(loaded.model.get_output_embeddings().weight)
    grammars = Grammars(renderer, vocab_size, may_think=False)
    texts = ["the colour of leaves is green", "red as the colour of tomatoes", "the sky: blue"]
    prompts = [one.prompt for one in questions(labelled(12, 1), renderer)]

    def answers_and_passes() -> tuple[list[str], int]:
        with mock.patch.object(SlotModel, "logits", autospec=True, side_effect=logits) as passes:
            answers = SlotGenerator(loaded.model, 5, grammars.of_texts(texts)).generate(
                prompts, stop_ids=renderer.stop_ids, max_new_tokens=40
            )
        assert {answer.finish_reason for answer in answers} == {"stop"}
        return [renderer.decode(answer.ids) for answer in answers], passes.call_count

    def one_token(matcher: Any, token: int) -> list[int]:
        consume(matcher, token)
        return [token]

    logits = SlotModel.logits
    answers, few = answers_and_passes()
    assert set(answers) <= set(texts)
    monkeypatch.setattr(continuous, "follow", one_token)
    token_by_token, many = answers_and_passes()
    assert answers == token_by_token
    assert few < many / 2


def test_a_schema_that_no_grammar_follows_leaves_a_note(renderer: Renderer, tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({**SCHEMA, "not": {"required": ["x"]}}))
    run = model_run("org/tiny", ["eval.metrics=[schema_valid]", f"eval.json_schema={path}"])
    rows = [row(f"thing {n}", json.dumps({"colour": "blue", "n": n})) for n in range(9)]
    made, notes = opponents_of(rows, rows[:3], renderer, run)
    assert "base-full-instructed" not in made
    assert notes[0].startswith("base-full-instructed was left out: ")


def test_a_template_without_system_messages_reads_the_instruction_first(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(resolve_base(str(tiny_llama)))
    template = """{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}\
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
    renderer = Renderer(tokenizer, template)
    run = model_run("org/tiny", [ALL])
    made, notes = opponents_of(labelled(60, 0), labelled(3, 1), renderer, run)
    assert notes == []
    text = renderer.decode(made["base-full-instructed"].questions[0].prompt)
    assert "Answer with one of these:\nblue\ngreen\nred\n\n" in text


def test_thoughts_that_the_prompt_opens_are_no_part_of_the_set(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(resolve_base(str(tiny_llama)))
    renderer = Renderer(tokenizer, OPENS_THOUGHTS)
    run = model_run("org/tiny", [ALL])
    made, notes = opponents_of(labelled(60, 0), labelled(3, 1), renderer, run)
    assert notes == []
    text = renderer.decode(made["base-full-instructed"].questions[0].prompt)
    assert "Answer with one of these:\nblue\ngreen\nred" in text
    choices = made["base-full-choices"].choices
    assert choices is not None
    assert choices.texts == ["blue", "green", "red"]
    assert all(renderer.decode(ids).count("</think>") <= 1 for ids in choices.ids)


def test_free_answers_have_the_retrieval_alone(renderer: Renderer) -> None:
    rows = [row(f"say {n}", f"words number {n}") for n in range(30)]
    made, _ = opponents_of(rows, rows[:2], renderer, model_run("org/tiny", [ALL]))
    assert list(made) == ["base-full-retrieval"]
