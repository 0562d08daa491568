"""Sources: every kind of file gives the same rows with their places, and a bad one is named."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import parse_rows, read_table, source_at, store, table_of, write_rows

from halfbyte.config.paths import DATA_SUFFIXES
from halfbyte.data.files import ALLOWED
from halfbyte.data.raw import RawRow
from halfbyte.data.sources import open_table
from halfbyte.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"prompt": "acute, chronic", "completion": 'a "heart"'},
    {"prompt": "üöä 東京 😀\u2028two", "completion": "007"},
]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def error_of(path: Path | str) -> str:
    """The error about a source, or about its first row that cannot be read."""
    try:
        table = read_table(str(path))
    except DataError as error:
        return str(error)
    assert table.malformed
    return str(table.malformed[0])


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
    table = table_of({"b": 1, "a": 2}, {"c": 3, "a": 4})
    assert len(list(table)) == 2
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


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def as_zst(text: str) -> bytes:
    import pyarrow

    return bytes(pyarrow.Codec("zstd").compress(text.encode(), asbytes=True))


def as_arrow(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow

    table, sink = pyarrow.Table.from_pylist(rows), pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("rows.ndjson", lambda: LINES),
        ("ROWS.JSONL", lambda: LINES),
        ("rows.json", lambda: LINES),
        ("rows.jsonl", lambda: json.dumps(ROWS)),
        ("rows.jsonl", lambda: json.dumps(ROWS, indent=1)),
        ("rows.jsonl", lambda: "".join(json.dumps(row, indent=1) + "\n" for row in ROWS)),
        ("rows.jsonl", lambda: LINES.replace("}\n", "},\n")),
        ("rows.jsonl.gz", lambda: gzip.compress(LINES.encode())),
        ("rows.json.xz", lambda: lzma.compress(LINES.encode())),
        ("rows.jsonl.ZST", lambda: as_zst(LINES)),
        (
            "rows.csv",
            lambda: 'prompt;completion\n"acute, chronic";"a ""heart"""\nüöä 東京 😀\u2028two;007\n',
        ),
        (
            "rows.tsv",
            lambda: (
                'prompt\tcompletion\nacute, chronic\t"a ""heart"""\nüöä 東京 😀\u2028two\t007\n'
            ),
        ),
        (
            "rows.csv",
            lambda: (
                'prompt, completion\n"acute, chronic", "a ""heart"""\nüöä 東京 😀\u2028two, 007\n'
            ),
        ),
        ("rows.arrow", lambda: as_arrow(ROWS)),
        ("rows.arrow.gz", lambda: gzip.compress(as_arrow(ROWS))),
    ],
)
def test_files_as_people_have_them_give_the_same_rows(
    tmp_path: Path, name: str, make: Callable[[], str | bytes]
) -> None:
    path = written(tmp_path / name, make())
    assert [row.values for row in read_table(str(path)).rows] == ROWS


def test_a_row_with_a_cell_too_few_has_no_value_there(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.csv", "prompt,completion\na,b\nc\n\n")
    assert [row.values for row in read_table(str(path)).rows] == [
        {"prompt": "a", "completion": "b"},
        {"prompt": "c", "completion": None},
    ]


def test_nulls_that_arrow_puts_into_other_rows_go(tmp_path: Path) -> None:
    """The arguments of one tool become null keys in the calls of every other."""
    rows: list[dict[str, Any]] = [
        {"calls": [{"name": "tide", "arguments": {"port": "Brest"}}], "note": None},
        {"calls": [{"name": "sum", "arguments": {"a": 1, "b": 2}}], "note": "x"},
    ]
    path = store(tmp_path / "rows.parquet", rows)
    assert [row.values for row in read_table(str(path)).rows] == rows


def test_saved_datasets_are_read_by_split(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    whole = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1]))
    whole.save_to_disk(str(tmp_path / "saved"))
    saved = tmp_path / "saved"
    assert [row.values for row in read_table(str(saved)).rows] == ROWS
    assert [row.values for row in read_table(str(saved), split="test").rows] == ROWS[:1]
    assert [row.values for row in read_table(str(saved / "train")).rows] == ROWS
    with pytest.raises(DataError, match="has no split 'dev'; found: test, train"):
        read_table(str(saved), split="dev")


