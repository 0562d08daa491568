"""Owns generation in slots: a common prefix computed once, no padding, no wait for the longest answer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from halfbyte.data.prefix_tree import common_prefix
from halfbyte.forward.kv_cache import GROWTH
from halfbyte.forward.packed import attention_of, causal_of, has_tree_attention
from halfbyte.forward.probes import (
    Tolerance,
    eval_mode,
    first_conclusive,
    probe_ids,
    refusal_of,
    relative_gap,
)
from halfbyte.forward.slot_paths import SlotInput
from halfbyte.generate.batched import Answer, until_stop
from halfbyte.generate.grammar import follow, masked
from halfbyte.generate.slot_model import SlotModel, token_bytes
from halfbyte.host import free_bytes

MAX_SLOTS = 512  # matrix products of more rows are no faster per row
PROMPT_TOKENS = 2048  # of prompts in one pass
REFILL_FRAC = 0.25  # of the slots are free before new prompts are read
# A shorter beginning of all prompts is copied to each slot: attention to it beside the rest takes longer.
MIN_SHARED_TOKENS = 128
CACHE_FRAC = 0.5  # of the free memory, for keys and values
LOGIT_TOKENS = 512  # of one pass whose logits are computed
PROBE_TOKENS = 24

Prediction = tuple[list[int], float | None]  # the next tokens; summed loss of the wanted ones
Step = list[tuple[int, SlotInput]]  # inputs of a pass, each with the row that it belongs to


@dataclass
class Spent:
    """Tokens that were computed and the seconds that they took, of prompts and of answers token by token.

    Attributes:
        prompt_tokens: in passes that read prompts.
        prompt_s: seconds of these passes.
        answer_tokens: in passes that decode alone.
        answer_s: seconds of these passes.
        scores: by row, the summed loss of its wanted tokens in nats, and if each is the likeliest.
    """

    prompt_tokens: int = 0
    prompt_s: float = 0.0
    answer_tokens: int = 0
    answer_s: float = 0.0
    scores: dict[int, tuple[float, list[bool]]] = field(default_factory=dict)

    def add(self, tokens: int, seconds: float, *, prompts: bool) -> None:
        """Count a pass that reads prompts, or one that decodes."""
        if prompts:
            self.prompt_tokens, self.prompt_s = self.prompt_tokens + tokens, self.prompt_s + seconds
        else:
            self.answer_tokens, self.answer_s = self.answer_tokens + tokens, self.answer_s + seconds


class SlotGenerator:
    """A model that answers prompts in slots: the common prefix of all prompts is computed once.

    A slot whose answer has ended takes the next prompt, so that no answer waits for the longest one; no token
    is padding. Only for models that ``slots_refusal`` does not refuse.

    Args:
        model: a causal language model, with or without an adapter.
        num_slots: largest number of answers at once; fewer where half of the free memory has no room for
            them.
        matcher: llguidance's state of the grammar that answers follow; None for free answers.
    """

    def __init__(self, model: nn.Module, num_slots: int = MAX_SLOTS, matcher: Any = None) -> None:
        self.model, self.num_slots, self.matcher = causal_of(model), num_slots, matcher

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
        """Return greedy answers, in the order of the prompts.

        Args:
            prompts: ids that end where the answer begins.
            stop_ids: ids that end an answer.
            max_new_tokens: largest number of tokens of an answer.
            begun: known first tokens of each answer, which count as generated.
            wanted: the wanted tokens of each answer, which are read with the prompt: they are scored, and as
                far as the model would generate them too, they are not generated once more.
            ends: whether the ids of an answer, one at least, end it as a stop token does; they stay in it.
            progress: called with the number of prompts done so far.
            spent: is filled with tokens, seconds and scores.

        Raises:
            GrammarError: an answer cannot follow its grammar any further.
            ValueError: ``wanted`` with ``begun``, or with ``ends`` or a grammar, which judge one token after the
                other; or ``begun`` tokens with a grammar.
        """
        if (wanted and (begun or ends or self.matcher)) or (self.matcher and any(begun or ())):
            raise ValueError("wanted excludes begun, ends and a grammar; a grammar excludes begun")
        begun, wanted = begun or [[]] * len(prompts), wanted or [[]] * len(prompts)
        spent = spent or Spent()
        matchers = [self.matcher.deep_copy() for _ in prompts] if self.matcher else []
        scheduler = _Scheduler(prompts, begun, wanted, stop_ids, ends, max_new_tokens)
        longest = max(map(len, prompts), default=0) - scheduler.num_apart
        max_tokens = longest + max([max_new_tokens, *map(len, wanted)])
        growth = min(max_tokens, longest + GROWTH)  # where answers may be long, most end sooner
        capacity = -(-max_tokens // growth) * growth
        num_slots = min(self.num_slots, max(1, len(prompts)), self._max_slots(capacity))
        scheduler.add_slots(num_slots)
        with _slot_model(self.model, num_slots, growth) as slot_model:
            if scheduler.waiting and scheduler.num_shared:
                start = time.perf_counter()
                slot_model.share(scheduler.beginning, apart=scheduler.num_apart > 0)
                spent.add(scheduler.num_shared, time.perf_counter() - start, prompts=True)
            while scheduler.waiting or scheduler.running:
                admitted = scheduler.admit()
                step = admitted or scheduler.decode()
                num_done, start = len(scheduler.answers), time.perf_counter()
                states = [matchers[row] for row, _ in step] if matchers else []
                predictions = _run(slot_model, step, scheduler.references(step), states)
                num_tokens = sum(len(one.ids) for _, one in step)
                spent.add(num_tokens, time.perf_counter() - start, prompts=bool(admitted))
                scheduler.receive(step, predictions)
                if progress and len(scheduler.answers) > num_done:
                    progress(len(scheduler.answers))
        spent.scores |= scheduler.scores
        return [scheduler.answers[row] for row in range(len(prompts))]

    def _max_slots(self, tokens: int) -> int:
        """Return how many slots of so many tokens have room in memory."""
        weight = self.model.get_input_embeddings().weight
        text_config = self.model.config.get_text_config()
        slot_bytes = tokens * token_bytes(text_config, weight.dtype)
        return max(1, int(CACHE_FRAC * free_bytes(weight.device)) // max(1, slot_bytes))


class _Scheduler:
    """Prompts that wait, answers that grow in slots, and answers that have ended.

    Attributes:
        answers: by row, those that have ended.
        scores: by row, as in ``Spent``.
        beginning: the tokens that all slots begin with.
        num_shared: their number.
        num_apart: how many of them no slot holds: all or none.
        waiting: rows without a slot, taken from the end.
        running: the row of each slot that is used.
        num_computed: by row, how many of its generated tokens are in its slot.
    """

    def __init__(
        self,
        prompts: Sequence[list[int]],
        begun: Sequence[list[int]],
        wanted: Sequence[list[int]],
        stop_ids: list[int],
        ends: Callable[[list[int]], bool] | None,
        max_new_tokens: int,
    ) -> None:
        self.prompts, self.ends = prompts, ends
        self.generated = [list(ids[:max_new_tokens]) for ids in begun]
        self.wanted = wanted
        self.stop_ids, self.max_new_tokens = set(stop_ids), max_new_tokens
        self.answers: dict[int, Answer] = {}
        self.scores: dict[int, tuple[float, list[bool]]] = {}
        shortest = min(map(len, prompts), default=1)
        count = max(0, min(common_prefix(prompts), shortest - 1))
        self.beginning = [*prompts[0][:count]] if prompts else []
        self.num_shared = len(self.beginning)
        self.num_apart = self.num_shared if self.num_shared >= MIN_SHARED_TOKENS else 0
        self.num_computed: dict[int, int] = {}
        self.waiting = [row for row in range(len(prompts)) if not self._has_ended(row)]
        self.waiting.sort(key=lambda row: len(prompts[row]), reverse=True)
        self.running: dict[int, int] = {}
        self.num_slots, self.free_slots = 0, list[int]()

    def add_slots(self, count: int) -> None:
        """Let so many answers grow at once."""
        self.num_slots, self.free_slots = count, list(range(count))

    def admit(self) -> Step:
        """Give free slots to the next prompts, once several are free; return what to prefill."""
        step: Step = []
        enough = min(REFILL_FRAC * self.num_slots, len(self.waiting))
        if self.running and len(self.free_slots) < enough:
            return step
        num_tokens = num_logits = 0
        while (
            self.waiting
            and self.free_slots
            and num_tokens < PROMPT_TOKENS
            and num_logits < LOGIT_TOKENS
        ):
            row, slot = self.waiting.pop(), self.free_slots.pop()
            self.running[slot] = row
            wanted = self.wanted[row]
            ids = [*self.prompts[row], *self.generated[row], *wanted[:-1]][self.num_shared :]
            slot_input = SlotInput(slot, None, ids, self.num_shared, max(1, len(wanted)))
            self.num_computed[row] = len(self.generated[row])
            step.append((row, slot_input))
            num_tokens, num_logits = num_tokens + len(ids), num_logits + slot_input.num_logits
        return step

    def decode(self) -> Step:
        """Return the last token of each running answer, or those that its grammar has added to it."""
        step = []
        for slot, row in self.running.items():
            count = self.num_computed[row]
            start = len(self.prompts[row]) + count
            step.append((row, SlotInput(slot, None, self.generated[row][count:], start)))
            self.num_computed[row] = len(self.generated[row])
        return step

    def references(self, step: Step) -> list[list[int]]:
        """Return the wanted tokens of each input of a step, or none where they are scored already."""
        return [[] if row in self.scores else self.wanted[row] for row, _ in step]

    def receive(self, step: Step, predictions: list[Prediction]) -> None:
        """Append what each input generates: its next tokens, of wanted ones those up to the first unwanted one."""
        for (row, slot_input), (tokens, loss) in zip(step, predictions, strict=True):
            if loss is None:
                self.generated[row] = [*self.generated[row], *tokens][: self.max_new_tokens]
            else:
                hits = [a == b for a, b in zip(tokens, self.wanted[row], strict=True)]
                self.scores[row] = (loss, hits)
                count = hits.index(False) + 1 if False in hits else len(hits)
                generated = [*self.generated[row], *tokens[:count]]
                self.generated[row] = generated[: self.max_new_tokens]
                self.num_computed[row] = len(self.generated[row]) - 1
            if self._has_ended(row):
                del self.running[slot_input.slot]
                self.free_slots.append(slot_input.slot)

    def _has_ended(self, row: int) -> bool:
        """Whether an answer has ended; if so it is put with the others."""
        ids = self.generated[row]
        answer = until_stop(ids, self.stop_ids)
        if ids and answer.finish_reason == "length" and self.ends is not None and self.ends(ids):
            answer = Answer(ids, "stop")
        if answer.finish_reason == "stop" or len(ids) >= self.max_new_tokens:
            self.answers[row] = answer
        return row in self.answers


@contextlib.contextmanager
def _slot_model(model: Any, num_slots: int, growth: int) -> Iterator[SlotModel]:
    """Use a model in slots; afterwards it has its attention and its mode back."""
    text_config = model.config.get_text_config()
    attention = attention_of(model)
    with eval_mode(model):
        try:
            yield SlotModel(
                model,
                num_slots=num_slots,
                max_context=int(getattr(text_config, "max_position_embeddings", 0)),
                dtype=model.get_input_embeddings().weight.dtype,
                growth=growth,
            )
        finally:
            model.set_attn_implementation(attention)


@torch.inference_mode()
def _run(
    slot_model: SlotModel, step: Step, references: Sequence[list[int]], matchers: Sequence[Any]
) -> list[Prediction]:
    """Compute a pass; return the likeliest tokens after each input, and the loss of its reference tokens.

    Where inputs have matchers, the likeliest token is the likeliest that each allows; those that its grammar
    leaves no choice about then follow it.
    """
    logits, rows = slot_model.logits([slot_input for _, slot_input in step])  # (N, V)
    # The first of equals, as argmax, which takes four times as long on a CPU in bf16.
    likeliest: list[int] = logits.max(dim=1).indices.tolist()  # N
    predictions: list[Prediction] = []
    for number, input_rows in enumerate(rows):
        tokens, loss = likeliest[input_rows.start : input_rows.stop], None
        if matchers:
            allowed = masked(matchers[number], logits[input_rows.stop - 1].float().cpu())  # (V,)
            tokens = follow(matchers[number], int(allowed.argmax()))
        elif references[number]:
            input_logits = logits[input_rows.start : input_rows.stop].float()  # (n, V)
            target = torch.tensor(references[number], device=input_logits.device)  # (n,)
            loss = float(functional.cross_entropy(input_logits, target, reduction="sum"))
        predictions.append((tokens, loss))
    return predictions


@torch.no_grad()
def slots_refusal(model: nn.Module) -> str:
    """Return why a model cannot answer in slots, or "".

    A probe reads some tokens in pieces, behind a shared beginning and beside others, and compares the logits with
    those of the plain pass.
    """
    causal = causal_of(model)
    name = type(causal).__name__
    if not has_tree_attention(causal):
        return f"{name} does not take halfbyte's attention"
    try:
        with eval_mode(causal):
            refusal = first_conclusive(lambda attempt: _probe_slots(causal, attempt))
    except Exception as error:
        return f"{name} cannot answer in slots: {refusal_of(error)}"
    return f"{name}: {refusal}" if refusal else ""


def _probe_slots(causal: Any, attempt: int) -> tuple[str, bool]:
    """Compare slots with the plain pass; return the difference, or "", and whether it is conclusive."""
    ids, half = probe_ids(causal, PROBE_TOKENS, attempt), PROBE_TOKENS // 2
    device = causal.get_input_embeddings().weight.device
    both = torch.tensor([ids, [*ids[-2::-1], ids[-1]]], device=device)  # (2, T)
    expected, moved = causal(both, use_cache=False).logits[:, -1].cpu()  # (V,) each
    cache = causal(both[:1, :half], use_cache=True).past_key_values
    in_pieces = causal(both[:1, half:], past_key_values=cache).logits[0, -1].cpu()  # (V,)
    with _slot_model(causal, 3, PROBE_TOKENS) as slot_model:
        slot_model.share(ids[:half], apart=True)
        others = SlotInput(1, None, ids[half + 3 :], half)
        slot_model.run([SlotInput(2, None, ids[half:-1], half), others])
        last = SlotInput(2, None, ids[-1:], PROBE_TOKENS - 1)
        logits = slot_model.run([last])[0]  # (V,)
    gap = relative_gap(logits, expected)
    noise, context_effect = relative_gap(in_pieces, expected), relative_gap(moved, expected)
    tolerance = Tolerance.of(causal, noise, context_effect)
    if gap <= tolerance.gap:
        return "", True
    return f"logits differ by {gap:.1g} from the plain pass", not gap <= tolerance.fault
