"""Owns the judge: another model that says which of two answers is better, asked in both orders."""

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
from halfbyte.data.thoughts import without_thoughts
from halfbyte.errors import UserError
from halfbyte.eval.intervals import mean_interval
from halfbyte.run_dir import append_jsonl, read_jsonl

KEY = "HALFBYTE_JUDGE_KEY"
ATTEMPTS, TIMEOUT_S, AT_ONCE = 4, 120.0, 8
MAX_UNREADABLE_FRAC = 0.1
WAIT_S = 1.0  # before the second attempt; doubled before each further one
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
    """Return how often ``ours`` was preferred to each other variant, from 0 to 1, with its interval.

    A row counts 1 or 0 where the judge prefers the same answer in both orders, else 0.5, so that a judge
    that goes by the position has no influence (Zheng et al. 2023, §4.2). The judge is not asked about equal
    answers.

    Args:
        run: a config with ``eval.judge``.
        answered: the rows of answers.jsonl.
        ours: the trained variant.
        others: the variants it is compared with.
        cache: a file of the judge's earlier choices; it is not asked the same again.

    Raises:
        UserError: the judge cannot be reached, refuses, or does not choose.
    """
    settings = run.eval.judge
    assert settings is not None
    judge = _JudgeClient(settings, cache)
    preferences = {}
    for other in others:
        print(f"judge: {ours} against {other}", file=sys.stderr, flush=True)
        rows = answered[: settings.rows]
        pairs = [
            (row, *(without_thoughts(row["answers"][name]) for name in (ours, other)))
            for row in rows
        ]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            scores = list(pool.map(lambda pair: judge.compare(*pair), pairs))
        estimate = mean_interval(scores, run.eval.confidence, run.eval.resamples, run.seed)
        undecided = sum(score == 0.5 for score in scores)
        preferences[other] = {**estimate.as_json(), "undecided": undecided, "model": settings.model}
    if judge.num_unreadable > MAX_UNREADABLE_FRAC * len(judge.keys):
        raise UserError(
            f"eval.judge: {settings.model} should reply A, B or TIE, but did not in {judge.num_unreadable} of"
            f" {len(judge.keys)} replies. Use another model or another eval.judge.question"
        )
    return preferences


class _JudgeClient:
    """Asks the judge and caches its choices.

    Attributes:
        keys: the comparisons of this session, by hash.
        choices: the judge's choice for each, from the cache too.
    """

    def __init__(self, settings: Judge, cache: Path) -> None:
        self.settings, self.cache = settings, cache
        self.keys: set[str] = set()
        cache.parent.mkdir(parents=True, exist_ok=True)
        cached = read_jsonl(cache) if cache.is_file() else ()
        self.choices: dict[str, str] = {entry["key"]: entry["choice"] for entry in cached}
        headers = {"authorization": f"Bearer {os.environ[KEY]}"} if os.environ.get(KEY) else {}
        self.client = httpx.Client(headers=headers, timeout=TIMEOUT_S)

    @property
    def num_unreadable(self) -> int:
        """Return the number of replies that name no answer; such a row is undecided."""
        return sum(self.choices[key] == UNREADABLE for key in self.keys)

    def compare(self, row: dict[str, Any], ours: str, theirs: str) -> float:
        """Return 1 if our answer is preferred in both orders, 0 if theirs is, else 0.5."""
        if ours == theirs:
            return 0.5
        first, second = self._ask(row, ours, theirs), self._ask(row, theirs, ours)
        if (first, second) == ("A", "B"):
            return 1.0
        return 0.0 if (first, second) == ("B", "A") else 0.5

    def _ask(self, row: dict[str, Any], a: str, b: str) -> str:
        """Return A, B, TIE or ``UNREADABLE`` for two answers in this order."""
        prompt = PROMPT.format(
            question=self.settings.question, prompt=row["prompt"], wanted=row["wanted"], a=a, b=b
        )
        key = hashlib.sha256(f"{self.settings.model}\n{prompt}".encode()).hexdigest()
        self.keys.add(key)
        if key not in self.choices:
            choice = self._choice(prompt)
            self.choices[key] = choice
            if choice != UNREADABLE:
                append_jsonl(self.cache, {"key": key, "choice": choice})
        return self.choices[key]

    def _choice(self, prompt: str) -> str:
        """Send a prompt to the endpoint, with retries, and read the choice from its reply."""
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
                problem = str(error)
                continue
            problem = f"{reply.status_code} {reply.text[:200]}"
            if reply.status_code == 429 or reply.status_code >= 500:
                continue
            break
        else:
            raise UserError(f"{where} does not answer after {ATTEMPTS} attempts: {problem}")
        if reply.is_error:
            raise UserError(f"{where} refuses: {problem}")
        try:
            text = str(reply.json()["choices"][0]["message"]["content"])
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{where} is not a chat endpoint: {problem}") from None
        match = CHOICE.fullmatch(text.upper())
        return UNREADABLE if match is None else match.group(1)
