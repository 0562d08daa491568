"""Owns which settings real rows need: they are prepared with the model's own tokenizer and template."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from halfbyte.config.dataset import Repair
from halfbyte.config.read import run_of
from halfbyte.data.prepare import prepare
from halfbyte.data.prepared import Prepared, empty_shares
from halfbyte.data.render import renderer_of
from halfbyte.errors import DataError
from halfbyte.model.resolve import Base, resolve_base
from halfbyte.model.tokenizer import load_tokenizer

# What rows may need, the change that loses least first. Each: key, value, and what is said of it.
REMEDIES: tuple[tuple[str, Any, str], ...] = (
    ("data.on_leak", "drop", "some training prompts are held out as well"),
    (
        "data.chat_template",
        "hermes",
        "the model's own template does not show all that the rows have",
    ),
    ("data.chat_template", "chatml", "the model has no chat template that fits"),
    ("data.system_as", "user", "the template has no system message"),
    ("data.stop", "eos", "the template writes no token that ends an answer"),
    ("data.repair", list(get_args(Repair)), "some rows' turns are out of order"),
    ("data.on_malformed", "drop", "some rows cannot be read"),
)
NONE_LEFT = "no row is left"  # in the error of ``prepare``
MAX_DROPPED_FRAC = 0.1
TEST_FRACS = (0.1, 0.2, 0.3, 0.5)
STEP_TOKENS = 64  # lengths are multiples of it


@dataclass
class Fitted:
    """Settings with which rows are prepared.

    Attributes:
        settings: key → value.
        notes: key → why it is not the default.
        prepared: the rows, of any length.
        base: whose tokenizer encodes them.
    """

    settings: dict[str, Any]
    notes: dict[str, str]
    prepared: Prepared
    base: Base


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings by their sections: ``data.train`` becomes ``{"data": {"train": …}}``."""
    sections: dict[str, Any] = {}
    for key, value in settings.items():
        *path, last = key.split(".", 1)
        place = sections.setdefault(path[0], {}) if path else sections
        place[last] = value
    return sections


def fit_rows(settings: dict[str, Any], say: Callable[[str], None]) -> Fitted:
    """Prepare the rows of a config, changing what they need changed.

    Args:
        settings: key → value, with absolute paths.
        say: is given a line for each change.

    Raises:
        DataError: no change makes the rows usable, or more than a tenth of them would be dropped.
    """
    notes: dict[str, str] = {}
    base = resolve_base(settings["model.name"], weights=False)

    def attempt(trial: dict[str, Any]) -> Fitted:
        run = run_of(nested(trial), "halfbyte init")
        renderer = renderer_of(run.data, load_tokenizer(base))  # which takes over the template
        data = run.data.model_copy(update={"max_length": sys.maxsize})
        prepared = prepare(data, renderer, run.seed)
        if empty := empty_shares(prepared, run.data):
            raise DataError("\n".join(empty))
        return Fitted(trial, notes, prepared, base)

    fitted = _attempt_with_changes(attempt, settings, notes)
    for key, why in notes.items():
        say(f"{key}={fitted.settings[key]}: {why}")
    dropped, read = _lost(fitted.prepared)
    if dropped > MAX_DROPPED_FRAC * read:
        reasons = ", ".join(f"{n} {why}" for why, n in fitted.prepared.ledger.dropped.items())
        raise DataError(
            f"{dropped} of {read} rows would be dropped ({reasons}), more than a tenth. halfbyte preview shows"
            " them; write the config by hand if they are to go"
        )
    return fitted


def _attempt_with_changes(
    attempt: Callable[[dict[str, Any]], Fitted], settings: dict[str, Any], notes: dict[str, str]
) -> Fitted:
    """Make one change after another, each of which must help, until the rows can be prepared."""
    try:
        return attempt(settings)
    except DataError as error:
        last = error
    while True:
        for change, why in _changes(settings):
            trial = settings | change
            try:
                fitted = attempt(trial)
            except DataError as error:
                no_effect = any(key in str(error) for key in change)
                if no_effect or NONE_LEFT in str(error) or _kind(error) == _kind(last):
                    continue  # it does not help
                settings, last = trial, error
                notes |= why
                break
            notes |= why
            return _without_needless(attempt, fitted)
        else:
            raise last


def _without_needless(attempt: Callable[[dict[str, Any]], Fitted], fitted: Fitted) -> Fitted:
    """Take back changes that a later one has made needless."""
    for key in list(fitted.notes)[:-1]:
        if key == "data.test_frac":
            continue
        try:
            fitted = attempt({k: value for k, value in fitted.settings.items() if k != key})
        except DataError:
            continue
        del fitted.notes[key]
    return fitted


def _changes(settings: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """Yield changes that may help, with what is said of each key: single ones, then two together."""
    single: list[tuple[dict[str, Any], dict[str, str]]] = [
        ({key: value}, {key: why}) for key, value, why in REMEDIES if key not in settings
    ]
    held_out = settings.get("data.test_frac")
    if held_out in TEST_FRACS[:-1]:
        larger = TEST_FRACS[TEST_FRACS.index(held_out) + 1]
        single.append(({"data.test_frac": larger}, {"data.test_frac": "the rows are few"}))
    yield from single
    for (one, of_one), (other, of_other) in combinations(single, 2):
        if one.keys() != other.keys():
            yield one | other, of_one | of_other


def _kind(error: DataError) -> str:
    """Return an error without its numbers: of the same kind, it names only other rows."""
    return "".join(char for char in str(error)[:160] if not char.isdigit())


def _lost(prepared: Prepared) -> tuple[int, int]:
    """Return how many rows were dropped as unusable, and how many were read."""
    kept = ("weight 0",)
    dropped = sum(n for why, n in prepared.ledger.dropped.items() if why not in kept)
    return dropped, sum(prepared.ledger.rows_in.values())


def length_for(lengths: NDArray[np.int64], limit: int) -> tuple[int, int]:
    """Return the ``max_length`` for rows of these lengths, and how many are longer.

    The longest row counts, unless it is far longer than almost all: then the 99th percentile does.

    Args:
        lengths: tokens of each row, (rows,).
        limit: most tokens that the model reads.
    """
    longest = int(lengths.max())
    usual = int(np.quantile(lengths, 0.99))
    chosen = longest if longest <= 2 * usual else usual
    rounded = min(-(-chosen // STEP_TOKENS) * STEP_TOKENS, limit)
    return rounded, int((lengths > rounded).sum())
