"""Generation in slots: the answers of transformers' generate(), whatever shares a pass with what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.config.schema import Adapter
from halfbyte.data.encoded import IGNORED
from halfbyte.forward.packed import add_token_loss
from halfbyte.forward.scoring import row_scores
from halfbyte.generate import continuous
from halfbyte.generate.batched import Answer, generate
from halfbyte.generate.continuous import SlotGenerator, Spent, slots_refusal
from halfbyte.generate.slot_model import SlotModel, token_bytes
from halfbyte.model.adapter import attach_adapter
from halfbyte.model.load import load_model
from halfbyte.model.precision import Compute
from halfbyte.model.quantised import unpack_layers
from halfbyte.model.resolve import resolve_base

CPU32 = Compute(torch.device("cpu"), torch.float32, "test")
STEM = [11, 12, 13, 14, 15, 16]
PROMPTS = [[*STEM, *range(20, 20 + n)] for n in (3, 9, 1, 5, 17, 2, 30, 4)]


@pytest.fixture(params=[1, 128], ids=["stem apart", "stem copied"])
def model(tiny_llama: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model in slots that keep what all prompts begin with once, or each for itself."""
    monkeypatch.setattr(continuous, "MIN_SHARED_TOKENS", request.param)
    loaded = load_model(resolve_base(str(tiny_llama)), "fp32", compute=CPU32)
    assert add_token_loss(loaded.model) == ""
    return loaded.model


def plain(model: Any, prompts: list[list[int]], stop_ids: list[int]) -> list[Answer]:
    return generate(model, prompts, stop_ids=stop_ids, pad_id=2, max_new_tokens=12, batch_rows=1)


def some_stop(model: Any) -> list[int]:
    """A token at which some answers end, at different places."""
    free = plain(model, PROMPTS, [2])
    return [free[0].ids[4], free[1].ids[7]]


@pytest.mark.parametrize("num_slots", [1, 3, 8, 20])
def test_answers_are_those_of_one_prompt_at_a_time(model: Any, num_slots: int) -> None:
    stop_ids = some_stop(model)
    wanted = plain(model, PROMPTS, stop_ids)
    assert {answer.finish_reason for answer in wanted} == {"stop", "length"}
    done: list[int] = []
    spent = Spent()
    answers = SlotGenerator(model, num_slots).generate(
        PROMPTS, stop_ids=stop_ids, max_new_tokens=12, progress=done.append, spent=spent
    )
    assert answers == wanted
    assert done == sorted(done)
    assert done[-1] == len(PROMPTS)
    # The stem is read once, the rest of each prompt once; each answer but its first token by itself.
    assert spent.prompt_tokens + spent.answer_tokens == (
        len(STEM)
        + sum(len(prompt) - len(STEM) for prompt in PROMPTS)
        + sum(len(a.ids) + (a.finish_reason == "stop") - 1 for a in wanted)
    )
    assert model.config._attn_implementation == "halfbyte"


def test_answers_go_on_from_what_is_known_of_them(model: Any) -> None:
    stop_ids = some_stop(model)
    wanted = plain(model, PROMPTS, stop_ids)
    ended = {n: [*a.ids, stop_ids[0]] for n, a in enumerate(wanted) if a.finish_reason == "stop"}
    begun = [ended.get(n, answer.ids)[: 3 * n] for n, answer in enumerate(wanted)]
    spent = Spent()
    answers = SlotGenerator(model, 3).generate(
        PROMPTS, stop_ids=stop_ids, max_new_tokens=12, begun=begun, spent=spent
    )
    assert [a.ids for a in answers] == [a.ids for a in wanted]
    assert [a.finish_reason for a in answers] == [a.finish_reason for a in wanted]
    nothing = Spent()
    SlotGenerator(model, 3).generate(
        PROMPTS[:1], stop_ids=[2], max_new_tokens=2, begun=[[5, 6]], spent=nothing
    )
    assert nothing == Spent()
    # What is known ends, but later than an answer may.
    (cut,) = SlotGenerator(model, 3).generate(
        PROMPTS[:1], stop_ids=[2], max_new_tokens=2, begun=[[5, 6, 2]]
    )
    assert cut == Answer([5, 6], "length")


