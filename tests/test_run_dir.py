"""Run folders and errors: whole files or old ones, numbers that are numbers, and messages that help."""

from __future__ import annotations

import errno
import math
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import (
    ConfigError,
    DataError,
    ModelError,
    RunError,
    UserError,
    exit_on_user_error,
)
from halfbyte.run_dir import (
    NO_FLUSH,
    RunDir,
    append_jsonl,
    flush_tree,
    move_aside,
    read_json,
    read_jsonl,
    replace_folder,
    write_json,
    write_jsonl,
    write_text,
)

HALF_A_CHARACTER = "\ud83d"  # cannot be written as UTF-8
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\n"), inner, max_size=3),
    max_leaves=6,
)


def test_write_text_makes_folders_and_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "file.txt"
    write_text(path, "a long first version\n")
    write_text(path, "second ü 東京\n")

    assert path.read_text(encoding="utf-8") == "second ü 東京\n"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_write_text_lets_others_read_the_file(tmp_path: Path) -> None:
    """A temporary file is its owner's alone at first."""
    write_text(tmp_path / "file.txt", "x")

    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o644


def test_write_text_leaves_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old\n")

    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new " * 100_000 + HALF_A_CHARACTER)
    assert path.read_text(encoding="utf-8") == "old\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_write_text_leaves_no_temporary_file_when_the_target_cannot_be_replaced(
    tmp_path: Path,
) -> None:
    (tmp_path / "folder").mkdir()

    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "folder", "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_write_text_never_shows_a_part_when_the_file_is_read_meanwhile(tmp_path: Path) -> None:
    """The name goes over to a new file; one that is open still reads the old one to its end."""
    path = tmp_path / "file.txt"
    write_text(path, "old\n")
    with path.open(encoding="utf-8") as stream:
        write_text(path, "new and longer\n")
        assert stream.read() == "old\n"
    assert path.read_text(encoding="utf-8") == "new and longer\n"


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("write", [write_json, lambda path, value: write_jsonl(path, [{}, value])])
def test_write_json_refuses_and_keeps_the_old_file_when_a_number_is_none(
    tmp_path: Path, write: Callable[[Path, Any], None], number: float
) -> None:
    path = tmp_path / "numbers.json"
    write(path, {"loss": 1.5})
    before = path.read_bytes()

    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        write(path, {"loss": number})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["numbers.json"]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_append_jsonl_adds_nothing_when_a_number_is_none(tmp_path: Path, number: float) -> None:
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"step": 1})

    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        append_jsonl(path, {"step": 2, "loss": number})
    assert list(read_jsonl(path)) == [{"step": 1}]


def test_write_jsonl_keeps_the_old_file_when_the_records_break_off(tmp_path: Path) -> None:
    def records() -> Iterator[dict[str, int]]:
        yield {"row": 1}
        raise RuntimeError("the source ended early")

    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"row": 0}])

    with pytest.raises(RuntimeError, match="the source ended early"):
        write_jsonl(path, records())
    assert list(read_jsonl(path)) == [{"row": 0}]


def test_write_json_is_readable_text_when_written(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"name": "東京", "list": [1]})

    text = path.read_text(encoding="utf-8")
    assert '  "name": "東京"' in text
    assert text.endswith("}\n")


@settings(max_examples=100, deadline=None)
@given(value=JSON)
def test_json_is_the_same_when_written_and_read_back(
    tmp_path_factory: pytest.TempPathFactory, value: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)

    assert read_json(path) == value