def test_splits_of_a_folder_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("train-00.jsonl", "a"), ("train-01.jsonl", "b"), ("test.jsonl", "c")):
        write_rows(tmp_path / name, [{"text": text}])
    written(tmp_path / "dataset_infos.json", "{}")
    written(tmp_path / ".hidden.jsonl", "{}")
    texts = [row.values["text"] for row in read_table(str(tmp_path)).rows]
    assert texts == ["a", "b"]
    assert (
        "read train-00.jsonl, train-01.jsonl as train, and not test.jsonl"
        in capsys.readouterr().err
    )
    assert [row.values for row in read_table(str(tmp_path), split="test").rows] == [{"text": "c"}]
    with pytest.raises(
        DataError, match=r"no file of the split 'validation'; found: test\.jsonl, train"
    ):
        read_table(str(tmp_path), split="validation")


def test_a_test_file_beside_an_unnamed_one_is_not_trained_on(tmp_path: Path) -> None:
    for name in ("data.jsonl", "test.jsonl"):
        write_rows(tmp_path / name, [{"text": name}])
    assert [row.values for row in read_table(str(tmp_path)).rows] == [{"text": "data.jsonl"}]


@pytest.mark.parametrize(
    "content",
    ['{\n "messages": [{"role": "user", "content": "q"}]\n}', '{"text": "a", "notes": [{"n": 1}]}'],
)
def test_a_file_may_hold_one_row(tmp_path: Path, content: str) -> None:
    path = written(tmp_path / "row.json", content)
    assert [row.values for row in read_table(str(path)).rows] == [json.loads(content)]


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.csv", "prompt,prompt,completion\na,b,c\n")
    assert error_of(path) == f"{path}: has several columns named 'prompt'; rename all but one"


