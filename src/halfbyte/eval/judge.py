"""Owns the judge: another model says which of two answers is better, asked with their places swapped."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from halfbyte.config import Run
from halfbyte.config.evaluation import Judge
from halfbyte.errors import UserError
from halfbyte.eval.intervals import mean_interval
from halfbyte.run_dir import append_jsonl, read_jsonl

KEY = "HALFBYTE_JUDGE_KEY"
ATTEMPTS, TIMEOUT_S, AT_ONCE = 4, 120.0, 8
MAX_UNREADABLE_FRAC = 0.1
WAIT_S = 1.0  # before the second attempt; twice as long before each further one
PROMPT = """{question}

What was asked:
{prompt}

An answer known to be right:
{wanted}

Answer A:
{a}

Answer B:
{b}

Reply with one word: A, B, or TIE."""
CHOICE = re.compile(r"\W*(?:ANSWER\W+)?(A|B|TIE)\W*")
UNREADABLE = "?"


def judge_answers(
    run: Run, answered: list[dict[str, Any]], ours: str, others: list[str], cache: Path
) -> dict[str, dict[str, Any]]:
    """How often ``ours`` was preferred to each other variant, from 0 to 1, with its interval.

    A row counts 1 or 0 where both orders name the same answer, else 0.5: a judge that goes by the place
    counts for nothing (Zheng et al. 2023, §4.2). Equal answers are not asked.

    Args:
        run: with ``eval.judge``.
        answered: rows of answers.jsonl.
        ours: the trained variant.
        others: those it is held against.
        cache: file of what the judge said before; nothing is asked twice.

    Raises:
        UserError: the judge cannot be reached, refuses, or does not choose.
    """
    settings = run.eval.judge
    assert settings is not None
    desk = _Desk(settings, cache)
    found = {}
    for other in others:
        print(f"judge: {ours} against {other}", file=sys.stderr, flush=True)
        rows = answered[: settings.rows]
        pairs = [(row, row["answers"][ours], row["answers"][other]) for row in rows]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            scores = list(pool.map(lambda pair: desk.compare(*pair), pairs))
        estimate = mean_interval(scores, run.eval.confidence, run.eval.resamples, run.seed)
        undecided = sum(score == 0.5 for score in scores)
        found[other] = {**estimate.as_json(), "undecided": undecided, "model": settings.model}
    if desk.num_unreadable > MAX_UNREADABLE_FRAC * len(desk.asked):
        raise UserError(
            f"eval.judge: {settings.model} was to reply A, B or TIE, and did not in {desk.num_unreadable} of"
            f" {len(desk.asked)} replies. Take another model, or another eval.judge.question"
        )
    return found


class _Desk:
    """Asks, and remembers."""

    def __init__(self, settings: Judge, cache: Path) -> None:
        self.settings, self.cache = settings, cache
        self.asked: set[str] = set()
        cache.parent.mkdir(parents=True, exist_ok=True)
        known = read_jsonl(cache) if cache.is_file() else ()
        self.said: dict[str, str] = {told["key"]: told["choice"] for told in known}
        headers = {"authorization": f"Bearer {os.environ[KEY]}"} if os.environ.get(KEY) else {}
        self.client = httpx.Client(headers=headers, timeout=TIMEOUT_S)

    @property
    def num_unreadable(self) -> int:
        """Replies that name no answer; such a row is undecided."""
        return sum(self.said[key] == UNREADABLE for key in self.asked)

    def compare(self, row: dict[str, Any], ours: str, theirs: str) -> float:
        """1 if our answer is preferred in both orders, 0 if theirs is, else 0.5."""
        if ours == theirs:
            return 0.5
        first, second = self._ask(row, ours, theirs), self._ask(row, theirs, ours)
        if (first, second) == ("A", "B"):
            return 1.0
        return 0.0 if (first, second) == ("B", "A") else 0.5

    def _ask(self, row: dict[str, Any], a: str, b: str) -> str:
        prompt = PROMPT.format(
            question=self.settings.question, prompt=row["prompt"], wanted=row["wanted"], a=a, b=b
        )
        key = hashlib.sha256(f"{self.settings.model}\n{prompt}".encode()).hexdigest()
        self.asked.add(key)
        if key not in self.said:
            choice = self._choice(prompt)
            self.said[key] = choice
            if choice != UNREADABLE:
                append_jsonl(self.cache, {"key": key, "choice": choice})
        return self.said[key]

    def _choice(self, prompt: str) -> str:
        body = {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 16,
        }
        where = f"eval.judge: {self.settings.url}"
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(WAIT_S * 2 ** (attempt - 1))
            try:
                reply = self.client.post(f"{self.settings.url}/chat/completions", json=body)
            except httpx.HTTPError as error:
                told = str(error)
                continue
            told = f"{reply.status_code} {reply.text[:200]}"
            if reply.status_code == 429 or reply.status_code >= 500:
                continue
            break
        else:
            raise UserError(f"{where} does not answer after {ATTEMPTS} attempts: {told}")
        if reply.is_error:
            raise UserError(f"{where} refuses: {told}")
        try:
            text = str(reply.json()["choices"][0]["message"]["content"])
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{where} is no chat endpoint: {told}") from None
        found = CHOICE.fullmatch(text.upper())
        return UNREADABLE if found is None else found.group(1)
