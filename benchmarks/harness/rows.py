"""Owns the rows of the benchmark: four datasets, seeded, tokenised, in the order of their steps."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.models import ROOT, Model

if TYPE_CHECKING:
    from halfbyte.data.prepared import Prepared
    from halfbyte.data.render import Renderer

STEP_ROWS = 16
HELD_OUT_ROWS = 32
LONGEST = 512
NUM_DESCRIPTIONS = 20_000

Row = tuple[list[int], list[int]]  # ids, labels

DATASETS = {
    "icd10": "medical coding: a shared prompt of one sentence",
    "chat": "no shared prompt; lengths log-normal (μ 4.41, σ 0.80, cut to 12–512), fitted to the 175 seed"
    " tasks of Stanford Alpaca in SmolLM2's tokens; 20–60 % of a row labelled; words of ICD-10-CM",
    "equal": "no shared prompt; each row 256 tokens, the last 102 labelled; words of ICD-10-CM",
    "prompt460": "a shared prompt of 460 tokens, a turn of 20 and an answer of 20; words of ICD-10-CM",
}
ALPACA_MU, ALPACA_SIGMA = 4.41, 0.80
ICD10_PROMPT, ICD10_ANSWER = 24, 12  # tokens


@dataclass(frozen=True)
class Rows:
    """Rows of one dataset for one model.

    Attributes:
        about: what they are.
        drawn: training rows as halfbyte is given them.
        in_steps: the same rows in the order of halfbyte's sampler, 16 after 16.
        held_out: for the common evaluation.
    """

    about: str
    drawn: list[Row]
    in_steps: list[Row]
    held_out: list[Row]

    def write(self, path: Path) -> None:
        """For the drivers."""
        parts = {"drawn": self.drawn, "in_steps": self.in_steps, "held_out": self.held_out}
        path.write_text(json.dumps(parts))


def make_rows(
    dataset: str, model: Model, folder: Path, steps: int, seed: int, chat: Path | None
) -> Rows:
    """Draw a dataset for a model whose tokenizer lies in ``folder``.

    Raises:
        ValueError: there are too few rows for so many steps.
    """
    num_rows = steps * STEP_ROWS
    about = DATASETS[dataset]
    if (dataset == "icd10" and not model.is_drawn) or (dataset == "chat" and chat is not None):
        train, held_out = _real(model, folder, chat if dataset == "chat" else None)
        about = f"rows of {chat.name}" if dataset == "chat" and chat else about
        random.Random(seed).shuffle(train)
    else:
        words = _Words(model, folder, seed)
        made = [_MAKERS[dataset](words) for _ in range(num_rows + HELD_OUT_ROWS)]
        train, held_out = made[:num_rows], made[num_rows:]
    if len(train) < num_rows:
        raise ValueError(f"{dataset}: {num_rows} rows are needed, {len(train)} are there")
    drawn = train[:num_rows]
    return Rows(about, drawn, in_steps(drawn, seed), held_out[:HELD_OUT_ROWS])


def in_steps(drawn: list[Row], seed: int) -> list[Row]:
    """The rows in the order in which halfbyte trains on them."""
    from halfbyte.train.batching import StepwiseSampler

    sampler = StepwiseSampler([len(ids) for ids, _ in drawn], STEP_ROWS, seed)
    return [drawn[number] for number in sampler]


class _Words:
    """Tokens in the order of a text made of diagnoses, or random ones where the model is random too."""

    def __init__(self, model: Model, folder: Path, seed: int) -> None:
        from transformers import AutoTokenizer

        self.random = random.Random(seed)
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        self.first: list[int] = []
        if model.is_drawn:
            self.ids = [self.random.randrange(3, len(tokenizer)) for _ in range(200_000)]
        else:
            self.ids = tokenizer(_diagnoses(self.random), add_special_tokens=False)["input_ids"]
            if tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id:
                self.first = [tokenizer.bos_token_id]
        self.begun: set[int] = set()
        self.prompt = self.text(460 - len(self.first))

    def text(self, length: int) -> list[int]:
        """So many tokens, of which the first begins no other text."""
        while True:
            start = self.random.randrange(len(self.ids) - length)
            if self.ids[start] not in self.begun:
                self.begun.add(self.ids[start])
                return self.ids[start : start + length]


def _diagnoses(source: random.Random) -> str:
    import simple_icd_10_cm as icd

    codes = source.sample(icd.get_all_codes(), NUM_DESCRIPTIONS)
    return ". ".join(icd.get_description(code) for code in codes)


def _row(ids: list[int], num_labelled: int) -> Row:
    begin = len(ids) - num_labelled
    return ids, [-100] * begin + ids[begin:]


def _chat(words: _Words) -> Row:
    drawn = words.random.lognormvariate(ALPACA_MU, ALPACA_SIGMA)
    length = min(max(round(drawn), 12), LONGEST)
    share = words.random.uniform(0.2, 0.6)
    return _row(words.first + words.text(length - len(words.first)), round(share * length))


def _equal(words: _Words) -> Row:
    return _row(words.first + words.text(256 - len(words.first)), 102)


def _prompt460(words: _Words) -> Row:
    return _row(words.first + words.prompt + words.text(40), 20)


def _icd10(words: _Words) -> Row:
    """As long as those of the data set are, for models without words."""
    description = words.text(words.random.randrange(20, 50))
    return _row(words.first + words.prompt[:ICD10_PROMPT] + description, ICD10_ANSWER)


_MAKERS = {"chat": _chat, "equal": _equal, "prompt460": _prompt460, "icd10": _icd10}


def _real(model: Model, folder: Path, chat: Path | None) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows of a file, rendered as halfbyte renders them."""
    from halfbyte.config import load_run
    from halfbyte.config.dataset import Data
    from halfbyte.data.chat_template import load_template
    from halfbyte.data.icd10 import build_icd10
    from halfbyte.data.prepare import prepare
    from halfbyte.data.render import Renderer
    from halfbyte.model.resolve import resolve_base
    from halfbyte.model.tokenizer import load_tokenizer

    if model.config is None:
        raise ValueError(
            "rows of text need a model with real words: --datasets chat equal prompt460"
        )
    if not (ROOT / "data" / "icd10" / "train.jsonl").exists():
        build_icd10(ROOT / "data" / "icd10")
    data = load_run(ROOT / model.config, []).data
    if chat is not None:
        data = Data(
            train=str(chat.resolve()),
            chat_template=data.chat_template,
            max_length=LONGEST,
            on_overlength="drop",
        )
    template = load_template(data.chat_template) if data.chat_template else None
    renderer: Renderer = Renderer(load_tokenizer(resolve_base(str(folder))), template, data.loss_on)
    prepared: Prepared = prepare(data, renderer)
    train = [(e.encoded.ids, e.encoded.labels) for e in prepared.train]
    test = [(e.encoded.ids, e.encoded.labels) for e in prepared.test]
    return (train, test) if test else (train[:-HELD_OUT_ROWS], train[-HELD_OUT_ROWS:])
