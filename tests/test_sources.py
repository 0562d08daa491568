"""Sources: every kind of file gives the same rows with their places, and a bad one is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from toys import store, write_rows

from halfbyte.data.sources import RawRow, Table, read_table
from halfbyte.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"prompt": "acute, chronic", "completion": 'a "heart"'},
    {"prompt": "üöä 東京 😀\u2028two", "completion": "007"},
]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def error_of(path: Path | str) -> str:
    with pytest.raises(DataError) as caught:
        read_table(str(path))
    return str(caught.value)


# --- what a file gives ---


@pytest.mark.parametrize(
    ("suffix", "places"),
    [
        (".jsonl", [":1", ":2"]),
        (".json", [" row 1", " row 2"]),
        (".csv", [" row 1", " row 2"]),
        (".parquet", [" row 1", " row 2"]),
    ],
)
def test_read_table_gives_rows_with_places_from_every_file_kind(
    tmp_path: Path, suffix: str, places: list[str]
) -> None:
    path = store(tmp_path / f"rows{suffix}", ROWS)
    table = read_table(str(path))
    assert table.name == str(path)
    assert [row.values for row in table.rows] == ROWS
    assert [row.place for row in table.rows] == [f"{path}{place}" for place in places]


def test_read_table_reads_a_folder_in_order_of_names_and_leaves_other_files(tmp_path: Path) -> None:
    store(tmp_path / "b.csv", [{"text": "second"}])
    store(tmp_path / "a.jsonl", [{"text": "first"}])
    store(tmp_path / "c.parquet", [{"text": "third"}])
    written(tmp_path / "README.md", "no rows here")
    table = read_table(str(tmp_path))
    assert [(row.place, row.values["text"]) for row in table.rows] == [
        (f"{tmp_path}/a.jsonl:1", "first"),
        (f"{tmp_path}/b.csv row 1", "second"),
        (f"{tmp_path}/c.parquet row 1", "third"),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", '{"text": "a"}\n'),
        ("rows.json", '[{"text": "a"}]'),
        ("rows.csv", "text\na\n"),
    ],
)
def test_read_table_skips_a_byte_order_mark(tmp_path: Path, name: str, content: str) -> None:
    table = read_table(str(written(tmp_path / name, b"\xef\xbb\xbf" + content.encode())))
    assert [row.values for row in table.rows] == [{"text": "a"}]


def test_read_table_counts_blank_lines_in_places_but_not_as_rows(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", '\n{"text": "a"}\n  \t\n\r\n{"text": "b"}')
    assert read_table(str(path)).rows == [
        RawRow(f"{path}:2", {"text": "a"}),
        RawRow(f"{path}:5", {"text": "b"}),
    ]


def test_read_table_reads_windows_line_ends(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", '{"text": "a"}\r\n{"text": "b"}\r\n')
    assert [row.values["text"] for row in read_table(str(path)).rows] == ["a", "b"]


def test_read_table_keeps_csv_text_as_text(tmp_path: Path) -> None:
    cells = ["007", "NA", "NaN", "null", "1e5", "True", "2024-01-01", " padded ", "1.0"]
    path = written(tmp_path / "rows.csv", "text,n\n" + "".join(f"{c},1\n" for c in cells))
    rows = read_table(str(path)).rows
    assert [row.values for row in rows] == [{"text": cell, "n": "1"} for cell in cells]


def test_read_table_keeps_line_breaks_and_empty_cells_of_a_csv(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.csv", 'prompt,completion\n"a\nb",\n"",c\n')
    assert [row.values for row in read_table(str(path)).rows] == [
        {"prompt": "a\nb", "completion": ""},
        {"prompt": "", "completion": "c"},
    ]


def test_read_table_keeps_nested_values_of_parquet(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}], "n": 3, "none": None}]
    assert read_table(str(store(tmp_path / "rows.parquet", rows))).rows[0].values == rows[0]


def test_columns_are_listed_once_in_order_of_first_appearance() -> None:
    table = Table("t", [RawRow("t:1", {"b": 1, "a": 2}), RawRow("t:2", {"c": 3, "a": 4})], "")
    assert table.columns == ["b", "a", "c"]


def test_fingerprint_depends_on_rows_and_not_on_the_file_kind(tmp_path: Path) -> None:
    kinds = [".jsonl", ".json", ".csv", ".parquet"]
    prints = {read_table(str(store(tmp_path / f"a{kind}", ROWS))).fingerprint for kind in kinds}
    assert len(prints) == 1
    turned = [{"completion": row["completion"], "prompt": row["prompt"]} for row in ROWS]
    prints.add(read_table(str(store(tmp_path / "b.jsonl", turned))).fingerprint)
    assert len(prints) == 1
    changed = [ROWS[0], {**ROWS[1], "completion": "008"}]
    prints.add(read_table(str(store(tmp_path / "c.jsonl", changed))).fingerprint)
    assert len(prints) == 2
    prints.add(read_table(str(store(tmp_path / "d.jsonl", ROWS[:1]))).fingerprint)
    assert len(prints) == 3


# --- what is refused ---


def test_read_table_names_the_line_of_broken_json(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", '{"text": "a"}\n\n{"text": }\n')
    assert error_of(path) == f"{path}:3: not valid JSON: Expecting value: line 1 column 10 (char 9)"


def test_read_table_names_a_file_of_broken_json(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.json", '[{"text": "a"},\n{"text" "b"}]')
    assert error_of(path) == (
        f"{path}: not valid JSON: Expecting ':' delimiter: line 2 column 9 (char 24)"
    )


@pytest.mark.parametrize(("name", "place"), [("rows.jsonl", ":1"), ("rows.json", "")])
def test_read_table_names_json_that_is_nested_too_deep(
    tmp_path: Path, name: str, place: str
) -> None:
    path = written(tmp_path / name, "[" * 100_000)
    assert error_of(path).startswith(f"{path}{place}: not valid JSON: ")


@pytest.mark.parametrize(
    ("name", "content", "place", "actual"),
    [
        ("rows.jsonl", '{"text": "a"}\n["b"]\n', ":2", "['b']"),
        ("rows.jsonl", "null\n", ":1", "None"),
        ("rows.json", '[{"text": "a"}, 7]', " row 2", "7"),
    ],
)
def test_read_table_names_a_row_that_is_no_object(
    tmp_path: Path, name: str, content: str, place: str, actual: str
) -> None:
    path = written(tmp_path / name, content)
    assert error_of(path) == f"{path}{place}: holds {actual}; a row is an object with columns"


def test_read_table_refuses_a_json_file_that_is_no_list(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.json", '{"text": "a"}')
    assert error_of(path) == f"{path}: holds dict; a list of rows is expected"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_read_table_refuses_text_that_is_not_utf8(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, b'{"text": "\xff"}')
    assert error_of(path) == (
        f"{path}: not UTF-8 text: 'utf-8' codec can't decode byte 0xff in position 10: invalid start byte"
    )


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("rows.csv", "", "No columns to parse from file"),
        ("rows.csv", b"text\n\xff\n", "'utf-8' codec can't decode byte 0xff"),
        ("rows.csv", "prompt,completion\na,b\nc, d,e\n", "Error tokenizing data."),
        ("rows.parquet", "no parquet", "Could not open Parquet input source"),
    ],
)
def test_read_table_names_a_table_file_that_cannot_be_read(
    tmp_path: Path, name: str, content: str | bytes, cause: str
) -> None:
    path = written(tmp_path / name, content)
    assert error_of(path).startswith(f"{path}: cannot be read: {cause}")


def test_read_table_refuses_a_csv_whose_rows_all_have_a_cell_too_many(tmp_path: Path) -> None:
    """As an unquoted comma gives; silently read as prompt ' world', completion 'Yes'."""
    path = written(tmp_path / "rows.csv", "prompt,completion\nHello, world,Yes\n")
    assert error_of(path).startswith(f"{path}: cannot be read: ")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", ""),
        ("rows.jsonl", "\n  \n"),
        ("rows.jsonl", b"\xef\xbb\xbf"),
        ("rows.json", "[]"),
        ("rows.csv", "prompt,completion\n"),
    ],
)
def test_read_table_refuses_a_source_without_rows(
    tmp_path: Path, name: str, content: str | bytes
) -> None:
    path = written(tmp_path / name, content)
    assert error_of(path) == f"{path}: holds no rows"


@pytest.mark.parametrize(
    ("name", "actual"),
    [("rows.txt", ".txt"), ("rows", "a file without suffix"), ("rows.JSONL", ".JSONL")],
)
def test_read_table_names_a_suffix_it_cannot_read(tmp_path: Path, name: str, actual: str) -> None:
    path = written(tmp_path / name, '{"text": "a"}')
    assert error_of(path) == f"{path}: cannot read {actual}; allowed: .jsonl, .json, .csv, .parquet"


def test_read_table_refuses_a_folder_without_tables(tmp_path: Path) -> None:
    written(tmp_path / "rows.txt", "a")
    assert error_of(tmp_path) == (
        f"{tmp_path}: the folder holds no .jsonl, .json, .csv, .parquet file"
    )


# --- what is missing ---


@pytest.mark.parametrize("folder_exists", [True, False])
def test_read_table_says_how_to_build_a_missing_file_when_its_script_is_there(
    tmp_path: Path, folder_exists: bool
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    written(data / "x.py", "")
    if folder_exists:
        (data / "x").mkdir()
        written(data / "x" / "test.jsonl", '{"text": "a"}\n')
    path = data / "x" / "train.jsonl"
    assert error_of(path) == f"{path}: no such file or folder. Build it: python {data / 'x.py'}"


def test_read_table_names_what_the_folder_holds_instead_of_a_missing_file(tmp_path: Path) -> None:
    for name in ("trian.jsonl", "test.csv", "notes.txt"):
        written(tmp_path / name, "")
    path = tmp_path / "train.jsonl"
    assert error_of(path) == (
        f"{path}: no such file or folder; {tmp_path} holds test.csv, trian.jsonl"
    )


@pytest.mark.parametrize("name", ["train.jsonl", "none/train.jsonl"])
def test_read_table_names_a_missing_file(tmp_path: Path, name: str) -> None:
    assert error_of(tmp_path / name) == f"{tmp_path / name}: no such file or folder"


def test_read_table_refuses_a_hub_name_that_the_working_folder_has_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a name means is decided beside the config; load_dataset would take the folder."""
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows" / "train.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    assert error_of("rows") == (
        "rows: was read as a Hub id, but the working folder also holds something of that name."
        " Run from another folder, or write the full path if you mean the local one"
    )
    assert len(read_table(str(tmp_path / "rows")).rows) == 2


def test_read_table_names_a_hub_dataset_that_cannot_be_had() -> None:
    text = error_of("nobody/no-such-data")
    assert text.startswith("nobody/no-such-data: cannot be loaded from the Hub: ")
    assert text.endswith(
        ". If it is a file, write its path with a leading ./ or with its suffix; if it is gated, run"
        " `hf auth login` first"
    )
