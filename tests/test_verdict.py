"""The verdict in one line: the base, the strongest opponents, and the cheapest that is as good."""

from __future__ import annotations

from typing import Any

import pytest

from halfbyte.config import model_run
from halfbyte.eval.measure import Variant
from halfbyte.eval.verdict import cheapest, overall, verdict_line

RUN = model_run("org/tiny", [])


def difference(value: float, verdict: str) -> dict[str, Any]:
    ends = {"ci_low": value - 0.1, "ci_high": value + 0.1}
    return {"value": value, **ends, "n": 100, "rows_needed": None, "verdict": verdict}


def line(**verdicts: tuple[float, str]) -> str:
    against = {name.replace("_", "-"): difference(*one) for name, one in verdicts.items()}
    estimate = {"value": 0.5, "ci_low": 0.4, "ci_high": 0.6}
    entries = [{"name": name, "exact_match": estimate} for name in ("adapter", *against)]
    return verdict_line(entries, against, "exact_match", RUN)


def test_opponents_that_are_as_good_are_named_first() -> None:
    text = line(
        base_full=(0.5, "gain"),
        base_nf4=(0.5, "gain"),
        majority=(0.4, "gain"),
        nearest=(-0.1, "no gain"),
        linear=(-0.3, "loss"),
    )
    assert "— gain over the base, not over linear and nearest; gain against base-full" in text
    assert text.index("loss against linear") < text.index("no gain against nearest")
    assert "majority" not in text


def test_where_all_are_beaten_the_strongest_is_named() -> None:
    text = line(base_full=(0.5, "gain"), majority=(0.4, "gain"), nearest=(0.2, "gain"))
    assert "gain against nearest (+0.200 [+0.100, +0.300]), the strongest opponent." in text
    assert "majority" not in text


@pytest.mark.parametrize("nf4", ["gain", "no gain"])
def test_no_gain_over_the_base_is_claimed_where_one_of_its_forms_is_not_beaten(nf4: str) -> None:
    text = line(base_full=(-0.2, "loss"), base_nf4=(0.3, nf4), nearest=(0.0, "no gain"))
    assert "gain over the base" not in text
    assert "loss against base-full" in text


def test_nothing_to_compare_with_is_said() -> None:
    assert line().startswith("No verdict")


def scored(name: str, right: int, size: int, seconds: float | None = None) -> Variant:
    scores = {"exact_match": [1.0] * right + [0.0] * (100 - right)}
    return Variant(name, "", scores=scores, weights_bytes=size, row_seconds=seconds)


def test_the_cheapest_is_one_that_is_not_shown_to_be_worse() -> None:
    variants = [
        scored("adapter", 80, 50),
        scored("merged", 80, 90),
        scored("nearest", 20, 0, 0.1),
        scored("linear", 79, 0, 0.2),
    ]
    assert cheapest(RUN, variants, "exact_match") == "linear"
    assert cheapest(RUN, variants[:3], "exact_match") == "adapter"
    assert cheapest(RUN, variants[:1], "exact_match") is None
    assert cheapest(RUN, variants, "chrf") is None
    # A time that was not measured is not the shortest.
    pair = [scored("a", 80, 0), scored("b", 80, 0, 9.0)]
    assert cheapest(RUN, pair, "exact_match") == "b"


def test_the_overall_verdict_is_the_worst() -> None:
    found = {"base-full": difference(0.5, "gain"), "merged": difference(0.0, "no gain")}
    assert overall(found) == "gain"
    assert overall(found | {"linear": difference(-0.2, "loss")}) == "loss"
    assert overall({}) == "no gain"