def test_patterns_reach_nested_folders(tmp_path: Path) -> None:
    for name in ("a/one.jsonl", "a/b/two.jsonl.gz", "three.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    write_rows(tmp_path / "a/one.jsonl", [{"text": "1"}])
    written(tmp_path / "a/b/two.jsonl.gz", gzip.compress(b'{"text": "2"}\n'))
    table = read_table(f"{tmp_path}/**/*.jsonl*")
    assert sorted(row.values["text"] for row in table.rows) == ["1", "2"]
    assert f"for {tmp_path}/a/b/two.jsonl.gz write {tmp_path}/**/*.gz" in error_of(tmp_path)
    with pytest.raises(DataError, match="no data file fits the pattern"):
        read_table(f"{tmp_path}/*.csv")


def test_errors_about_huge_rows_are_short(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", '{"text": "a"}\n' + '"' + "x" * 3_000_000 + '"\n')
    assert len(error_of(path)) < 300 + len(str(path))


# --- what is refused ---


def test_read_table_names_the_line_of_broken_json(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", '{"text": "a"}\n\n{"text": }\n')
    assert error_of(path) == f"{path}:3: not valid JSON: Expecting value: line 1 column 10 (char 9)"


def test_read_table_names_a_file_of_broken_json(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.json", '[{"text": "a"},\n{"text" "b"}]')
    assert error_of(path) == (f"{path}: not valid JSON behind row 1: Expecting ':' delimiter")


@pytest.mark.parametrize(("name", "place"), [("rows.jsonl", ":1"), ("rows.json", ":1")])
def test_read_table_names_json_that_is_nested_too_deep(
    tmp_path: Path, name: str, place: str
) -> None:
    path = written(tmp_path / name, '{"a": ' + "[" * 100_000)
    assert error_of(path).startswith(f"{path}{place}: not valid JSON: ")


@pytest.mark.parametrize(
    ("name", "content", "place", "actual"),
    [
        ("rows.jsonl", '{"text": "a"}\n["b"]\n', ":2", 'list ["b"]'),
        ("rows.jsonl", "null\n", ":1", "null"),
        ("rows.json", '[{"text": "a"}, 7]', " row 2", "int 7"),
    ],
)
def test_read_table_names_a_row_that_is_no_object(
    tmp_path: Path, name: str, content: str, place: str, actual: str
) -> None:
    path = written(tmp_path / name, content)
    assert error_of(path) == f"{path}{place}: holds {actual}; a row is an object with columns"


def test_read_table_names_the_key_that_holds_the_rows(tmp_path: Path) -> None:
    content = '{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}'
    path = written(tmp_path / "rows.json", content)
    assert error_of(path) == (
        f"{path}: holds one object; rows are expected, one a line or in a list; set data.field=data,"
        " which holds a list of them"
    )
    table = read_table(str(path), field="data")
    assert [row.values for row in table.rows] == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(
        DataError, match=r"has no key 'rows', which data\.field names; found: version"
    ):
        read_table(str(path), field="rows")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_read_table_refuses_text_that_is_not_utf8(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, b'{"text": "\xff"}')
    assert error_of(path) == (
        f"{path}: not utf-8 text: invalid start byte at byte 10. Set data.encoding=cp1252 if it was"
        " written so, or save it as UTF-8"
    )


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_read_table_names_the_encoding_to_set(tmp_path: Path, encoding: str) -> None:
    text = "prompt,completion\nOù est Lyon ?,Sur le Rhône\n"
    path = written(tmp_path / "rows.csv", text.encode(encoding))
    assert f"Set data.encoding={encoding} if it was written so" in error_of(path)
    (row,) = read_table(str(path), encoding=encoding).rows
    assert row.values == {"prompt": "Où est Lyon ?", "completion": "Sur le Rhône"}
    with pytest.raises(DataError, match=r"data\.encoding: 'latin-99' is unknown"):
        read_table(str(path), encoding="latin-99")


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("rows.csv", "prompt,completion\na,b\nc, d,e\n", "row 2 has more cells than the header"),
        ("rows.jsonl.gz", "no gzip", "Not a gzipped file"),
        ("rows.jsonl.xz", "no xz", "Input format not supported"),
        ("rows.jsonl.zst", "no zstd", "ZSTD"),
        ("rows.arrow", "no arrow", ""),
        ("rows.parquet", "no parquet", "Parquet magic bytes not found"),
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
        ("rows.csv", ""),
    ],
)
def test_read_table_refuses_a_source_without_rows(
    tmp_path: Path, name: str, content: str | bytes
) -> None:
    path = written(tmp_path / name, content)
    assert error_of(path) == f"{path}: holds no rows"


@pytest.mark.parametrize(
    ("name", "actual"),
    [("rows.txt", ".txt"), ("rows", "a file without suffix"), ("rows.xlsx", ".xlsx")],
)
def test_read_table_names_a_suffix_it_cannot_read(tmp_path: Path, name: str, actual: str) -> None:
    path = written(tmp_path / name, '{"text": "a"}')
    assert error_of(path) == f"{path}: cannot read {actual}; allowed: {ALLOWED}"


def test_read_table_refuses_a_folder_without_tables(tmp_path: Path) -> None:
    written(tmp_path / "rows.txt", "a")
    assert error_of(tmp_path) == (
        f"{tmp_path}: the folder holds no {', '.join(DATA_SUFFIXES)} file"
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


# --- files that are read in pieces ---

OBJECTS = st.dictionaries(
    st.text(max_size=6), st.recursive(st.text() | st.integers(), st.lists, max_leaves=4), max_size=3
)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(OBJECTS.filter(bool), min_size=2, max_size=5),
    layout=st.sampled_from(["lines", "array", "spread", "commas", "behind"]),
    indent=st.integers(0, 3),
    size=st.integers(1, 40),
    ascii_only=st.booleans(),
)
def test_any_layout_of_json_gives_its_rows_whatever_is_read_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[dict[str, Any]],
    layout: str,
    indent: int,
    size: int,
    ascii_only: bool,
) -> None:
    monkeypatch.setattr("halfbyte.data.files.CHUNK_BYTES", size)
    texts = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    spread = [json.dumps(row, ensure_ascii=ascii_only, indent=indent) for row in rows]
    text = {
        "lines": "\n\n".join(texts),
        "array": f" \n[{' , '.join(spread)} ]\n",
        "spread": "\r\n".join(spread),
        "commas": ",\n".join(spread) + ",\n",
        "behind": " ".join(texts),
    }[layout]
    path = written(tmp_path / "rows.json", text.encode("utf-8", "surrogatepass"))
    if any(0xD800 <= ord(char) < 0xE000 for char in text):
        assert "not utf-8 text" in error_of(path)
        return
    assert [row.values for row in read_table(path).rows] == rows


def test_line_that_is_no_json_costs_no_other_line(tmp_path: Path) -> None:
    lines = ['{"a": 1}', '{"a": ', '{"a": 2}', '{"a": "x', '{"a":', "3}", '{"a": 4}', "{", "}"]
    table = read_table(written(tmp_path / "rows.jsonl", "\n".join(lines)))
    assert [row.values for row in table.rows] == [{"a": 1}, {"a": 2}, {"a": 3}, {"a": 4}, {}]
    assert [error.place.rpartition(":")[2] for error in table.malformed] == ["2", "4"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('[{"a": 1} {"a": 2}]', "behind row 1: '{' where one of ',]' is expected"),
        ('[{"a": 1}, ]', "behind row 1: Expecting value"),
        ('[{"a": 1}', "behind row 1: '' where one of ',]' is expected"),
        ('[{"a": 1}, {"a"', "behind row 1: Expecting ':' delimiter"),
        ('[{"a": 1}] {"a": 2}', "behind row 1: more text behind the list"),
    ],
)
def test_fault_of_a_list_names_the_last_row_before_it(
    tmp_path: Path, text: str, fault: str
) -> None:
    assert error_of(written(tmp_path / "rows.json", text)).endswith(f"not valid JSON {fault}")


