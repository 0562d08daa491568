"""Charts of a plan: whole files, every number in words too, nothing unescaped, nothing fetched."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import escape
from PIL import Image
from transformers import LlamaConfig

from halfbyte.config import model_run
from halfbyte.plan.devices import find_device
from halfbyte.plan.plots import trace_curves, write_plots
from halfbyte.plan.report import Plan, as_json, make_plan
from halfbyte.plan.report_text import TERMS
from halfbyte.plan.shape import Lengths

EVIL = "--></title><script>alert('$x$')</script>"
SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
}


def tiny_plan(name: str, device: str, *given: str, **sizes: int) -> Plan:
    run = model_run(name, ["train.batch_size=4", "data.max_length=256", *given])
    config = LlamaConfig(**SIZES | sizes)
    lengths = Lengths.all_of(run.data.max_length, run.train.batch_size)
    return make_plan(run, config, "built here", find_device(device), lengths)


@pytest.fixture(scope="module")
def fitting() -> Plan:
    return tiny_plan("tiny/llama", "t4")


class Requests(HTMLParser):
    """Collects what a page would make a browser fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A tag that fetches, or a link that leads off the page."""
        if tag in ("script", "link", "img", "iframe", "object", "embed", "image"):
            self.found.append(tag)
        links = [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]
        self.found += [link for link in links if not link.startswith("#")]


def requests_of(page: str) -> list[str]:
    parser = Requests()
    parser.feed(page)
    urls = [f"url({u}" for u in re.findall(r"url\(([^)]*)", page) if not u.startswith("#")]
    plain = re.sub(
        r'xmlns(:\w+)?="[^"]*"', "", re.sub(r"<metadata>.*?</metadata>", "", page, flags=re.S)
    )
    return parser.found + urls + re.findall(r"https?://[^\s\"'<]*", plain)


@pytest.mark.slow
def test_write_plots_writes_a_whole_png_and_page(fitting: Plan, tmp_path: Path) -> None:
    paths = write_plots(fitting, as_json(fitting), tmp_path / "new" / "plot.v2")
    assert [path.name for path in paths] == ["plot.v2.png", "plot.v2.html"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "plot.v2.html",
        "plot.v2.png",
    ]
    with Image.open(paths[0]) as picture:
        assert picture.format == "PNG"
        assert picture.size == (1650, 1200)
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 20
    page = paths[1].read_text(encoding="utf-8")
    assert page.count("<svg") == page.count("</svg>") == 3
    assert "Fits on Tesla T4, with " in page
    assert fitting.train.checkpointing is False
    assert "accumulated, checkpointing off, " in page
    assert all(str(escape(words)) in page for words in TERMS.values())
    assert f">{fitting.train.needed_bytes / 1e9:.3f}</td>" in page
    assert fitting.train.when in page
    assert "halfbyte plan tiny/llama data.max_length=256 train.batch_size=4 --device t4" in page
    assert requests_of(page) == []


@pytest.mark.slow
def test_write_plots_replaces_its_own_suffix_and_older_files_when_asked_again(
    fitting: Plan, tmp_path: Path
) -> None:
    report = as_json(fitting)
    first = [path.read_bytes() for path in write_plots(fitting, report, tmp_path / "a.html")]
    again = [path.read_bytes() for path in write_plots(fitting, report, tmp_path / "a.PNG")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.png"]
    assert first == again


def test_write_plots_escapes_names_when_a_target_is_hostile(fitting: Plan, tmp_path: Path) -> None:
    plan = replace(fitting, target=EVIL, device=replace(fitting.device, title=EVIL))
    page = write_plots(plan, as_json(plan), tmp_path / "plot")[1].read_text(encoding="utf-8")
    assert page.count(str(escape(EVIL))) >= 4  # title, heading, verdict, device
    assert "<script" not in re.sub(r"<!--.*?-->", "", page, flags=re.S)
    assert requests_of(page) == []


# halfbyte.plan.step switches recomputation off by the name that transformers 5.17 has too.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_disable` is deprecated:FutureWarning")
@pytest.mark.slow
def test_page_says_what_else_fits_when_the_plan_does_not(tmp_path: Path) -> None:
    plan = tiny_plan(
        "tiny/llama",
        "0.61gb",
        "train.micro_batch_size=16",
        "train.batch_size=16",
        "train.checkpointing=off",
        "model.attention=eager",
        vocab_size=1 << 15,
        max_position_embeddings=256,
    )
    report = as_json(plan)
    assert not plan.fits
    assert report["suggestions"]
    page = write_plots(plan, report, tmp_path / "plot")[1].read_text(encoding="utf-8")
    assert "Does not fit on a card with 0.61 GiB: " in page
    assert all(str(escape(found["override"])) in page for found in report["suggestions"])
    assert all(str(escape(found["costs"])) in page for found in report["suggestions"])
    lost = report | {"suggestions": [], "device": report["device"] | {"cards_that_fit": ["a", "b"]}}
    page = write_plots(plan, lost, tmp_path / "plot")[1].read_text(encoding="utf-8")
    assert "None of the settings tried makes it fit" in page
    assert "with checkpointing: a, b." in page


def test_trace_curves_has_planned_point_and_what_a_plan_of_each_point_says(fitting: Plan) -> None:
    curves = trace_curves(fitting)
    train = fitting.train
    assert list(curves) == [1, 2, 4]
    assert curves[train.micro_batch_size][train.length] == train.needed_bytes
    for rows, curve in curves.items():
        assert list(curve) == [128, 256, 512]  # the model takes no more
        assert list(curve.values()) == sorted(curve.values())
        again = tiny_plan(
            "tiny/llama",
            "t4",
            "data.max_length=512",
            f"train.micro_batch_size={rows}",
            f"train.checkpointing={'on' if train.checkpointing else 'off'}",
        )
        assert curve[512] == again.train.needed_bytes
