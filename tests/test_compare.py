"""The comparison and its report, on the finished run of a random model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import edit_rows, run_script

from halfbyte.config import read_run_folder
from halfbyte.data.conversation import Message, Row
from halfbyte.data.questions import held_out_rows, questions
from halfbyte.eval import measure as measured
from halfbyte.eval.measure import Variant, measure
from halfbyte.eval.pages import as_markdown, marked_words
from halfbyte.eval.report import build_report, write_report
from halfbyte.eval.variants import Comparison, Contender, contenders
from halfbyte.forward.packed import add_token_loss
from halfbyte.model.adapter import load_adapter
from halfbyte.model.load import load_model
from halfbyte.model.precision import Compute
from halfbyte.run_dir import read_jsonl
from halfbyte.trained.manifest import Manifest
from halfbyte.trained.run import read_trained_run

CPU32 = Compute(torch.device("cpu"), torch.float32, "test")
WITH_BASE = ["base-full-retrieval", "base-full-choices", "base-full-instructed"]
OPPONENTS = ["majority", "nearest", "linear"]  # of a closed set


NO_LIMIT = "eval.max_opponent_growth=null"  # eight rows are few beside what ranking answers reads


@pytest.fixture(scope="module")
def compared(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run, merged and compared."""
    copy = tmp_path_factory.mktemp("compared") / "run"
    shutil.copytree(trained_run, copy)
    run_script("train/merge.py", copy)
    run_script("eval/compare.py", copy, "eval.metrics=[exact_match, chrf, rouge_l]", NO_LIMIT)
    return copy


def report_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "eval" / "report.json").read_text())  # type: ignore[no-any-return]


def test_report_has_every_variant_with_its_figures(compared: Path) -> None:
    report = report_of(compared)
    names = [entry["name"] for entry in report["variants"]]
    models = ["base-full", "base-full-fewshot", "base-nf4", "adapter", "merged"]
    assert names == [*models, *WITH_BASE, *OPPONENTS]
    for entry in report["variants"]:
        for metric in ("exact_match", "chrf", "rouge_l"):
            found = entry[metric]
            assert found["ci_low"] <= found["value"] <= found["ci_high"]
            assert found["n"] == 8
        assert sum(entry["finish_reasons"].values()) == 8
        assert entry["verdict"] in ("gain", "no gain", "loss")
        if entry["name"] in (*OPPONENTS, *WITH_BASE[1:]):
            assert entry["held_out_loss"] is None
            assert (entry["weights_bytes"] == 0) == (entry["name"] in OPPONENTS)
            continue
        loss = entry["held_out_loss_interval"]
        assert 0 < loss["ci_low"] <= entry["held_out_loss"] == loss["value"] <= loss["ci_high"]
        assert entry["weights_bytes"] > 0
        assert entry["disk_bytes"] > 0
        assert entry["tokens_per_s"] > 0
    assert report["verdict"].startswith("adapter: exact_match")
    page = (compared / "eval" / "report.md").read_text()
    costs = [line.strip("|").split(" | ") for line in page.splitlines() if " MB | " in line]
    assert [cells[0].strip() for cells in costs] == names
    for entry, cells in zip(report["variants"][: len(models)], costs, strict=False):
        assert cells[1] == entry["what"]
        assert cells[2:4] == [
            f"{entry[key] / 1e6:.0f} MB" for key in ("weights_bytes", "disk_bytes")
        ]
        assert [float(cell) for cell in cells[4:7]] == pytest.approx(
            [
                entry[key]
                for key in ("prompt_tokens_per_s", "tokens_per_s", "seconds_per_1000_rows")
            ],
            abs=0.5,
        )