def test_bad_byte_is_named_by_its_place_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b'{"a": "' + "é".encode() * 50 + b'"}\n{"a": "\xff"}\n'
    for size in (1, 7, 1 << 20):
        monkeypatch.setattr("halfbyte.data.files.CHUNK_BYTES", size)
        found = error_of(written(tmp_path / "rows.jsonl", content))
        assert f"invalid start byte at byte {content.index(0xFF)}." in found


def test_columns_that_only_later_rows_have_decide_the_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfbyte.data.rows.HEAD_ROWS", 2)
    rows: list[dict[str, Any]] = [{"id": 1}, {"id": 2}, {"prompt": "a", "completion": "b"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found, parsed = parse_rows(open_table(source_at(path)))
    assert parsed.format == "prompt_completion"
    assert (len(found.rows), len(found.malformed)) == (1, 2)
    write_rows(path, [{"prompt": "a", "completion": "b"}] * 3 + [{"text": "t"}])
    with pytest.raises(DataError, match="fit several formats: prompt_completion, text"):
        parse_rows(open_table(source_at(path)))


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("r.jsonl", '{"prompt": "a", "prompt": "b", "completion": "x"}\n', "'prompt' stands twice"),
        ("r.json", '[{"prompt": "a", "x": {"y": 1, "y": 2}}]', "'y' stands twice"),
        ("r.jsonl", '{"prompt": "a",\n"prompt": "b"}\n', "'prompt' stands twice"),
        ("r.csv", 'prompt,completion\na,"b" c\n', "behind line"),
        ("r.csv", 'prompt,completion\na,"b\n', "behind line"),
        ("r.csv", "prompt,completion\ra,b\r", "lines end with a line feed"),
    ],
)
def test_what_would_vanish_or_cannot_be_read_says_where(
    tmp_path: Path, name: str, content: str, text: str
) -> None:
    assert text in error_of(written(tmp_path / name, content))


def test_an_arrow_table_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([["q"], ["a"], ["b"]], names=["prompt", "completion", "completion"])
    pyarrow.parquet.write_table(table, tmp_path / "r.parquet")
    assert "several columns named 'completion'" in error_of(tmp_path / "r.parquet")


def test_a_blank_row_of_a_csv_is_a_row(tmp_path: Path) -> None:
    path = written(tmp_path / "r.csv", "prompt,completion\na,b\n,\n\nc,d\n")
    assert len(read_table(str(path)).rows) == 3


def test_many_objects_over_many_lines_take_time_in_proportion(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "completion": "a"} for n in range(3000)]
    text = "\n".join(json.dumps(row, indent=1) for row in rows)
    table = read_table(str(written(tmp_path / "r.jsonl", text)))
    assert [row.values for row in table.rows] == rows


@pytest.mark.parametrize("encoding", ["hex", "rot13", "nonsense"])
def test_an_encoding_that_is_none_of_text_is_unknown(tmp_path: Path, encoding: str) -> None:
    path = written(tmp_path / "r.csv", "prompt,completion\na,b\n")
    with pytest.raises(DataError, match="is unknown"):
        read_table(str(path), encoding=encoding)


def test_a_pattern_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pattern"):
        read_table(f"{tmp_path}/**x.jsonl")


def test_files_of_a_folder_that_are_passed_over_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.jsonl", "_c.jsonl", "d.jsonl.bz2", "sub/b.jsonl", "README.md"):
        written(tmp_path / name, '{"prompt": "a", "completion": "b"}\n')
    assert len(read_table(str(tmp_path)).rows) == 1
    assert "passed over _c.jsonl, d.jsonl.bz2, sub" in capsys.readouterr().err
