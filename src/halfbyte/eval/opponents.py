"""Owns the opponents without a model: what the training answers alone give, by counting and by likeness of words."""

from __future__ import annotations

import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from halfbyte.config import Run
from halfbyte.data.conversation import OPENING_ROLES, Row
from halfbyte.data.render import Renderer
from halfbyte.data.thoughts import without_thoughts
from halfbyte.eval.measure import Variant, record_scores

MAJORITY, NEAREST, LINEAR, COPY = "majority", "nearest", "linear", "copy"
WITHOUT_MODEL = (MAJORITY, NEAREST, LINEAR, COPY)
MAX_UNSEEN = 0.02  # of answers, up to which those of training are taken for a closed set
MIN_COPIED = (
    0.9  # share of training answers that stand in their prompts, from which on answers are spans
)
NEIGHBOURS = (1, 3, 5, 9)
NUM_CHOOSING = 500  # training rows on which the number of neighbours is chosen
BLOCK = 256  # rows compared with all training rows at once
MAX_SPAN_WORDS = 12
NUM_COPYING = 500  # training rows whose spans are counted
MAX_CHARS = 4_000_000  # of all prompts together
WORD = r"(?u)\w+|[^\w\s]"


@dataclass(frozen=True)
class Examples:
    """Rows as texts.

    Attributes:
        rows: the rows.
        prompts: of each, what was said before its last answer, without system messages.
        answers: the last answer of each as a model would write it, with calls and without thoughts.
    """

    rows: list[Row]
    prompts: list[str]
    answers: list[str]

    @classmethod
    def of(cls, rows: Sequence[Row], renderer: Renderer) -> Examples:
        """Take the texts of rows."""
        prompts = [prompt_text(row) for row in rows]
        return cls(
            list(rows), prompts, [renderer.wanted_text(_without_thoughts(row)) for row in rows]
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
    pairs = zip(examples.prompts, examples.answers, strict=True)
    copied = sum(bool(answer) and answer in prompt for prompt, answer in pairs)
    return copied >= MIN_COPIED * len(examples.answers) > 0


def opponents(
    train: Sequence[Row], held_out: Sequence[Row], renderer: Renderer, run: Run
) -> list[Variant]:
    """Answer the held-out rows without a model, and score the answers as those of models.

    Args:
        train: the training rows that the run kept.
        held_out: the rows of the comparison.
        renderer: of the run.
        run: its settings.

    Returns:
        ``majority`` and ``nearest``; ``linear`` where answers are a closed set, ``copy`` where they are spans
        of their prompts.
    """
    known, held = Examples.of(train, renderer), Examples.of(held_out, renderer)
    ways: dict[str, Callable[[], tuple[str, list[str]]]] = {
        MAJORITY: lambda: _majority(known, held),
        NEAREST: lambda: _nearest(known, held, renderer, run),
    }
    if is_closed_set(known.answers):
        ways[LINEAR] = lambda: _linear(known, held)
    if is_copied(known):
        ways[COPY] = lambda: _copy(known, held)
    variants: list[Variant] = []
    if not train:
        return variants
    for name, way in ways.items():
        if name not in run.eval.opponents:
            continue
        start = time.perf_counter()
        what, answers = way()
        variant = Variant(name, what, seconds=time.perf_counter() - start)
        variant.row_seconds = variant.seconds / len(answers)
        variant.finish_reasons = ["stop"] * len(answers)
        record_scores(variant, answers, held.rows, renderer, run)
        variants.append(variant)
    return variants


def _majority(known: Examples, held: Examples) -> tuple[str, list[str]]:
    """Give the most frequent training answer to every row."""
    ((answer, count),) = Counter(known.answers).most_common(1)
    share = count / len(known.answers)
    return f"the most frequent training answer, {share:.1%} of them", [answer] * len(held.prompts)


def features(known: Sequence[str], held: Sequence[str]) -> tuple[Any, Any]:
    """Return TF-IDF of words and of character n-grams of texts, fitted on the first ones.

    Returns:
        two sparse matrices whose rows have length 1: (known, features) and (held, features).
    """
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


def _nearest(
    known: Examples, held: Examples, renderer: Renderer, run: Run
) -> tuple[str, list[str]]:
    """Let the training rows with the most similar prompts vote, each with its similarity."""
    ours, theirs = features(known.prompts, held.prompts)
    step = max(1, len(known.prompts) // NUM_CHOOSING)
    sample = range(0, len(known.prompts), step)
    likest = _most_similar(ours[sample], ours, max(NEIGHBOURS), leave_out=sample)
    metric = run.eval.metrics[0]
    scored = {}
    for count in NEIGHBOURS:
        trial = Variant(NEAREST, "")
        answers = [_vote(row[:count], known.answers) for row in likest]
        record_scores(trial, answers, [known.rows[i] for i in sample], renderer, run)
        scored[count] = float(np.mean(trial.scores[metric]))
    best = max(NEIGHBOURS, key=lambda count: scored[count])  # the first of equal ones
    answers = [_vote(row[:best], known.answers) for row in _most_similar(theirs, ours, best)]
    rows = "row" if best == 1 else f"{best} rows"
    return f"vote of the {rows} of training with the most similar words", answers


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


def _vote(neighbours: Sequence[tuple[int, float]], answers: Sequence[str]) -> str:
    """Return the answer with the largest sum of similarities; of equal ones that of the nearest."""
    sums: dict[str, float] = defaultdict(float)
    for row, similarity in neighbours:
        sums[answers[row]] += similarity
    return max(sums, key=lambda answer: sums[answer])


def _linear(known: Examples, held: Examples) -> tuple[str, list[str]]:
    """Classify prompts by logistic regression."""
    from sklearn.linear_model import LogisticRegression

    ours, theirs = features(known.prompts, held.prompts)
    model = LogisticRegression(C=10.0, max_iter=500)
    model.fit(ours, known.answers)
    what = (
        f"logistic regression on words and characters of the prompt, {len(model.classes_)} answers"
    )
    return what, [str(answer) for answer in model.predict(theirs)]


def _copy(known: Examples, held: Examples) -> tuple[str, list[str]]:
    """Choose the span of each prompt whose surroundings and words are most like those of training answers."""
    in_spans: Counter[tuple[str, str]] = Counter()
    everywhere: Counter[tuple[str, str]] = Counter()
    for prompt, answer in list(zip(known.prompts, known.answers, strict=True))[:NUM_COPYING]:
        for text, signs in _spans(prompt):
            everywhere.update(signs)
            if text == answer:
                in_spans.update(signs)

    def evidence(signs: list[tuple[str, str]]) -> float:
        return sum(math.log((in_spans[sign] + 0.1) / (everywhere[sign] + 1.0)) for sign in signs)

    answers = [
        max(_spans(prompt), key=lambda span: evidence(span[1]), default=("", []))[0]
        for prompt in held.prompts
    ]
    return "the span of the prompt that is most like a training answer", answers


def _spans(prompt: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the spans of a prompt between words, each with the signs by which it is chosen."""
    words = [match.span() for match in re.finditer(WORD, prompt)]
    texts = ["", *(prompt[start:end].casefold() for start, end in words), ""]
    spans = []
    for first in range(len(words)):
        for last in range(first, min(first + MAX_SPAN_WORDS, len(words))):
            text = prompt[words[first][0] : words[last][1]]
            shape = "".join("9" if c.isdigit() else "A" if c.isupper() else "a" for c in text[:1])
            signs = [
                ("before", texts[first]),
                ("after", texts[last + 2]),
                ("words", str(last - first)),
                ("shape", shape),
                ("place", str(10 * first // len(words))),
            ]
            spans.append((text, signs))
    return spans
