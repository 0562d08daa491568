"""Owns the canary: what the trained model said at the end of its training, for whoever loads it later.

A server can load an adapter and answer from the base without a word (vLLM issues 34186 and 41754). So
the training side writes down a few log-probabilities beside the adapter, and a server computes them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from halfbyte.data.render import Renderer
from halfbyte.data.rows import Row, row_from_json
from halfbyte.errors import RunError
from halfbyte.run_dir import read_json, write_json

CANARY = "canary.json"  # beside the adapter
NUM_PROMPTS = 8
NUM_TOKENS = 64  # the likeliest ones after each prompt
MAX_SHARE = 0.1  # of the way from base to adapter by which a server may miss the adapter

Logits = Callable[[list[int]], torch.Tensor]  # ids to logits (V,) after the last one


def record_reference_logprobs(
    logits: Logits, renderer: Renderer, rows: Sequence[Row], folder: Path
) -> None:
    """Write what a trained model expects after the shortest prompts of ``rows``.

    Args:
        logits: of the trained model, in the dtype that it was trained in.
        renderer: the training's own.
        rows: held-out ones; of raw text the first half is the prompt.
        folder: the adapter's.
    """
    records = []
    for asked in sorted(map(_prompt, rows), key=lambda row: len(str(row)))[:NUM_PROMPTS]:
        ids = _ids(renderer, asked)
        best = torch.log_softmax(logits(ids).float(), dim=-1).topk(NUM_TOKENS)
        tokens, logprobs = best.indices.tolist(), best.values.tolist()
        records.append({"row": asked.as_json(), "ids": ids, "tokens": tokens, "logprobs": logprobs})
    write_json(folder / CANARY, records)


def check_reference_logprobs(
    adapted: Logits, base: Logits, renderer: Renderer, folder: Path
) -> str:
    """Compare a loaded adapter with what was recorded, before anybody relies on it; returns a line to show.

    The distance is the root mean square of differences of log-probabilities in nats, each token weighed
    by its recorded probability.

    Raises:
        RunError: nothing was recorded, prompts are rendered otherwise, the adapter is not in the answers,
            or they are not those of the training.
    """
    if not (folder / CANARY).is_file():
        raise RunError(
            f"{folder / CANARY} is missing: nothing says what the adapter answered when it was trained."
            " It is written at the end of a training; train again with train.existing=replace"
        )
    expected, found, without = [], [], []
    for record in read_json(folder / CANARY):
        ids = _ids(renderer, row_from_json(record["row"]))
        if ids != record["ids"]:
            raise RunError(
                f"{folder}: another chat template or tokenizer than in training: the first recorded prompt"
                f" that differs has {len(ids)} tokens here and {len(record['ids'])} there. Put back the"
                " files that training wrote"
            )
        tokens = torch.tensor(record["tokens"])
        expected.append(torch.tensor(record["logprobs"]))
        found.append(torch.log_softmax(adapted(ids).float(), dim=-1)[tokens])
        without.append(torch.log_softmax(base(ids).float(), dim=-1)[tokens])
    miss, way = _distance(found, expected), _distance(without, expected)
    if not miss <= MAX_SHARE * way:
        raise RunError(
            f"{folder}: what is loaded is not the adapter that was trained: its log-probabilities are"
            f" {miss:.3g} nats from the recorded ones, the base's {way:.3g}; at most {MAX_SHARE:.0%} of that"
            " is allowed. The weights are incomplete or changed, or the adapter changes so little that"
            " rounding hides it (then --compute-dtype as in training)"
        )
    return f"{miss:.2g} nats from the training, the base {way:.2g}"


def _prompt(row: Row) -> Row:
    if row.text is None:
        return Row(row.place, row.messages[:-1])
    return Row(row.place, text=row.text[: len(row.text) // 2 + 1])


def _ids(renderer: Renderer, asked: Row) -> list[int]:
    if asked.text is None:
        return renderer.encode_prompt(asked.messages, asked.place)
    return list(renderer.tokenizer(asked.text)["input_ids"])


def _distance(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    weights = torch.cat([logprobs.softmax(dim=-1) for logprobs in theirs]) / len(theirs)
    return float((weights * (torch.cat(ours) - torch.cat(theirs)).pow(2)).sum().sqrt())
