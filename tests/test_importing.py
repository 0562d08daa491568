"""Configs of Axolotl, LLaMA-Factory, TRL and Unsloth: no key is lost, and what is written is a config of ours."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from halfbyte.config import load_run
from halfbyte.config.read import check_values
from halfbyte.config.schema import Run
from halfbyte.errors import ConfigError
from halfbyte.importing import axolotl, llamafactory, trl
from halfbyte.importing.draft import Draft
from halfbyte.importing.read import as_yaml, read_foreign

FOLDER = Path(__file__).parent / "importing_configs"
TOOLS = ("axolotl", "llamafactory", "trl")
FILES = [path for tool in TOOLS for path in sorted((FOLDER / tool).glob("*.*"))]
REFUSED = re.compile(r"# refused: (\w+)\n")
KEPT = [path for path in FILES if not REFUSED.match(path.read_text("utf-8"))]
ODD: tuple[Any, ...] = (
    [1],
    {"a": 1},
    [{}],
    [None],
    "\n",
    10**320,
    -1,
    True,
    "a, b",
    "x: y\n# z",
    0.5,
    None,
)
WRONG = (FOLDER / "wrong_values.txt").read_text("utf-8").splitlines()
EXPECTED: dict[str, Any] = YAML(typ="safe").load((FOLDER / "expected.yaml").read_text("utf-8"))
NAMES = [f"{path.parent.name}/{path.name}" for path in KEPT]


def plain(path: Path) -> dict[str, Any]:
    """The values of a file, read without our own reader."""
    text = path.read_text("utf-8")
    values = json.loads(text) if path.suffix == ".json" else YAML(typ="safe").load(text)
    assert isinstance(values, dict)
    return values


def leaves(value: Any, path: str = "") -> Iterator[str]:
    """The dotted paths of all values; a list of scalars is one."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    else:
        yield path


def is_accounted(leaf: str, draft: Draft) -> bool:
    """Whether a value was taken or named itself, or stands in a part that is named or needs no twin as a whole."""
    if leaf in draft.taken or leaf in draft.left:
        return True
    above = [leaf[: match.start()] for match in re.finditer(r"[.\[]", leaf)]
    silent = ("taken", "is so already")
    return any(
        part in draft.left or draft.taken.get(part, silent[0]) not in silent for part in above
    )


def written(draft: Draft, tool: str, folder: Path) -> Run:
    """The config that our reader makes of what is written, with the rows and the model that halfbyte import adds."""
    draft.default("data.train", "rows.jsonl")
    draft.default("model.name", "org/model")
    path = folder / "ours.yaml"
    path.write_text(as_yaml(draft, tool, "theirs.yaml"), encoding="utf-8")
    return load_run(path, [], {})


def read_text(text: str, folder: Path, tool: str | None = None) -> Draft:
    path = folder / "theirs.yaml"
    path.write_text(text, encoding="utf-8")
    return read_foreign(path, tool)[1]


def test_there_are_twelve_files_of_each_tool() -> None:
    assert [sum(path.parent.name == tool for path in FILES) for tool in TOOLS] == [12, 12, 12]
    assert len(KEPT) == 30


@pytest.mark.parametrize("path", KEPT, ids=NAMES)
def test_every_leaf_is_taken_or_named(path: Path) -> None:
    tool, draft = read_foreign(path)
    assert tool == path.parent.name
    found = list(leaves(plain(path)))
    assert len(found) >= 4
    assert [leaf for leaf in found if not is_accounted(leaf, draft)] == []
    assert draft.taken.keys() & draft.left.keys() == set()
    assert all(why for _, why in draft.left.values())


