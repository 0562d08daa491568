"""Owns the reference log-probabilities: a few predictions of the trained model, recorded for later checks.

A server can load an adapter and silently answer from the base (vLLM issues 34186 and 41754). Therefore
training records a few log-probabilities beside the adapter, and a server recomputes and compares them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from halfbyte.data.conversation import Message, Row, row_from_json
from halfbyte.data.render import Renderer
from halfbyte.data.thoughts import message_thoughts
from halfbyte.errors import RunError
from halfbyte.run_dir import read_json, write_json

FILE = "canary.json"  # beside the adapter
NUM_PROMPTS = 8
MAX_ROWS = 10_000  # that are looked at for the shortest prompts
NUM_TOKENS = 64  # the likeliest ones after each prompt
MAX_MISS_FRAC = 0.1  # allowed distance from the adapter, as a share of the base's
# Nats by which arithmetic alone may move log-probabilities: logits of 16 to 32 have a step of 2^-3 in bf16 and 2^-6 in
# fp16.
ROUNDING = {"bf16": 0.15, "fp16": 0.03, "fp32": 2e-3}

Logits = Callable[[list[int]], torch.Tensor]  # maps ids to logits (V,) after the last one


def record_reference_logprobs(
    logits: Logits, renderer: Renderer, rows: Iterable[Row], folder: Path
) -> None:
    """Record a trained model's log-probabilities after the shortest prompts of ``rows``.

    One of each kind is among them: with tools, with calls and with thoughts in the answer.

    Args:
        logits: returns logits of the trained model, in the dtype that it was trained in.
        renderer: the renderer of the training rows.
        rows: held-out rows; the first half of a raw-text row is its prompt.
        folder: the adapter's folder.
    """
    records = []
    for prompt in _few_prompts(islice(rows, MAX_ROWS)):
        ids = _ids(renderer, prompt)
        best = torch.log_softmax(logits(ids).float(), dim=-1).topk(NUM_TOKENS)
        tokens, logprobs = best.indices.tolist(), best.values.tolist()
        records.append(
            {"row": prompt.as_json(), "ids": ids, "tokens": tokens, "logprobs": logprobs}
        )
    write_json(folder / FILE, records)


def check_reference_logprobs(
    adapted: Logits, base: Logits, renderer: Renderer, folder: Path, dtypes: Sequence[str] = ()
) -> str:
    """Compare a loaded adapter with the recorded log-probabilities, and return a line to print.

    The distance is the root mean square of the differences of log-probabilities in nats, with each token
    weighted by its recorded probability.

    Args:
        adapted: computes with the adapter.
        base: computes without it.
        renderer: the renderer of the training rows.
        folder: the adapter's folder.
        dtypes: those of the training and of ``adapted``, if they may differ; their rounding then is no fault.

    Raises:
        RunError: nothing was recorded, prompts are rendered differently, or the log-probabilities are not
            those of the trained adapter.
    """
    if not has_reference_logprobs(folder):
        raise RunError(
            f"{folder / FILE} is missing: nothing says what the adapter answered when it was trained."
            " It is written at the end of a training; train again with train.existing=replace"
        )
    expected, with_adapter, without = [], [], []
    for record in read_json(folder / FILE):
        ids = _ids(renderer, row_from_json(record["row"]))
        if ids != record["ids"]:
            raise RunError(
                f"{folder}: another chat template or tokenizer than in training: the first recorded prompt"
                f" that differs has {len(ids)} tokens here and {len(record['ids'])} there. Put back the"
                " files that training wrote"
            )
        tokens = torch.tensor(record["tokens"])
        expected.append(torch.tensor(record["logprobs"]))
        with_adapter.append(torch.log_softmax(adapted(ids).float(), dim=-1)[tokens])
        without.append(torch.log_softmax(base(ids).float(), dim=-1)[tokens])
    miss = _distance(with_adapter, expected)
    whole = _distance(without, expected)
    rounding = max((ROUNDING[dtype] for dtype in dtypes), default=0.0)
    allowed = max(MAX_MISS_FRAC * whole, rounding)
    if not miss <= allowed:
        remedy = "" if dtypes else " (then --compute-dtype as in training)"
        raise RunError(
            f"{folder}: what is loaded is not the adapter that was trained: its log-probabilities are"
            f" {miss:.3g} nats from the recorded ones, the base's {whole:.3g}; at most {allowed:.3g} is"
            " allowed. The weights are incomplete or changed, or the adapter changes so little that"
            f" rounding hides it{remedy}"
        )
    return f"{miss:.2g} nats from the training, the base {whole:.2g}"


def has_reference_logprobs(folder: Path) -> bool:
    """Return whether log-probabilities are recorded beside an adapter."""
    return (folder / FILE).is_file()


def recorded_prompts(folder: Path) -> list[Row]:
    """Return the prompts whose log-probabilities are recorded beside an adapter; none if none are."""
    records = read_json(folder / FILE) if has_reference_logprobs(folder) else ()
    return [row_from_json(record["row"]) for record in records]


def _few_prompts(rows: Iterable[Row]) -> list[Row]:
    """Return the shortest prompts, that of each kind of row first."""
    shortest: dict[tuple[bool, ...], tuple[int, Row]] = {}
    sized: list[tuple[int, int, Row]] = []
    for row in rows:
        prompt = _prompt(row)
        size = len(str(prompt))
        answer = row.messages[-1] if row.messages else None
        kind = (bool(row.tools), *(bool(answer and part) for part in _markup(answer)))
        if kind not in shortest or size < shortest[kind][0]:
            shortest[kind] = (size, prompt)
        sized.append((size, len(sized), prompt))
    chosen = [prompt for _, prompt in shortest.values()]
    others = heapq.nsmallest(NUM_PROMPTS + len(chosen), sized)
    chosen += [prompt for _, _, prompt in others if prompt not in chosen]
    return chosen[:NUM_PROMPTS]


def _markup(answer: Message | None) -> tuple[Any, ...]:
    """Return what an answer has besides text: its calls, and its thoughts."""
    if answer is None:
        return ()
    return (answer.tool_calls, message_thoughts(answer))


def _prompt(row: Row) -> Row:
    if row.text is None:
        return Row(row.place, row.messages[:-1], tools=row.tools)
    return Row(row.place, text=row.text[: len(row.text) // 2 + 1])


def _ids(renderer: Renderer, prompt: Row) -> list[int]:
    if prompt.text is None:
        return renderer.encode_prompt(prompt.messages, prompt.place, prompt.tools)
    return list(renderer.tokenizer(prompt.text)["input_ids"])


def _distance(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    weights = torch.cat([logprobs.softmax(dim=-1) for logprobs in theirs]) / len(theirs)
    return float((weights * (torch.cat(ours) - torch.cat(theirs)).pow(2)).sum().sqrt())