@settings(max_examples=100, deadline=None)
@given(first=st.lists(JSON, max_size=4), last=JSON)
def test_jsonl_is_the_same_when_written_appended_and_read_back(
    tmp_path_factory: pytest.TempPathFactory, first: list[Any], last: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "values.jsonl"
    write_jsonl(path, first)
    append_jsonl(path, last)

    assert list(read_jsonl(path)) == [*first, last]
    assert path.read_bytes().count(b"\n") == len(first) + 1


def test_read_jsonl_passes_over_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "values.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"a": 2}', encoding="utf-8")

    assert list(read_jsonl(path)) == [{"a": 1}, {"a": 2}]


def test_read_jsonl_leaves_out_the_last_line_when_it_broke_off(tmp_path: Path) -> None:
    """A power cut leaves half a line at the end of metrics.jsonl."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo', encoding="utf-8")

    assert list(read_jsonl(path)) == [{"step": 1}]


@pytest.mark.parametrize("after", ["\n", '\n{"step": 3}'])
def test_read_jsonl_names_a_damaged_line_when_its_end_was_written(
    tmp_path: Path, after: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo' + after, encoding="utf-8")

    with pytest.raises(RunError) as caught:
        list(read_jsonl(path))
    assert str(caught.value).startswith(f"{path}:2: damaged JSON: ")


def test_read_jsonl_is_a_run_error_when_the_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"metrics\.jsonl is missing"):
        list(read_jsonl(tmp_path / "metrics.jsonl"))


def test_read_json_names_the_file_when_it_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"

    with pytest.raises(RunError) as caught:
        read_json(path)
    assert str(caught.value) == f"{path} is missing: the run folder is not complete"


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b"", "Expecting value: line 1 column 1"),
        (b'{"finished": tr', "Expecting value: line 1 column 14"),
        (b"{}{}", "Extra data: line 1 column 3"),
        (b'"\xff"', "'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_read_json_names_file_and_place_when_damaged(
    tmp_path: Path, content: bytes, detail: str
) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content)

    with pytest.raises(RunError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: damaged JSON: {detail}")


def test_need_gives_the_path_when_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "ledger.json").write_text("{}", encoding="utf-8")
    folder = RunDir(tmp_path)

    assert folder.need(folder.ledger, "make it") == tmp_path / "ledger.json"


def test_need_names_path_and_command_when_it_is_missing(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)

    with pytest.raises(RunError) as caught:
        folder.need(folder.merged, "python train/merge.py runs/x")
    assert str(caught.value) == (
        f"{tmp_path / 'merged'} is missing. Make it first: python train/merge.py runs/x"
    )


def test_move_aside_keeps_everything_under_a_dated_name(tmp_path: Path) -> None:
    write_text(tmp_path / "run" / "adapter" / "weights", "precious")
    moved = move_aside(tmp_path / "run")

    assert not (tmp_path / "run").exists()
    assert moved.parent == tmp_path
    assert moved.name.startswith("run~20")
    assert (moved / "adapter" / "weights").read_text(encoding="utf-8") == "precious"


def test_move_aside_finds_a_free_name_when_it_was_called_this_second(tmp_path: Path) -> None:
    now = time.time()
    for second in range(5):
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now + second))
        write_text(tmp_path / f"run~{stamp}" / "weights", "older")
    write_text(tmp_path / "run" / "weights", "old")
    moved = move_aside(tmp_path / "run")

    assert (moved / "weights").read_text(encoding="utf-8") == "old"
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("what to do"), 1),
        (DataError("what to do"), 1),
        (ModelError("what to do"), 1),
        (RunError("what to do"), 1),
        (ConfigError(["what to do"]), 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_script_ends_with_message_and_code_when_the_user_can_mend_it(
    capsys: pytest.CaptureFixture[str], error: UserError, code: int
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(main)
    assert caught.value.code == code
    assert caught.value.__suppress_context__
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "error: what to do\n")


def test_script_ends_with_code_130_when_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        exit_on_user_error(main)
    assert caught.value.code == 130
    assert capsys.readouterr().err == "stopped: SIGINT\n"


def test_script_shows_a_bug_when_it_is_no_fault_of_the_user() -> None:
    def main() -> None:
        raise KeyError("our bug")

    with pytest.raises(KeyError, match="our bug"):
        exit_on_user_error(main)


def test_script_ends_in_silence_when_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    exit_on_user_error(lambda: None)

    assert capsys.readouterr() == ("", "")


def test_config_error_keeps_its_faults_apart_when_there_are_several() -> None:
    error = ConfigError(["a.yaml:1: first", "a.yaml:2: second"])

    assert error.faults == ["a.yaml:1: first", "a.yaml:2: second"]
    assert str(error) == "a.yaml:1: first\na.yaml:2: second"


@pytest.mark.parametrize("code", NO_FLUSH)
def test_a_file_system_without_a_flush_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Google Drive's, where the notebook keeps its run."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("x")

    def fail(_: int) -> None:
        raise OSError(code, "no flush")

    monkeypatch.setattr("os.fsync", fail)
    flush_tree(tmp_path)
    replace_folder(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "file").read_text() == "x"


def test_a_full_disk_is_not_taken_for_one_without_a_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="full"):
        flush_tree(tmp_path)
