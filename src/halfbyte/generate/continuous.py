"""Owns generation in slots: common beginnings computed once, no padding, no answer waits for the longest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from halfbyte.data.prefix_tree import common_prefix
from halfbyte.errors import ModelError
from halfbyte.forward import prefix_attention
from halfbyte.forward.probes import Allowed, first_sure, probe_words, relative_gap
from halfbyte.forward.slot_attention import GROWTH, SlotInput
from halfbyte.generate.batched import Answer, causal_of, until_stop
from halfbyte.generate.slot_model import SlotModel, token_bytes
from halfbyte.host import free_bytes

MAX_SLOTS = 512  # matrix products of more rows are no faster a row
PROMPT_TOKENS = 2048  # of prompts in one pass
REFILL_FRAC = 0.25  # of the slots are free before new prompts are read
CACHE_FRAC = 0.5  # of the free memory, for keys and values
TOLD_TOKENS = 512  # of one pass that get logits
PROBE_TOKENS = 24

Prediction = tuple[list[int], float | None]  # likeliest tokens; loss of what was wanted


@dataclass
class Spent:
    """Tokens that were computed, and the seconds that took: of prompts, and of answers one by one.

    Attributes:
        scores: by row the loss of its wanted tokens in nats, and for each whether it is the likeliest.
    """

    prompt_tokens: int = 0
    prompt_s: float = 0.0
    answer_tokens: int = 0
    answer_s: float = 0.0
    scores: dict[int, tuple[float, list[bool]]] = field(default_factory=dict)


class SlotGenerator:
    """A model that answers prompts in slots: what all prompts begin with is computed once.

    A slot whose answer has ended takes the next prompt, so that no answer waits for the longest one; no
    token is padding. Only for models of which ``slots_refusal`` says nothing.

    Args:
        model: a causal language model, with or without an adapter.
        num_slots: answers at once, or as many as have room in half of the free memory.
    """

    def __init__(self, model: nn.Module, num_slots: int = MAX_SLOTS) -> None:
        self.model, self.num_slots = causal_of(model), num_slots

    def generate(
        self,
        prompts: Sequence[list[int]],
        *,
        stop_ids: list[int],
        max_new_tokens: int,
        begun: Sequence[list[int]] | None = None,
        wanted: Sequence[list[int]] | None = None,
        ends: Callable[[list[int]], bool] | None = None,
        progress: Callable[[int], None] | None = None,
        spent: Spent | None = None,
    ) -> list[Answer]:
        """Greedy answers, in the order of the prompts.

        Args:
            prompts: ids that end where the answer begins.
            stop_ids: ids that end an answer.
            max_new_tokens: longest answer.
            begun: what each answer is known to begin with; counts as generated.
            wanted: what each answer should go on with, which is read with the prompt: scored, and where the
                model would say it too, not generated once more.
            ends: whether the ids of an answer, one at least, end it as a stop token does; they stay in it.
            progress: called with the number of prompts done so far.
            spent: takes what it took, and scores.

        Raises:
            ValueError: ``wanted`` beside ``begun`` or ``ends``, which tell of one token after the other.
        """
        if wanted and (begun or ends):
            raise ValueError("wanted cannot be given with begun or ends")
        nothing: list[list[int]] = [[] for _ in prompts]
        begun, wanted = begun or nothing, wanted or nothing
        spent = spent or Spent()
        longest = max(map(len, prompts), default=0)
        whole = longest + max([max_new_tokens, *map(len, wanted)])
        growth = min(whole, longest + GROWTH)  # where answers may be long, most end sooner
        most = -(-whole // growth) * growth
        num_slots = min(self.num_slots, max(1, len(prompts)), self._room(most))
        work = _Work(prompts, begun, wanted, stop_ids, ends, max_new_tokens, num_slots)
        with _Slots(self.model, num_slots + 1, growth) as lanes:
            if work.waiting and work.shared:
                stem = list(prompts[0][: work.shared])
                _run(lanes, [SlotInput(num_slots, None, stem, 0)], spent)
            while work.waiting or work.running:
                step, done = work.begin(lanes) or work.go_on(), len(work.answers)
                work.take(step, _run(lanes, [lane for _, lane in step], spent, work.asked(step)))
                if progress is not None and len(work.answers) > done:
                    progress(len(work.answers))
        spent.scores |= work.scores
        return [work.answers[row] for row in range(len(prompts))]

    def _room(self, tokens: int) -> int:
        """Slots of so many tokens for which there is memory, beside the one of what all begin with."""
        weight = self.model.get_input_embeddings().weight
        text = self.model.config.get_text_config()
        slot_bytes = tokens * token_bytes(text, weight.dtype)
        return max(1, int(CACHE_FRAC * free_bytes(weight.device)) // max(1, slot_bytes) - 1)


class _Work:
    """Which prompts wait, which answer grows in which slot, and what has ended."""

    def __init__(
        self,
        prompts: Sequence[list[int]],
        begun: Sequence[list[int]],
        wanted: Sequence[list[int]],
        stop_ids: list[int],
        ends: Callable[[list[int]], bool] | None,
        max_new_tokens: int,
        num_slots: int,
    ) -> None:
        self.prompts, self.ends = prompts, ends
        self.texts = [list(known[:max_new_tokens]) for known in begun]
        self.wanted = wanted
        self.stops, self.max_new_tokens, self.num_slots = set(stop_ids), max_new_tokens, num_slots
        self.answers: dict[int, Answer] = {}
        self.scores: dict[int, tuple[float, list[bool]]] = {}
        shortest = min(map(len, prompts), default=1)
        self.shared = max(0, min(common_prefix(prompts), shortest - 1))
        self.waiting = [row for row in range(len(prompts)) if not self._ends(row)]
        self.waiting.sort(key=lambda row: len(prompts[row]), reverse=True)  # taken from the end
        self.running: dict[int, int] = {}  # slot → row
        self.free = list(range(num_slots))

    def begin(self, lanes: SlotModel) -> list[tuple[int, SlotInput]]:
        """Lanes of the next prompts, once there is room for several."""
        step: list[tuple[int, SlotInput]] = []
        enough = min(REFILL_FRAC * self.num_slots, len(self.waiting))
        if self.running and len(self.free) < enough:
            return step
        tokens = told = 0
        while self.waiting and self.free and tokens < PROMPT_TOKENS and told < TOLD_TOKENS:
            row, slot = self.waiting.pop(), self.free.pop()
            if self.shared:
                lanes.copy(self.num_slots, slot, self.shared)
            self.running[slot] = row
            wanted = self.wanted[row]
            ids = [*self.prompts[row], *self.texts[row], *wanted[:-1]][self.shared :]
            lane = SlotInput(slot, None, ids, self.shared, max(1, len(wanted)))
            step.append((row, lane))
            tokens, told = tokens + len(ids), told + lane.num_logits
        return step

    def asked(self, step: list[tuple[int, SlotInput]]) -> list[list[int]]:
        """What each lane of a step should go on with, where that is not scored yet."""
        return [[] if row in self.scores else self.wanted[row] for row, _ in step]

    def go_on(self) -> list[tuple[int, SlotInput]]:
        """The last token of each answer that grows."""
        step = []
        for slot, row in self.running.items():
            start = len(self.prompts[row]) + len(self.texts[row]) - 1
            step.append((row, SlotInput(slot, None, self.texts[row][-1:], start)))
        return step

    def take(self, step: list[tuple[int, SlotInput]], told: list[Prediction]) -> None:
        """The next tokens of each lane: one, or as many as it was to say and one of its own."""
        for (row, lane), (tokens, loss) in zip(step, told, strict=True):
            if loss is None:
                self.texts[row].append(tokens[0])
            else:
                hits = [a == b for a, b in zip(tokens, self.wanted[row], strict=True)]
                self.scores[row] = (loss, hits)
                said = hits.index(False) + 1 if False in hits else len(hits)
                self.texts[row] = [*self.texts[row], *tokens[:said]][: self.max_new_tokens]
            if self._ends(row):
                del self.running[lane.slot]
                self.free.append(lane.slot)

    def _ends(self, row: int) -> bool:
        ids = self.texts[row]
        answer = until_stop(ids, self.stops)
        if ids and answer.finish_reason == "length" and self.ends is not None and self.ends(ids):
            answer = Answer(ids, "stop")
        if answer.finish_reason == "stop" or len(ids) >= self.max_new_tokens:
            self.answers[row] = answer
        return row in self.answers


class _Slots:
    """The model as lanes, for a while; afterwards its attention is its own again."""

    def __init__(self, model: Any, num_slots: int, tokens: int) -> None:
        self.model, self.num_slots, self.tokens = model, num_slots, tokens

    def __enter__(self) -> SlotModel:
        text = self.model.config.get_text_config()
        self.attention = getattr(text, "_attn_implementation", "eager")
        self.training = self.model.training
        return SlotModel(
            self.model,
            num_slots=self.num_slots,
            max_context=int(getattr(text, "max_position_embeddings", 0)),
            dtype=self.model.get_input_embeddings().weight.dtype,
            growth=self.tokens,
        )

    def __exit__(self, *_: object) -> None:
        self.model.set_attn_implementation(self.attention)
        self.model.train(self.training)


@torch.inference_mode()
def _run(
    lanes: SlotModel, step: list[SlotInput], spent: Spent, wanted: Sequence[list[int]] = ()
) -> list[Prediction]:
    """The likeliest tokens after each lane, and the loss of what it should go on with."""
    start = time.perf_counter()
    logits, rows = lanes.logits(step)
    # The first of equals, as argmax, which takes four times as long on a CPU in bf16.
    chosen: list[int] = logits.max(dim=1).indices.tolist()
    losses: list[float | None] = [None] * len(step)
    for number, labels in enumerate(wanted):
        if labels:
            own = logits[rows[number].start : rows[number].stop].float()
            target = torch.tensor(labels, device=own.device)
            losses[number] = float(functional.cross_entropy(own, target, reduction="sum"))
    told = [(chosen[own.start : own.stop], loss) for own, loss in zip(rows, losses, strict=True)]
    seconds, tokens = time.perf_counter() - start, sum(len(lane.ids) for lane in step)
    if any(len(lane.ids) > 1 for lane in step):
        spent.prompt_tokens, spent.prompt_s = spent.prompt_tokens + tokens, spent.prompt_s + seconds
    else:
        spent.answer_tokens, spent.answer_s = spent.answer_tokens + tokens, spent.answer_s + seconds
    return told


@torch.no_grad()
def slots_refusal(model: nn.Module) -> str:
    """Why a model cannot answer in slots, or "".

    A probe reads some tokens in pieces, beside others, and compares the logits with those of the plain pass.
    """
    causal = causal_of(model)
    name = type(causal).__name__
    if (
        getattr(causal.config.get_text_config(), "_attn_implementation", "")
        != prefix_attention.NAME
    ):
        return f"{name} does not take halfbyte's attention"
    training = causal.training
    causal.eval()
    try:
        refusal = first_sure(lambda turn: _probe_slots(causal, turn))
    except (ModelError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        return f"{name} cannot answer in slots: {error}"
    finally:
        causal.train(training)
    return f"{name}: {refusal}" if refusal else ""


def _probe_slots(causal: Any, turn: int) -> tuple[str, bool]:
    """What speaks against slots on some tokens, or ""; and whether the plain pass is sure of itself there."""
    ids, half = probe_words(causal, PROBE_TOKENS, turn), PROBE_TOKENS // 2
    device = causal.get_input_embeddings().weight.device
    both = torch.tensor([ids, [*ids[-2::-1], ids[-1]]], device=device)
    wanted, moved = causal(both, use_cache=False).logits[:, -1].cpu()
    held = causal(both[:1, :half], use_cache=True).past_key_values
    pieces = causal(both[:1, half:], past_key_values=held).logits[0, -1].cpu()
    with _Slots(causal, 3, PROBE_TOKENS) as lanes:
        lanes.run([SlotInput(0, None, ids[:half], 0)])
        lanes.copy(0, 2, half)
        lanes.run([SlotInput(2, None, ids[half:-1], half), SlotInput(1, None, ids[3:], 0)])
        found = lanes.run([SlotInput(2, None, ids[-1:], PROBE_TOKENS - 1)])[0]
    gap = relative_gap(found, wanted)
    allowed = Allowed.of(causal, relative_gap(pieces, wanted), relative_gap(moved, wanted))
    if gap <= allowed.gap:
        return "", True
    return f"logits differ by {gap:.1g} from the plain pass", allowed.is_sure
