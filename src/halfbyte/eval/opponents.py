"""Owns the opponents without a model: what the training answers alone give, by counting and by likeness of words."""

from __future__ import annotations

import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from halfbyte.config import Run
from halfbyte.data.render import Renderer
from halfbyte.eval.base_opponents import not_applying
from halfbyte.eval.likeness import WORD, Examples, Likeness, is_closed_set, is_copied
from halfbyte.eval.measure import Variant, record_chosen
from halfbyte.scoring.rows import mean_score

MAJORITY, NEAREST, LINEAR, COPY = "majority", "nearest", "linear", "copy"
NEIGHBOURS = (1, 3, 5, 9)
NUM_CHOOSING = 500  # training rows on which the number of neighbours is chosen
MAX_SPAN_WORDS = 12
MAX_COEFFICIENTS = 30_000_000  # of a logistic regression, which holds twenty times their bytes
NUM_COPYING = 500  # training rows whose spans are counted


def opponents(likeness: Likeness, renderer: Renderer, run: Run) -> tuple[list[Variant], list[str]]:
    """Answer the held-out rows without a model, and score the answers as those of models.

    Args:
        likeness: the training rows that the run kept, one at least, and the rows of the comparison.
        renderer: of the run.
        run: its settings.

    Returns:
        ``majority`` and ``nearest``; ``linear`` where answers are a closed set, ``copy`` where they are spans
        of their prompts. And a note for each that would cost too much.
    """
    known, held = likeness.known, likeness.held
    ways: dict[str, Callable[[], tuple[str, list[str]]]] = {
        MAJORITY: lambda: _majority(known, held),
        NEAREST: lambda: _nearest(likeness, renderer, run),
        LINEAR: lambda: _linear(likeness),
        COPY: lambda: _copy(known, held),
    }
    shared = time.perf_counter()
    if {NEAREST, LINEAR} & {*run.eval.allowed_opponents}:
        likeness.features  # noqa: B018  (of both, and counted for each)
    shared = time.perf_counter() - shared
    names, notes = opponent_names(likeness, run)
    variants: list[Variant] = []
    for name in names:
        start = time.perf_counter()
        what, answers = ways[name]()
        variant = Variant(name, what, seconds=time.perf_counter() - start)
        variant.seconds += shared if name in (NEAREST, LINEAR) else 0.0
        record_chosen(variant, answers, held.rows, renderer, run)
        variants.append(variant)
    return variants, notes


def opponent_names(likeness: Likeness, run: Run) -> tuple[list[str], list[str]]:
    """Return the opponents without a model that apply to these rows, and a note for each that was expected and is left out."""
    known = likeness.known
    applies = {
        MAJORITY: True,
        NEAREST: True,
        LINEAR: is_closed_set(known.answers),
        COPY: is_copied(known),
    }
    allowed = [name for name in applies if name in run.eval.allowed_opponents]
    names: list[str] = [name for name in allowed if applies[name]]
    notes = not_applying(set(allowed) - set(names), run)
    if LINEAR in names:
        size = len(set(known.answers)) * likeness.features[0].shape[1]
        if size > MAX_COEFFICIENTS:
            names.remove(LINEAR)
            notes.append(f"{LINEAR} was left out: it would have {size:,} coefficients.")
    return names, notes


def _majority(known: Examples, held: Examples) -> tuple[str, list[str]]:
    """Give the most frequent training answer to every row."""
    ((answer, count),) = Counter(known.answers).most_common(1)
    share = count / len(known.answers)
    return f"the most frequent training answer, {share:.1%} of them", [answer] * len(held.prompts)


def _nearest(likeness: Likeness, renderer: Renderer, run: Run) -> tuple[str, list[str]]:
    """Let the training rows with the most similar prompts vote, each with its similarity."""
    known = likeness.known
    sample = range(0, len(known.prompts), max(1, len(known.prompts) // NUM_CHOOSING))
    others = likeness.nearest_others(sample, max(NEIGHBOURS))
    rows = [known.rows[number] for number in sample]

    def score(count: int) -> float:
        answers = [_vote(row[:count], known.answers) for row in others]
        return mean_score(answers, rows, renderer.answer_format, run)

    best = max(NEIGHBOURS, key=score)  # the first of equal ones
    answers = [_vote(row, known.answers) for row in likeness.nearest(best)]
    voters = "row" if best == 1 else f"{best} rows"
    return f"vote of the {voters} of training with the most similar words", answers


def _vote(neighbours: Sequence[tuple[int, float]], answers: Sequence[str]) -> str:
    """Return the answer with the largest sum of similarities; of equal ones that of the nearest."""
    sums: dict[str, float] = defaultdict(float)
    for row, similarity in neighbours:
        sums[answers[row]] += similarity
    return max(sums, key=lambda answer: sums[answer])


def _linear(likeness: Likeness) -> tuple[str, list[str]]:
    """Classify prompts by logistic regression."""
    from sklearn.linear_model import LogisticRegression

    ours, theirs = likeness.features
    model = LogisticRegression(C=10.0, max_iter=500)
    model.fit(ours.astype(np.float32), likeness.known.answers)  # in half the time
    what = (
        f"logistic regression on words and characters of the prompt, {len(model.classes_)} answers"
    )
    return what, [str(answer) for answer in model.predict(theirs.astype(np.float32))]


def _copy(known: Examples, held: Examples) -> tuple[str, list[str]]:
    """Choose the span of each prompt whose surroundings and words are most like those of training answers."""
    in_spans: Counter[tuple[str, str]] = Counter()
    everywhere: Counter[tuple[str, str]] = Counter()
    for prompt, answer in list(zip(known.prompts, known.texts, strict=True))[:NUM_COPYING]:
        for text, signs in _spans(prompt):
            everywhere.update(signs)
            if text == answer:
                in_spans.update(signs)

    def evidence(signs: list[tuple[str, str]]) -> float:
        return sum(math.log((in_spans[sign] + 0.1) / (everywhere[sign] + 1.0)) for sign in signs)

    # What the template has a model write before an answer, such as the end of thoughts that it opens.
    before = known.answers[0].removesuffix(known.texts[0])
    answers = [
        before + max(_spans(prompt), key=lambda span: evidence(span[1]), default=("", []))[0]
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