@pytest.mark.parametrize("path", KEPT, ids=NAMES)
def test_what_is_written_is_a_config_of_ours(path: Path, tmp_path: Path) -> None:
    tool, draft = read_foreign(path)
    run = written(draft, tool, tmp_path)
    assert check_values(draft.values, "theirs") == []
    # What decides the result is written, as its default is not that of the other tool.
    for section, key in (
        ("model", "precision"),
        ("adapter", "r"),
        ("adapter", "alpha"),
        ("adapter", "targets"),
        ("data", "max_length"),
        ("data", "on_overlength"),
        ("train", "learning_rate"),
        ("train", "epochs"),
        ("train", "batch_size"),
        ("train", "scheduler"),
    ):
        assert key in draft.values[section], (section, key)
    assert run.seed == draft.values["seed"]


@pytest.mark.parametrize("path", KEPT, ids=NAMES)
def test_every_reason_is_in_the_comments_of_what_is_written(path: Path) -> None:
    tool, draft = read_foreign(path)
    head = [line for line in as_yaml(draft, tool, path.name).splitlines() if line.startswith("#")]
    assert len(head) == (2 + len(draft.left) if draft.left else 1)
    for key, (_, why) in draft.left.items():
        assert any(key[:40] in line and line.endswith(f"({why})") for line in head), key


@pytest.mark.parametrize("path", KEPT, ids=NAMES)
def test_an_unknown_key_is_named(path: Path, tmp_path: Path) -> None:
    values = plain(path) | {"zz_strange": {"deep": [1, 2]}}
    stream = io.StringIO()
    YAML(typ="safe").dump(values, stream)
    draft = read_text(stream.getvalue(), tmp_path, path.parent.name)
    assert draft.left["zz_strange"] == ({"deep": [1, 2]}, "has no twin")


@pytest.mark.parametrize(
    "path", [path for path in FILES if path not in KEPT], ids=lambda path: path.name
)
def test_another_kind_of_training_is_refused_by_its_key(path: Path) -> None:
    marked = REFUSED.match(path.read_text("utf-8"))
    assert marked
    with pytest.raises(ConfigError, match=rf"{path}.*: {marked[1]} is .*(LoRA|supervised)"):
        read_foreign(path)


@pytest.mark.parametrize("name", EXPECTED)
def test_values_and_reasons_are_as_expected(name: str) -> None:
    _, draft = read_foreign(FOLDER / name)
    place = str((FOLDER / name).parent)
    wanted = json.loads(json.dumps(EXPECTED[name]).replace("{folder}", place))
    assert {key: draft.get(key) for key in wanted["config"]} == wanted["config"]
    for key, words in wanted["left"].items():
        assert key in draft.left, (key, list(draft.left))
        assert words in draft.left[key][1], draft.left[key]


def test_most_files_have_expectations() -> None:
    assert len(EXPECTED.keys() & {*NAMES}) == len(EXPECTED) >= 25


def test_a_secret_is_not_shown() -> None:
    tool, draft = read_foreign(FOLDER / "trl/unsloth.yaml")
    assert draft.left["from_pretrained.token"][0] == "(a secret)"
    assert "hf_abc" not in as_yaml(draft, tool, "theirs.yaml")


def test_the_order_of_keys_changes_nothing(tmp_path: Path) -> None:
    found = 0
    for path in KEPT:
        values = plain(path)
        stream = io.StringIO()
        YAML(typ="safe").dump(dict(reversed(values.items())), stream)
        copy = tmp_path / "theirs.yaml"
        copy.write_text(stream.getvalue(), encoding="utf-8")
        if path.parent.name == "llamafactory" or "trainer" in values:
            continue  # its rows are found beside it; of two seeds the first holds
        assert read_foreign(copy, path.parent.name)[1].values == read_foreign(path)[1].values
        found += 1
    assert found >= 15


