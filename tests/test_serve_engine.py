"""The engine: answers of many requests at once are those of each alone, from base and adapters."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.data.conversation import Message
from halfbyte.data.render import Renderer
from halfbyte.errors import ModelError
from halfbyte.forward.multi_lora import MixedLinear, mix_adapters
from halfbyte.forward.slot_paths import SlotInput
from halfbyte.generate.batched import generate
from halfbyte.generate.slot_model import SlotModel
from halfbyte.model.adapter import load_adapter
from halfbyte.model.precision import choose_compute, default_device
from halfbyte.model.quantised import unpack_layers
from halfbyte.serve.engine import Engine
from halfbyte.serve.jobs import Event, Job
from halfbyte.serve.sampling import Sampler, Sampling
from halfbyte.serve.text import TextStream
from halfbyte.trained.run import read_trained_run

pytestmark = pytest.mark.real
QUESTIONS = (
    "Hello",
    "Name the category: acute heart attack",
    "Name the category: asthma",
    "Hi " * 30,
)


class Run:
    """A trained run in fp32, its plain answers first, then as a backend."""

    def __init__(self, path: Path) -> None:
        trained = read_trained_run(path)
        folder = trained.folder.adapter
        loaded = trained.load_base(choose_compute("fp32", default_device()))
        model = load_adapter(loaded, folder, "first")
        loaded.model = model
        load_adapter(loaded, folder, "second")
        for name, parameter in model.named_parameters():
            if "lora_B.second" in name:
                parameter.data *= -2
        self.renderer: Renderer = trained.renderer
        self.prompts = [self.renderer.encode_prompt((Message("user", text),)) for text in QUESTIONS]
        self.plain: dict[str | None, list[list[int]]] = {}
        self.logits: dict[str | None, torch.Tensor] = {}
        for adapter in (None, "first", "second"):
            self._record_adapter(model, adapter)
        self.model: Any = model.get_base_model()
        mix_adapters(self.model)
        self.backend = SlotModel(self.model, num_slots=4, max_context=512, dtype=torch.float32)

    @torch.no_grad()
    def _record_adapter(self, model: Any, adapter: str | None) -> None:
        if adapter is None:
            with model.disable_adapter():
                self._record(model, None)
            return
        model.set_adapter(adapter)
        self._record(model, adapter)

    def _record(self, model: Any, adapter: str | None) -> None:
        answers = generate(
            model,
            self.prompts,
            stop_ids=self.renderer.stop_ids,
            pad_id=self.renderer.pad_id,
            max_new_tokens=12,
            batch_rows=1,
        )
        self.plain[adapter] = [answer.ids for answer in answers]
        self.logits[adapter] = torch.stack(
            [model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in self.prompts]
        )


@pytest.fixture(scope="module")
def served(merged_run: Path) -> Run:
    return Run(merged_run)


@pytest.fixture
def engine(served: Run) -> Iterator[Engine]:
    served.backend.forget()
    engine = Engine(served.backend, max_waiting=200)
    engine.start()
    yield engine
    engine.stop()


def make_job(
    served: Run, prompt: list[int], adapter: str | None, **options: Any
) -> tuple[Job, queue.Queue[Event]]:
    events: queue.Queue[Event] = queue.Queue()
    job = Job(
        prompt,
        adapter,
        Sampler(options.pop("sampling", Sampling())),
        TextStream(served.renderer.tokenizer.decode, options.pop("stops", ())),
        options.pop("max_tokens", 12),
        frozenset(served.renderer.stop_ids),
        events.put,
        time.monotonic() + options.pop("seconds", 60),
    )
    return job, events


def finish(events: queue.Queue[Event]) -> tuple[list[int], str, str | None]:
    ids, text = [], ""
    while True:
        event = events.get(timeout=60)
        ids += [sampled.token for sampled in event.tokens]
        text += event.text
        if event.finish_reason:
            return ids, text, event.finish_reason


@torch.inference_mode()
def test_slots_give_the_logits_of_each_alone(served: Run) -> None:
    served.backend.forget()
    adapters = (None, "first", "second", "first")
    begin = [SlotInput(n, a, served.prompts[n][:5], 0) for n, a in enumerate(adapters)]
    served.backend.run(begin)
    # The rest of two, all but one token of the others, and that token on its own.
    rest = [SlotInput(n, a, served.prompts[n][5:-1], 5) for n, a in enumerate(adapters)]
    served.backend.run(rest)
    last = [
        SlotInput(n, a, served.prompts[n][-1:], len(served.prompts[n]) - 1)
        for n, a in enumerate(adapters)
    ]
    logits = served.backend.run(last)
    for n, adapter in enumerate(adapters):
        torch.testing.assert_close(logits[n], served.logits[adapter][n], rtol=1e-4, atol=2e-4)
    assert not torch.allclose(served.logits["first"], served.logits["second"], atol=1e-2)
    assert not torch.allclose(served.logits["first"], served.logits[None], atol=1e-2)


def test_many_at_once_answer_as_each_alone(served: Run, engine: Engine) -> None:
    wanted = [(a, n) for a in (None, "first", "second") for n in range(len(QUESTIONS))] * 8
    jobs = [make_job(served, served.prompts[n], adapter) for adapter, n in wanted]
    assert engine.submit([job for job, _ in jobs])
    for (adapter, n), (_, events) in zip(wanted, jobs, strict=True):
        assert finish(events)[0] == served.plain[adapter][n]
    assert engine.counts.slot_inputs > 2 * engine.counts.passes  # they shared passes
    # Of each adapter's prompts one is computed, the other seven begin where it stands.
    assert engine.counts.shared_tokens > engine.counts.prompt_tokens / 2


def test_what_prompts_begin_with_is_computed_once(served: Run, engine: Engine) -> None:
    lead = served.prompts[3]
    jobs = [make_job(served, [*lead, token], "first", max_tokens=2) for token in range(50, 58)]
    assert engine.submit([job for job, _ in jobs])
    for _, events in jobs:
        finish(events)
    computed = engine.counts.prompt_tokens - engine.counts.shared_tokens
    assert computed == len(lead) + 8


def test_stop_strings_length_and_time_end_an_answer(served: Run, engine: Engine) -> None:
    longest = max((answer, n) for n, answer in enumerate(served.plain[None]))
    prompt, ids = served.prompts[longest[1]], longest[0]
    whole = served.renderer.tokenizer.decode(ids)
    stop = whole[3:5]
    job, events = make_job(served, prompt, None, stops=(stop,))
    engine.submit([job])
    assert finish(events)[1:] == (whole[: whole.index(stop)], "stop")
    job, events = make_job(served, prompt, None, max_tokens=3)
    engine.submit([job])
    assert finish(events)[::2] == (ids[:3], "length")
    job, events = make_job(served, prompt, None, seconds=-1)
    engine.submit([job])
    assert finish(events)[::2] == ([], "timeout")


def test_a_seed_repeats_an_answer_and_log_probabilities_add_up(served: Run, engine: Engine) -> None:
    answers = []
    for seed in (1, 1, 2):
        sampling = Sampling(temperature=1.5, seed=seed, top_logprobs=3)
        job, events = make_job(served, served.prompts[0], "first", sampling=sampling)
        engine.submit([job])
        answers.append(finish(events)[0])
    assert answers[0] == answers[1] != answers[2]
    sampled = Sampler(Sampling(top_logprobs=20)).sample(served.logits[None][0])
    expected = torch.log_softmax(served.logits[None][0], dim=-1)
    assert sampled.logprob == pytest.approx(float(expected.max()))
    assert [token for token, _ in sampled.top] == expected.topk(20).indices.tolist()


def test_nucleus_leaves_out_the_unlikely() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, -5.0])
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.9, seed=0))
    assert {sampler.sample(logits).token for _ in range(200)} == {0, 1}
    for temperature, top_p in ((2.0, 5e-324), (5e-324, 1.0)):
        sampler = Sampler(Sampling(temperature=temperature, top_p=top_p, seed=0))
        assert {sampler.sample(logits).token for _ in range(20)} == {int(logits.argmax())}


def test_a_failing_pass_ends_its_requests_and_no_others(
    served: Run, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = served.backend.run

    def fail(inputs: Any) -> torch.Tensor:
        monkeypatch.setattr(served.backend, "run", whole)
        raise RuntimeError("broken")

    monkeypatch.setattr(served.backend, "run", fail)
    job, events = make_job(served, served.prompts[0], None)
    engine.submit([job])
    assert finish(events)[2] == "error"
    job, events = make_job(served, served.prompts[0], None)
    engine.submit([job])
    assert finish(events)[0] == served.plain[None][0]


def test_cancelled_and_surplus_requests_get_no_slot(served: Run) -> None:
    engine = Engine(served.backend, max_waiting=1)
    first, events = make_job(served, served.prompts[0], None)
    assert engine.submit([first])
    assert not engine.submit([make_job(served, served.prompts[0], None)[0]])
    engine.cancel(first)
    engine.start()
    assert finish(events)[2] == "cancelled"
    engine.stop()


def test_unpacked_weights_are_those_that_4_bits_stand_for(served: Run) -> None:
    served.backend.forget()
    slot_input = SlotInput(0, "first", served.prompts[1], 0)
    packed = served.backend.run([slot_input])
    unpack_layers(served.model, torch.float32)
    served.backend.forget()
    torch.testing.assert_close(served.backend.run([slot_input]), packed, rtol=1e-4, atol=2e-4)


def test_dora_is_refused() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    model = get_peft_model(tiny, LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ModelError, match="DoRA, which cannot be mixed"):
        mix_adapters(model)


@pytest.mark.parametrize(
    ("stops", "expected"), [((), "a€ stopper"), (("stop",), "a€ "), (("€", "a€ s"), "a")]
)
def test_text_comes_whole_and_without_stop_strings(stops: tuple[str, ...], expected: str) -> None:
    content = "a€ stopper".encode()
    stream = TextStream(lambda ids: bytes(ids).decode("utf-8", "replace"), stops)
    pieces = []
    for byte in content:
        pieces.append(stream.push(byte))
        if stream.stopped:
            break
    pieces.append(stream.flush())
    assert "".join(pieces) == expected
    assert "\ufffd" not in "".join(pieces)


# --- scheduling and faults, on a backend that computes nothing ---


class Counting:
    """A backend that names as the next token the number of tokens of the slot."""

    num_slots, max_context, vocab_size, can_copy = 4, 10_000, 50, False
    device, unused_bytes = torch.device("cpu"), 0

    def __init__(self) -> None:
        self.broken: set[str] = set()

    def run(self, inputs: Sequence[SlotInput]) -> torch.Tensor:
        """As ``Backend.run``."""
        self._may("run")
        return torch.nn.functional.one_hot(
            torch.tensor([slot.end % self.vocab_size for slot in inputs]), self.vocab_size
        ).float()

    def keep(self, slot: int, length: int) -> int:
        """As ``Backend.keep``."""
        self._may("keep")
        return length

    def copy(self, source: int, target: int, length: int) -> None:
        """Never called."""
        raise NotImplementedError

    def forget(self) -> None:
        """As ``Backend.forget``."""
        self._may("forget")

    def _may(self, what: str) -> None:
        if what in self.broken:
            raise RuntimeError(f"{what} is broken")


def counted(prompt: list[int], max_tokens: int, emit: Any) -> Job:
    stream = TextStream(lambda ids: "".join(chr(97 + token % 26) for token in ids))
    return Job(
        prompt,
        None,
        Sampler(Sampling()),
        stream,
        max_tokens,
        frozenset(),
        emit,
        time.monotonic() + 60,
    )


def test_no_prompt_waits_for_those_that_came_later() -> None:
    """Long prompts from steady clients: whoever came first is computed first, in whatever slot."""
    engine = Engine(Counting(), max_waiting=100)
    begun: list[int] = []

    def ask(number: int) -> None:
        if number >= 200:
            return

        def emit(event: Event) -> None:
            if event.tokens:
                begun.append(number)
            if event.finish_reason:
                ask(number + Counting.num_slots)  # a client asks again at once

        # Each begins differently, and is longer than what a pass takes of prompts.
        engine.submit([counted([number % 7, *range(700)], 1, emit)])

    for number in range(Counting.num_slots):
        ask(number)
    while engine.num_waiting or engine.num_running:
        engine._step()
    assert sorted(begun) == list(range(200))
    late = [abs(place - number) for place, number in enumerate(begun)]
    assert max(late) <= Counting.num_slots


def test_what_is_wrong_with_one_answer_ends_no_other(served: Run, engine: Engine) -> None:
    class Broken:
        def compute_bitmask(self) -> bytes:
            raise RuntimeError("broken")

    good, events = make_job(served, served.prompts[0], None)
    bad, faults = make_job(served, served.prompts[1], None)
    bad.sampler.matcher = Broken()
    engine.submit([good, bad])
    assert finish(faults)[2] == "error"
    ids, _, reason = finish(events)
    assert reason in ("stop", "length")
    assert ids == served.plain[None][0]
    assert engine.failure is None


@pytest.mark.parametrize("part", ["run", "forget"])
def test_a_model_that_answers_nothing_any_more_is_given_up(part: str) -> None:
    backend = Counting()
    backend.broken = {"run", part}
    engine = Engine(backend, max_waiting=100)
    events: queue.Queue[Event] = queue.Queue()
    jobs = [counted([1, 2, number], 2, events.put) for number in range(12)]
    assert engine.submit(jobs)
    engine.start()
    ends = [events.get(timeout=20).finish_reason for _ in jobs]
    assert set(ends) == {"error"}
    engine._thread.join(20)
    assert engine.failure == f"RuntimeError: {part} is broken"
    assert not engine.submit([counted([1], 1, events.put)])
    assert engine.num_waiting == engine.num_running == 0


def test_a_request_that_breaks_each_pass_it_is_in_leaves_the_model_to_others() -> None:
    """A client that asks again and again does not take the model from everybody."""
    backend = Counting()
    engine = Engine(backend, max_waiting=100)
    poison = 7

    def run(inputs: Sequence[SlotInput]) -> torch.Tensor:
        if any(poison in slot.ids for slot in inputs):
            raise RuntimeError("poison")
        return Counting.run(backend, inputs)

    backend.run = run  # type: ignore[method-assign]
    engine.start()
    for prompt in ([1, 2, 3], [1, poison], [1, poison], [1, poison], [1, poison], [4, 5]):
        events: queue.Queue[Event] = queue.Queue()
        assert engine.submit([counted(prompt, 2, events.put)])
        assert finish(events)[2] == ("error" if poison in prompt else "length")
    assert engine.failure is None
    assert engine.counts.failed_passes == 4
    engine.stop()


def test_a_job_that_cannot_be_placed_ends_alone() -> None:
    backend = Counting()
    engine = Engine(backend, max_waiting=100)
    backend.broken = {"keep"}
    bad: queue.Queue[Event] = queue.Queue()
    engine.submit([counted([1, 2], 2, bad.put)])
    engine.start()
    assert finish(bad)[2] == "error"
    backend.broken = set()
    events: queue.Queue[Event] = queue.Queue()
    assert engine.submit([counted([1, 2], 2, events.put)])
    assert finish(events)[2] == "length"
    engine.stop()


def test_logits_that_are_nan_choose_no_token() -> None:
    for temperature in (0.0, 1.0):
        sampler = Sampler(Sampling(temperature))
        with pytest.raises((ArithmeticError, RuntimeError)):
            sampler.sample(torch.full((10,), float("nan")))


def test_an_adapter_that_no_layer_has_is_refused(served: Run) -> None:
    with pytest.raises(ModelError, match="no layer has the adapter third"):
        served.backend.run([SlotInput(0, "third", [5, 6], 0), SlotInput(1, None, [5], 0)])


def test_layers_with_another_state_are_refused() -> None:
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    with pytest.raises(ModelError, match="layers of the kind conv"):
        SlotModel(Lfm2ForCausalLM(config), num_slots=2, max_context=64, dtype=torch.float32)


def test_an_adapter_changes_its_own_tokens_alone_in_experts_too() -> None:
    layer = MixedLinear(torch.nn.Linear(4, 4))
    layer.lora = {"one": (torch.ones(4, 2), torch.ones(2, 4))}
    layer.ranges = [("one", slice(2, 5))]
    x = torch.randn(6, 4)
    with torch.no_grad():
        flat, rows, plain = layer(x), layer(x[None])[0], layer.base(x)
    torch.testing.assert_close(flat, rows)
    changed = (flat - plain).abs().amax(dim=1) > 1e-3
    assert changed.tolist() == [False, False, True, True, True, False]