def test_the_best_variant_comes_first_and_the_cheapest_as_good_is_marked(compared: Path) -> None:
    report = report_of(compared)
    page = (compared / "eval" / "report.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    table = rows[2 : 2 + len(report["variants"])]
    shown = [float(cells[1].split()[0]) for cells in table]
    assert shown == sorted(shown, reverse=True)
    assert report["cheapest"] in OPPONENTS  # no row is answered right by the random model
    marked = [cells[0] for cells in table if "as good" in cells[0]]
    assert marked == [f"{report['cheapest']} (the cheapest that is as good)"]
    html = (compared / "eval" / "report.html").read_text()
    assert html.count("the cheapest that is as good") == 1
    assert "Time and quality" in html


def test_adapter_and_merged_answer_alike_and_the_4_bit_base_is_smaller(compared: Path) -> None:
    entries = {entry["name"]: entry for entry in report_of(compared)["variants"]}
    loss = entries["adapter"]["held_out_loss"]
    assert entries["merged"]["held_out_loss"] == pytest.approx(loss, rel=1e-4)
    assert entries["base-nf4"]["held_out_loss"] != pytest.approx(loss, rel=1e-4)
    assert entries["base-nf4"]["weights_bytes"] < entries["base-full"]["weights_bytes"]
    assert entries["adapter"]["weights_bytes"] > entries["base-nf4"]["weights_bytes"]
    answers = list(read_jsonl(compared / "eval" / "answers.jsonl"))
    assert len(answers) == 8
    assert all(row["answers"]["adapter"] == row["answers"]["merged"] for row in answers)


def test_disabled_adapter_gives_the_figures_of_a_separately_loaded_base(compared: Path) -> None:
    trained = read_trained_run(compared)
    run, renderer = trained.run, trained.renderer
    loaded = load_model(trained.base, "nf4", compute=CPU32)
    add_token_loss(loaded.model)
    rendered = questions(held_out_rows(trained.folder, 8, run.seed), renderer)
    alone = measure(Contender("alone", "", loaded.model, 0, rendered, renderer), run)
    entry = next(e for e in report_of(compared)["variants"] if e["name"] == "base-nf4")
    assert sum(alone.loss_columns()[0]) / sum(alone.loss_columns()[1]) == entry["held_out_loss"]
    shared = [row["answers"]["base-nf4"] for row in read_jsonl(compared / "eval" / "answers.jsonl")]
    assert alone.answers == shared


def test_held_out_loss_is_transformers_own_on_the_last_answer(compared: Path) -> None:
    trained = read_trained_run(compared)
    loaded, rows = trained.load(), held_out_rows(trained.folder, 8, trained.run.seed)
    total = count = 0.0
    for question in questions(rows, trained.renderer):
        ids, labels = torch.tensor([question.ids]), torch.tensor([question.labels])
        with torch.no_grad():
            loss = float(loaded.model(ids, labels=labels).loss)
        tokens = int((labels[:, 1:] >= 0).sum())
        total, count = total + loss * tokens, count + tokens
    entry = next(e for e in report_of(compared)["variants"] if e["name"] == "adapter")
    assert entry["held_out_loss"] == pytest.approx(total / count, rel=1e-5)


def test_long_answers_are_measured_like_short_ones(
    compared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scored in a pass of their own, after which generation begins behind what was right."""
    run = read_run_folder(compared, ["eval.variants=[base-full,adapter]"])
    trained = read_trained_run(compared, run)
    rows = held_out_rows(trained.folder, run.eval.rows, run.seed)
    rendered = questions(rows, trained.renderer)
    for contender in contenders(Comparison(trained, trained.trained_compute(), rendered)):
        short = measure(contender, run)
        with monkeypatch.context() as patch:
            patch.setattr(measured, "MAX_LABELLED_TOKENS", 0)
            long = measure(contender, run)
        assert long.answers == short.answers
        assert long.finish_reasons == short.finish_reasons
        assert [count for _, count in long.losses] == [count for _, count in short.losses]
        for mine, theirs in zip(long.losses, short.losses, strict=True):
            assert mine[0] == pytest.approx(theirs[0], rel=1e-4)


def test_further_baselines_are_measured_with_their_own_tokenizer(
    compared: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(compared, copy)
    baseline = f"eval.baselines=[{{name: other, model: {tiny_llama}, precision: fp32}}]"
    run_script("eval/compare.py", copy, "eval.variants=[adapter]", baseline)
    assert [entry["name"] for entry in report_of(copy)["variants"]] == [
        "adapter",
        "other",
        *OPPONENTS,
    ]
    assert "against other" in report_of(copy)["verdict"]


def test_thoughts_that_no_answer_has_are_reported(compared: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(compared, copy)
    path = copy / "data" / "test.jsonl"
    rows = list(read_jsonl(path))
    for row in rows:
        row["messages"][-1]["content"] = (
            f"<think>\nHm.\n</think>\n\n{row['messages'][-1]['content']}"
        )
    edit_rows(copy, path.name, rows)
    run_script("eval/compare.py", copy, "eval.variants=[adapter]", "eval.opponents=[]")
    (entry,) = report_of(copy)["variants"]
    assert (entry["thoughts"], entry["thoughts_wanted"]) == (0, len(rows))
    lines = (copy / "eval" / "report.md").read_text().splitlines()
    assert next(line for line in lines if line.startswith("| adapter |")).endswith("| none |")
    assert "answers with thoughts" in (copy / "eval" / "report.html").read_text()


def test_comparing_before_merging_names_the_command(
    trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_script("eval/compare.py", trained_run)
    assert stop.value.code == 1
    text = capsys.readouterr().err
    assert f"halfbyte merge {trained_run}" in text
    assert "eval.variants" in text


def test_report_repeats_exactly(compared: Path, tmp_path: Path) -> None:
    first = report_of(compared)
    copy = tmp_path / "run"
    shutil.copytree(compared, copy)
    run_script("eval/compare.py", copy, "eval.metrics=[exact_match, chrf, rouge_l]", NO_LIMIT)
    second = report_of(copy)
    for report in (first, second):
        del report["created"], report["digest"]
        assert "halfbyte compare" in report.pop("command")
        for entry in report["variants"]:
            for timing in (
                "tokens_per_s",
                "prompt_tokens_per_s",
                "seconds_per_1000_rows",
                "seconds",
            ):
                del entry[timing]
    assert first == second


def _variants(ours: list[float], theirs: list[float]) -> tuple[list[Row], list[Variant]]:
    rows = [
        Row(
            f"rows:{n}",
            (Message("user", f"<script>alert({n})</script>"), Message("assistant", "x & y")),
        )
        for n in range(len(ours))
    ]

    def variant(name: str, scores: list[float]) -> Variant:
        answers = [f"<b>{name}</b>"] * len(scores)
        return Variant(
            name,
            name,
            answers,
            ["stop"] * len(scores),
            scores={"exact_match": scores},
            losses=[(2.0, 2)] * len(scores),
            lengths=[3] * len(scores),
            weights_bytes=100,
            tokens_per_s=1.0,
        )

    return rows, [variant("base-full", theirs), variant("adapter", ours)]


@pytest.mark.parametrize(
    ("ours", "theirs", "wanted"),
    [
        ([1.0] * 40, [0.0] * 40, "gain"),
        ([0.0] * 40, [1.0] * 40, "loss"),
        ([1.0, 0.0] * 20, [0.0, 1.0] * 20, "no gain"),
        ([1.0, 0.0] * 20, [1.0, 0.0] * 20, "no gain"),
    ],
)
def test_verdict_is_plain_whichever_way_it_falls(
    compared: Path, ours: list[float], theirs: list[float], wanted: str
) -> None:
    _, variants = _variants(ours, theirs)
    report = build_report(read_trained_run(compared), [], variants)
    assert f"— {wanted} against base-full" in report.verdict
    assert [entry["verdict"] for entry in report.variants] == [wanted, wanted]
    assert report.verdict in as_markdown(report)


def test_html_is_self_contained_and_escapes_what_models_say(compared: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(compared, copy)
    rows, variants = _variants([1.0, 0.0, 1.0], [0.0, 1.0, 1.0])
    write_report(read_trained_run(copy), rows, variants, command="python <it>")
    page = (copy / "eval" / "report.html").read_text()
    assert page.count("<script") == 1
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(0)" in page
    assert "python &lt;it&gt;" in page
    assert page.count("<svg") == 5
    assert 'src="http' not in page
    assert 'href="http' not in page.replace('xlink:href="#', "")
    assert page.count("<article") == 3


@pytest.mark.parametrize(
    ("answer", "wanted", "marked"),
    [
        ("Asthma (J45)", "Asthma (J45)", []),
        ("Asthma (J44)", "Asthma (J45)", ["J44"]),
        ("Acute asthma (J45).", "Asthma (J45)", ["Acute asthma", "."]),
        ("", "x", []),
        ("ربو حاد", "ربو", [" حاد"]),
    ],
)
def test_words_that_differ_are_marked(answer: str, wanted: str, marked: list[str]) -> None:
    pieces = marked_words(answer, wanted)
    assert "".join(text for text, _ in pieces) == answer
    assert [text for text, differs in pieces if differs] == marked


def test_cut_off_answers_are_noted(compared: Path) -> None:
    _, variants = _variants([1.0] * 10, [0.0] * 10)
    variants[0].finish_reasons = ["length"] * 10
    report = build_report(read_trained_run(compared), [], variants)
    assert "base-full: 10 answers were cut off at eval.max_new_tokens." in report.notes


def test_changed_base_is_refused(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(compared, copy)
    manifest = Manifest.read(copy / "manifest.json")
    other = manifest.base.model_copy(update={"fingerprint": "0" * 64})
    manifest.model_copy(update={"base": other}).write(copy / "manifest.json")
    with pytest.raises(SystemExit):
        run_script("eval/compare.py", copy)
    assert "was trained on the base" in capsys.readouterr().err


def test_loaded_run_answers_with_its_adapter(compared: Path) -> None:
    trained = read_trained_run(compared)
    loaded = trained.load()
    plain = load_model(trained.base, "nf4", compute=CPU32)
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        apart = (loaded.model(ids).logits - plain.model(ids).logits).abs().max()
    assert apart > 1e-3
    again = load_adapter(plain, trained.folder.adapter)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, loaded.model(ids).logits)


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (
            ["eval.answer_pattern=(Q[0-9]+)"],
            r"matches eval\.answer_pattern '\(Q\[0-9\]\+\)' nowhere",
        ),
        (["eval.metrics=[field_match]"], "is no JSON object"),
    ],
)
def test_answers_that_could_never_be_right_are_refused_before_loading(
    compared: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], wanted: str
) -> None:
    """Otherwise every variant would score 0.000 and the verdict be a quiet "no gain"."""
    import re

    with pytest.raises(SystemExit):
        run_script("eval/compare.py", compared, *overrides)
    assert re.search(wanted, capsys.readouterr().err)
