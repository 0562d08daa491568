"""The report in a real browser: no error, nothing asked elsewhere, its filters work by clicks, a phone is enough."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browsing import Opened
from test_compare import report_of

from halfbyte.config import read_run_folder
from halfbyte.data.conversation import Message, Row
from halfbyte.eval.measure import Variant
from halfbyte.eval.plots import LABEL_HEIGHT, label_places
from halfbyte.eval.report import write_report
from halfbyte.run_dir import read_jsonl
from halfbyte.trained.run import read_trained_run

SCORES = {
    "base-full": [0.0, 1.0, 0.5, 1.0, 0.0, 0.2, 0.0, 1.0],
    "base-nf4": [0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0],
    "adapter": [1.0, 0.0, 0.7, 1.0, 1.0, 0.1, 0.0, 1.0],
}
CUT = {"base-full": {0, 4}, "base-nf4": {1}, "adapter": {1, 6}}


@pytest.fixture(scope="module")
def compared(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a report on eight rows, of which each filter shows some."""
    copy = tmp_path_factory.mktemp("paged") / "run"
    shutil.copytree(trained_run, copy)
    rows = [
        Row(
            f"rows:{n}",
            (Message("user", f"diagnosis {n}"), Message("assistant", f"Asthma (J4{n})")),
        )
        for n in range(8)
    ]
    variants = [
        Variant(
            name,
            f"what {name} is",
            [f"Asthma of {name} (J4{n})" for n in range(8)],
            ["length" if n in CUT[name] else "stop" for n in range(8)],
            scores={"chrf": scores},
            losses=[(2.0, 2)] * 8,
            lengths=[n + 3 for n in range(8)],
            weights_bytes=10**8,
            tokens_per_s=90.0,
        )
        for name, scores in SCORES.items()
    ]
    run = read_run_folder(copy, ["eval.metrics=[chrf]"])
    write_report(read_trained_run(copy, run), rows, variants, command="python eval/compare.py run")
    return copy


@pytest.fixture
def page(opened: Opened, compared: Path) -> Iterator[Any]:
    """The report, open; at the end nothing was asked elsewhere and nothing failed."""
    opened.page.goto((compared / "eval" / "report.html").as_uri())
    yield opened.page
    assert not opened.failed + opened.console
    assert opened.requests == [(compared / "eval" / "report.html").as_uri()]


def shown(page: Any) -> list[str]:
    """The prompts of the rows that stand on the page; text below the screen is not yet drawn, so no inner_text."""
    rows = [row for row in page.query_selector_all(".row") if row.is_visible()]
    return [row.query_selector(".prompt").text_content() for row in rows]


def test_filters_show_the_rows_they_name(page: Any, compared: Path) -> None:
    rows = list(read_jsonl(compared / "eval" / "answers.jsonl"))
    assert len(shown(page)) == len(rows) == 8
    for other in ("base-full", "base-nf4"):
        page.select_option("#against", other)
        scores = [(row["scores"]["adapter"], row["scores"][other]) for row in rows]
        assert [ours["chrf"] for ours, _ in scores] == SCORES["adapter"]
        wins = [ours["chrf"] > theirs["chrf"] for ours, theirs in scores]
        losses = [ours["chrf"] < theirs["chrf"] for ours, theirs in scores]
        wrong = [ours["chrf"] < 1 for ours, _ in scores]
        cut = [row["finish_reasons"]["adapter"] == "length" for row in rows]
        assert 0 < sum(wins) < 8
        assert sum(cut) == 2
        for name, wanted in (("win", wins), ("loss", losses), ("wrong", wrong), ("cut", cut)):
            page.click(f"button[data-filter={name}]")
            assert shown(page) == [
                row["prompt"] for row, fits in zip(rows, wanted, strict=True) if fits
            ]
            assert page.get_attribute(f"button[data-filter={name}]", "aria-pressed") == "true"
            assert page.inner_text("#count") == f"{sum(wanted)} of 8 rows"
        page.click("button[data-filter=all]")
        assert len(shown(page)) == 8
        opponents = page.query_selector_all("dt.opponent")
        assert {mark.get_attribute("data-variant") for mark in opponents} == {other}


def test_words_narrow_the_rows_further(page: Any, compared: Path) -> None:
    rows = list(read_jsonl(compared / "eval" / "answers.jsonl"))
    page.fill("#search", rows[3]["prompt"].upper())
    assert rows[3]["prompt"] in shown(page)
    page.fill("#search", "no such words anywhere")
    assert shown(page) == []
    assert page.inner_text("#count") == "0 of 8 rows"


def test_the_page_is_no_wider_than_the_screen(page: Any, compared: Path) -> None:
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert report_of(compared)["verdict"] in page.inner_text("body")
    assert "python eval/compare.py" in page.inner_text("pre")


def test_paper_has_every_row_and_no_buttons(page: Any) -> None:
    page.emulate_media(media="print")
    assert not page.is_visible("#filters")
    assert len(page.query_selector_all(".row:not([hidden])")) == 8


@pytest.mark.parametrize(("media", "width"), [("screen", None), ("print", 718)])  # A4's, in margins
def test_no_figure_is_beyond_the_edge(page: Any, media: str, width: int | None) -> None:
    page.emulate_media(media=media)
    if width is not None:
        page.set_viewport_size({"width": width, "height": 1000})
    seen = page.viewport_size["width"]
    cells = [cell for cell in page.query_selector_all("td") if cell.is_visible()]
    assert len(cells) > 20
    for cell in cells:
        box = cell.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= seen
        beyond = cell.evaluate("cell => cell.scrollWidth - cell.clientWidth")
        assert beyond <= 0, cell.inner_text()
        hidden = "cell => (box => box.scrollWidth - box.clientWidth)(cell.closest('table').parentElement)"
        assert cell.evaluate(hidden) <= 0, cell.inner_text()
        if not page.is_visible("thead"):
            name = cell.get_attribute("data-label")
            label = cell.evaluate("cell => getComputedStyle(cell, '::before').content")
            assert label == (f'"{name}"' if name else "none")


def test_labels_of_near_points_stand_apart_and_others_stay() -> None:
    points = {
        "adapter": (188.0, 0.573),
        "base-nf4": (181.0, 0.0),
        "merged": (269.0, 0.57),
        "merged-again": (270.0, 0.58),
        "far": (1072.0, 0.575),
    }
    placed = label_places(points, 1447.0, (-0.03, 1.03))
    near = sorted(placed[name] for name in ("adapter", "merged", "merged-again"))
    assert all(b - a >= 0.999 * LABEL_HEIGHT * 1.06 for a, b in pairwise(near))
    assert placed["far"] == 0.575
    assert placed["base-nf4"] == 0.0
    assert near[-1] < 0.573 + 3 * LABEL_HEIGHT