@pytest.mark.parametrize("logit_tokens", [1, 512])
def test_what_is_wanted_is_scored_where_the_prompt_is_read(
    model: Any, logit_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous, "LOGIT_TOKENS", logit_tokens)
    stop_ids = some_stop(model)
    free = plain(model, PROMPTS, stop_ids)
    said = [[*a.ids, *stop_ids[:1]] if a.finish_reason == "stop" else a.ids for a in free]
    # The model's own answer, one that leaves it after some tokens, longer than an answer may be, or none.
    changed = [[*ids[:n], 77, 78, *ids[n:]] for n, ids in enumerate(said)]
    wanted = [said[0], *changed[1:6], [*said[6], *range(40, 60)], []]
    spent = Spent()
    answers = SlotGenerator(model, 3).generate(
        PROMPTS, stop_ids=stop_ids, max_new_tokens=12, wanted=wanted, spent=spent
    )
    assert [a.ids for a in answers] == [a.ids for a in free]
    assert [a.finish_reason for a in answers] == [a.finish_reason for a in free]
    rows = [
        ([*prompt, *answer], [IGNORED] * len(prompt) + answer)
        for prompt, answer in zip(PROMPTS, wanted, strict=True)
        if answer
    ]
    scores = spent.scores
    assert sorted(scores) == list(range(7))
    for number, (loss, hits) in enumerate(row_scores(model, rows, 4)):
        assert scores[number][0] == pytest.approx(loss, rel=1e-5)
        assert scores[number][1] == hits
    assert all(scores[0][1])
    assert not all(scores[3][1])


def test_all_prompts_for_which_there_are_slots_begin_at_once(model: Any) -> None:
    passes: list[int] = []
    run = SlotModel.logits

    def noted(self: Any, inputs: Any) -> Any:
        passes.append(len(inputs))
        return run(self, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlotModel, "logits", noted)
        patch.setattr(continuous, "PROMPT_TOKENS", 20)  # so that they are read in several passes
        SlotGenerator(model, 8).generate(PROMPTS, stop_ids=[], max_new_tokens=12)
    assert max(passes) == 8


def test_an_answer_ends_where_its_ids_say_so(model: Any) -> None:
    wanted = plain(model, PROMPTS, [2])
    last = {tuple(wanted[0].ids[3:5]), tuple(wanted[1].ids[6:8])}

    def whole(ids: list[int]) -> Answer:
        for end in range(2, len(ids) + 1):
            if tuple(ids[end - 2 : end]) in last:
                return Answer(ids[:end], "stop")
        return Answer(ids, "length")

    answers = SlotGenerator(model, 3).generate(
        PROMPTS, stop_ids=[2], max_new_tokens=12, ends=lambda ids: tuple(ids[-2:]) in last
    )
    assert answers == [whole(answer.ids) for answer in wanted]
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}


def test_slots_are_as_many_as_memory_has_room_for(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = plain(model, PROMPTS, [2])
    text = model.config.get_text_config()
    apart = len(STEM) if continuous.MIN_SHARED_TOKENS == 1 else 0
    a_slot = (max(map(len, PROMPTS)) - apart + 12) * token_bytes(text, torch.float32)
    used: list[int] = []

    def noted(*given: Any, num_slots: int, **options: Any) -> Any:
        used.append(num_slots)
        return SlotModel(*given, num_slots=num_slots, **options)

    monkeypatch.setattr(continuous, "SlotModel", noted)
    for free, most in ((0, 1), (2 * 4 * a_slot, 4), (400 * a_slot, 8)):
        monkeypatch.setattr(continuous, "free_bytes", lambda device, free=free: free)
        answers = SlotGenerator(model, 8).generate(PROMPTS, stop_ids=[2], max_new_tokens=12)
        assert answers == wanted
        assert used.pop() == most
    SlotGenerator(model).generate(PROMPTS[:3], stop_ids=[2], max_new_tokens=12)
    assert used.pop() == 3  # no more than there are prompts


def test_an_adapter_is_used_while_it_is_on(model: Any, tmp_path: Path, tiny_llama: Path) -> None:
    loaded = load_model(resolve_base(str(tiny_llama)), "nf4", compute=CPU32)
    add_token_loss(loaded.model)
    adapted = attach_adapter(loaded, Adapter(r=4), 0, tmp_path)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    with adapted.disable_adapter():
        base = plain(adapted, PROMPTS, [2])
    tuned = plain(adapted, PROMPTS, [2])
    assert tuned != base
    unpack_layers(adapted, torch.float32)
    assert any("lora_A" in name for name, _ in adapted.named_parameters())
    assert slots_refusal(adapted) == ""
    in_slots = SlotGenerator(adapted, 4)
    assert in_slots.generate(PROMPTS, stop_ids=[2], max_new_tokens=12) == tuned
    with adapted.disable_adapter():
        assert in_slots.generate(PROMPTS, stop_ids=[2], max_new_tokens=12) == base


def test_a_model_that_cannot_is_named(tiny_llama: Path) -> None:
    loaded = load_model(resolve_base(str(tiny_llama)), "fp32", compute=CPU32)
    assert "does not take halfbyte's attention" in slots_refusal(loaded.model)
    add_token_loss(loaded.model)
    original = loaded.model.model.layers[1].self_attn.forward

    def forgetful(*arguments: Any, **options: Any) -> Any:
        hidden, weights = original(*arguments, **options)
        return hidden * (1 if hidden.shape[1] == 24 else 0.5), weights

    loaded.model.model.layers[1].self_attn.forward = forgetful
    assert "logits differ by" in slots_refusal(loaded.model)