BASES = {
    "axolotl": "base_model: org/m\nadapter: lora\nlearning_rate: 1e-4\n",
    "llamafactory": "model_name_or_path: org/m\nfinetuning_type: lora\n",
    "trl": "model_name_or_path: org/m\nuse_peft: true\n",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_value_is_an_error_that_names_key_and_line(line: str, tmp_path: Path) -> None:
    tool, _, setting = line.partition(" ")
    key = setting.partition(":")[0]
    others = [text for text in BASES[tool].splitlines() if not text.startswith(f"{key}:")]
    with pytest.raises(ConfigError) as refused:
        read_text("\n".join([*others, setting]), tmp_path, tool)
    faults = refused.value.faults
    place = re.escape(f"theirs.yaml:{len(others) + 1}: {key}")
    assert any(re.search(place, fault) for fault in faults), faults
    assert max(map(len, faults)) < 600


@pytest.mark.parametrize("value", ODD, ids=str)
@pytest.mark.parametrize("tool", TOOLS)
def test_an_odd_value_of_any_key_is_taken_named_or_an_error(
    tool: str, value: Any, tmp_path: Path
) -> None:
    rules = {"axolotl": axolotl.RULES, "llamafactory": llamafactory.RULES, "trl": trl.RULES}[tool]
    assert len(rules) > 100
    try:
        draft = read_text(json.dumps(dict.fromkeys(rules, value)), tmp_path, tool)
    except ConfigError as error:
        unplaced = [fault for fault in error.faults if "theirs.yaml" not in fault]
    else:
        unplaced = [key for key in rules if not is_accounted(key, draft)]
    assert unplaced == []


def test_a_value_out_of_range_says_our_key_and_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"lora_r is 0: adapter\.r: should be greater than or equal"
    ):
        read_text(BASES["axolotl"] + "lora_r: 0\n", tmp_path)


def test_a_split_without_rows_of_the_hub_is_named(tmp_path: Path) -> None:
    draft = read_text(BASES["trl"] + "dataset_train_split: sft\n", tmp_path)
    assert "(data.train_split)" in draft.left
    assert written(draft, "trl", tmp_path).data.train_split == "train"


def test_a_number_of_thousands_of_digits_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"theirs\.yaml:3: max_steps is "):
        read_text(BASES["trl"] + f"max_steps: {'9' * 5000}\n", tmp_path)


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- a\n- b\n", "holds a list"),
        ("just words\n", "holds the value"),
        ("a: [1\n", "not valid YAML"),
        ("{\n\t'a': 1", "not valid YAML"),
        ("a: 1\na: 2\n", "is written twice"),
        ("a: &x [*x]\n", "alias"),
    ],
)
def test_a_file_without_a_mapping_is_an_error(
    tool: str, text: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_text(text, tmp_path, tool)


def test_a_file_of_bytes_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        read_foreign(path)


def test_a_file_of_no_known_tool_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is of no known tool: .*--from axolotl"):
        read_text("name: a\nsteps: {build: b}\n", tmp_path)


def test_all_wrong_values_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        read_text("base_model: org/m\nlora_r: x\nrl: dpo\nnum_epochs: []\n", tmp_path)
    text = str(refused.value)
    assert all(f"{key} is " in text for key in ("lora_r", "rl", "adapter", "learning_rate"))


@pytest.mark.parametrize("content", ["[1]", "{", '{"facts": 3}', '{"facts": {"columns": [1]}}'])
def test_a_damaged_dataset_info_is_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="dataset"):
        read_text(BASES["llamafactory"] + "dataset: facts\n", tmp_path)


def test_rankings_of_llamafactory_are_refused(tmp_path: Path) -> None:
    text = (
        BASES["llamafactory"] + "dataset: pairs\ndataset_dir: " + str(FOLDER / "llamafactory/data")
    )
    with pytest.raises(ConfigError, match="pairs has rankings"):
        read_text(text, tmp_path)


def test_all_weights_of_trl_are_refused_where_no_lora_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use_peft: true is missing"):
        read_text("model_name_or_path: org/m\nlearning_rate: 1e-4\n", tmp_path)


def test_comments_stay_comments_whatever_a_key_holds(tmp_path: Path) -> None:
    draft = read_text(BASES["trl"] + '"odd\\nseed: 1": "x\\ntrain: {}"\n', tmp_path, "trl")
    run = written(draft, "trl", tmp_path)
    assert run.seed == 42
