"""Owns the likeness of rows as texts: their words and characters as features, and the most similar training rows."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from halfbyte.data.conversation import OPENING_ROLES, Row
from halfbyte.data.render import Renderer
from halfbyte.data.thoughts import without_thoughts

MAX_UNSEEN = 0.02  # of answers, up to which those of training are taken for a closed set
# Share of training answers that stand in their prompts, from which on answers are spans.
MIN_COPIED = 0.9
BLOCK = 256  # rows compared with all training rows at once
MAX_CHARS = 4_000_000  # of all prompts together
WORD = r"(?u)\w+|[^\w\s]"


@dataclass(frozen=True)
class Examples:
    """Rows as texts.

    Attributes:
        rows: the rows.
        prompts: of each, what was said before its last answer, without system messages.
        answers: the last answer of each as a model would write it, with calls and without thoughts.
        texts: what each answer says: without calls, thoughts and what the template writes before it.
    """

    rows: list[Row]
    prompts: list[str]
    answers: list[str]
    texts: list[str]

    @classmethod
    def of(cls, rows: Sequence[Row], renderer: Renderer) -> Examples:
        """Take the texts of rows."""
        plain = [_without_thoughts(row) for row in rows]
        return cls(
            rows=list(rows),
            prompts=[prompt_text(row) for row in rows],
            answers=[renderer.wanted_text(row) for row in plain],
            texts=[row.answer for row in plain],
        )


def _without_thoughts(row: Row) -> Row:
    """Return a row whose last answer has no thoughts."""
    answer = row.messages[-1]
    plain = replace(answer, reasoning=None, content=without_thoughts(answer.content))
    return replace(row, messages=(*row.messages[:-1], plain))


def prompt_text(row: Row) -> str:
    """Return what was said before a row's last answer, without system messages."""
    return "\n".join(turn.text for turn in row.messages[:-1] if turn.role not in OPENING_ROLES)


def is_closed_set(answers: Sequence[str]) -> bool:
    """Return whether answers are choices from a set that training has seen as good as whole.

    The chance that the next answer is none of these is about the share of them that came just once
    (Good 1953, "The population frequencies of species").
    """
    counts = Counter(answers)
    once = sum(count == 1 for count in counts.values())
    return len(counts) > 1 and once <= MAX_UNSEEN * len(answers)


def is_copied(examples: Examples) -> bool:
    """Return whether answers are spans of their prompts."""
    pairs = zip(examples.prompts, examples.texts, strict=True)
    copied = sum(bool(answer) and answer in prompt for prompt, answer in pairs)
    return copied >= MIN_COPIED * len(examples.answers) > 0


@dataclass(frozen=True)
class Likeness:
    """The training rows and the held-out rows of a comparison, and how like their prompts are."""

    known: Examples
    held: Examples

    @functools.cached_property
    def features(self) -> tuple[Any, Any]:
        """TF-IDF of words and of character n-grams of the prompts, fitted on the training rows.

        Two sparse matrices whose rows have length 1: (known, features) and (held, features).
        """
        return _features(self.known.prompts, self.held.prompts)

    def nearest(self, count: int) -> list[list[tuple[int, float]]]:
        """Return the most similar training rows of each held-out row with their cosine, most similar first."""
        ours, theirs = self.features
        return _most_similar(theirs, ours, count)

    def nearest_others(self, numbers: Sequence[int], count: int) -> list[list[tuple[int, float]]]:
        """Return the most similar other training rows of some training rows."""
        ours, _ = self.features
        return _most_similar(ours[numbers], ours, count, leave_out=numbers)


def _features(known: Sequence[str], held: Sequence[str]) -> tuple[Any, Any]:
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizers = (
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=WORD),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True),
    )
    size = MAX_CHARS // max(1, len(known) + len(held))
    known, held = ([_shortened(text, size) for text in texts] for texts in (known, held))
    parts = [(one.fit_transform(known), one.transform(held)) for one in vectorizers]
    scale = 0.5**0.5
    return tuple((scale * hstack(part)).tocsr() for part in zip(*parts, strict=True))


def _shortened(text: str, size: int) -> str:
    """Return the two ends of a text that is longer than ``size`` characters; of a blank one a mark."""
    half = max(100, size // 2)
    ends = text if len(text) <= 2 * half else f"{text[:half]} {text[-half:]}"
    return ends if ends.strip() else "-"


def _most_similar(
    queries: Any, known: Any, count: int, leave_out: Sequence[int] = ()
) -> list[list[tuple[int, float]]]:
    """Return the most similar known rows of each query with their cosine, most similar first."""
    likest: list[list[tuple[int, float]]] = []
    for start in range(0, queries.shape[0], BLOCK):
        block = (queries[start : start + BLOCK] @ known.T).toarray()
        for number, similar in enumerate(block, start=start):
            if leave_out:
                similar[leave_out[number]] = -1.0
            order = np.argsort(-similar, kind="stable")[:count]
            likest.append([(int(i), float(similar[i])) for i in order])
    return likest
