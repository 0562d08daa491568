"""The cache of prepared rows: equal results, new ones where anything changed, files that are never trusted."""

from __future__ import annotations

import os
import shutil
import time
from datetime import date
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import pytest
from test_prepare import data_of, pair
from toys import chatml_tokenizer, gemma_tokenizer, source_at, store, write_rows

from halfbyte.config.dataset import Data, DataSource
from halfbyte.data import cache
from halfbyte.data.chat_template import load_template
from halfbyte.data.prepare import prepare
from halfbyte.data.prepared import Prepared
from halfbyte.data.render import Renderer
from halfbyte.data.sources import open_table
from halfbyte.errors import DataError
from halfbyte.run_dir import cache_dir

ROWS = [pair(f"diagnosis {n} of the heart", f"Heart attack {n % 3}") for n in range(40)]
ROWS += [pair("what is <|im_end|> 東京", " spaces around "), pair("Diagnosis 3 of the heart!")]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate cache for each test, in the place that the environment names."""
    monkeypatch.undo()
    monkeypatch.setattr(cache, "folder", lambda: cache_dir() / "prepared")
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return tmp_path / "cache" / "prepared"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "train.jsonl", ROWS)


def renderer() -> Renderer:
    return Renderer(chatml_tokenizer())


def held(path: Path, **values: Any) -> Data:
    return data_of(path, **{"test_frac": 0.1, "validation_frac": 0.2, "on_leak": "drop", **values})


def no_rows_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("rows were prepared anew")

    monkeypatch.setattr("halfbyte.data.prepare._prepare_anew", fail)


def test_second_start_gives_equal_rows_without_preparing_any(
    rows: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepare(held(rows), renderer())
    assert capsys.readouterr().err == ""
    [path] = folder.iterdir()
    assert path.stat().st_mode & 0o777 == 0o700
    no_rows_are_prepared(monkeypatch)
    again = prepare(held(rows), renderer())
    assert again == first
    assert capsys.readouterr().err == (
        f"prepared rows: read from {path}; data.cache=false prepares them again\n"
    )
    assert any(
        example.encoded.escaped for example in [*again.train, *again.validation, *again.test]
    )
    assert all(type(i) is int for example in again.train for i in example.encoded.ids)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_cached_rows_of_every_kind_of_file_are_equal(tmp_path: Path, suffix: str) -> None:
    path = store(tmp_path / f"train{suffix}", ROWS)
    assert prepare(held(path), renderer()) == prepare(held(path), renderer())


def test_cached_raw_text_and_truncated_rows_are_equal(tmp_path: Path, folder: Path) -> None:
    path = write_rows(tmp_path / "text.jsonl", [{"text": "lazy dog " * n} for n in range(1, 9)])
    data = data_of(path, max_length=12, on_overlength="truncate")
    first = prepare(data, renderer())
    assert first.ledger.truncated
    assert prepare(data, renderer()) == first
    assert len(list(folder.iterdir())) == 1


def test_cache_is_neither_read_nor_written_when_it_is_off(
    rows: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(held(rows), renderer())
    [path] = folder.iterdir()
    prepare(held(rows, cache=False, max_length=99), renderer())
    prepare(held(rows, cache=False), renderer())
    assert capsys.readouterr().err == ""
    assert list(folder.iterdir()) == [path]


CHANGES: dict[str, Any] = {
    "max_length": {"max_length": 99},
    "system": {"system": "Be brief."},
    "loss_on": {"loss_on": "all"},
    "validation_frac": {"validation_frac": 0.3},
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_settings_are_prepared_anew(rows: Path, folder: Path, change: str) -> None:
    prepare(held(rows), renderer())
    data = held(rows, **CHANGES[change])
    fresh = Renderer(chatml_tokenizer(), None, data.loss_on)
    prepared = prepare(data, fresh)
    assert len(list(folder.iterdir())) == 2
    assert prepared == prepare(data.model_copy(update={"cache": False}), fresh)


def test_other_rows_tokenizer_template_or_code_are_prepared_anew(
    rows: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def num_files() -> int:
        prepare(held(rows), current)
        return len(list(folder.iterdir()))

    current = renderer()
    assert num_files() == 1
    rows.write_text(rows.read_text().replace("diagnosis 7", "Diagnosis 7"))
    assert num_files() == 2
    current = Renderer(gemma_tokenizer(), load_template("gemma"))
    assert num_files() == 3
    current = Renderer(gemma_tokenizer(), load_template("plain"))
    assert num_files() == 4
    current.tokenizer.add_tokens(["heart"])
    assert num_files() == 5
    monkeypatch.setattr(cache, "_code_sha256", lambda: "other")
    assert num_files() == 6
    monkeypatch.setattr(cache, "__version__", "0.0.0")
    assert num_files() == 7
    monkeypatch.setattr(metadata, "version", lambda name: f"{name} 0")
    assert num_files() == 8
    assert num_files() == 8


def test_code_is_hashed_by_the_bytes_of_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache._code_sha256()
    real = Path(cache.__file__).parent
    assert {"render.py", "prepare.py", "rows.py", "leaks.py"} <= {p.name for p in real.iterdir()}
    monkeypatch.setattr(resources, "files", lambda _: real.parent / "config")
    assert cache._code_sha256() != before


FILES = ["meta.json", "numbers.npz", "rows.bin", "tokens.bin"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["flipped", "cut", "empty", "missing"])
def test_damaged_file_is_reported_and_replaced(
    rows: Path, folder: Path, capsys: pytest.CaptureFixture[str], harm: str, name: str
) -> None:
    prepare(held(rows), renderer())
    first = prepare(held(rows, cache=False), renderer())  # holds none of the files
    [path] = folder.iterdir()
    assert sorted(file.name for file in path.iterdir()) == FILES
    file = path / name
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(
        {
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "cut": whole[:middle],
        }.get(harm, b"")
    )
    if harm == "missing":
        file.unlink()
    assert prepare(held(rows), renderer()) == first
    assert capsys.readouterr().err == (f"warning: {path} is damaged: its rows are prepared again\n")
    assert sorted(file.name for file in path.iterdir()) == FILES
    assert (path / "tokens.bin").stat().st_size == 4 * sum(
        tokens.total for tokens in first.ledger.tokens.values()
    )


def test_rows_outlive_the_cache_that_they_are_read_from(rows: Path, folder: Path) -> None:
    first, second = (prepare(held(rows), renderer()) for _ in range(2))
    shutil.rmtree(folder)
    assert list(first.train) == list(second.train)
    assert len(second.train[0].encoded.ids) > 5


def test_rows_are_read_back_where_the_system_has_no_pread(
    rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(held(rows), renderer())
    examples = list(first.train)
    monkeypatch.delattr(os, "pread")
    assert list(first.train)[::-1] == examples[::-1]
    assert prepare(held(rows), renderer()) == first


def test_folder_of_a_killed_process_is_deleted_after_days(rows: Path, folder: Path) -> None:
    for name, age in ((".old", 3), (".new", 0)):
        (folder / name).mkdir(parents=True)
        os.utime(folder / name, (time.time() - age * 86_400,) * 2)
    prepare(held(rows), renderer())
    assert sorted(path.name[:4] for path in folder.iterdir() if path.suffix != ".rows") == [".new"]


def test_oldest_files_make_room(rows: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [100, 101, 102, 103]
    for number, length in enumerate(lengths[:3]):
        prepare(held(rows, max_length=length), renderer())
        [newest] = [path for path in folder.iterdir() if path.stat().st_mtime > 1000]
        os.utime(newest, (number, number))
    size = max(cache._size(path) for path in folder.iterdir())
    oldest, second, third = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
    prepare(held(rows, max_length=100), renderer())  # used again: the oldest is the youngest now
    monkeypatch.setattr(cache, "MAX_BYTES", 3 * size)
    prepare(held(rows, max_length=103), renderer())
    left = set(folder.iterdir())
    assert len(left) == 3
    assert {oldest, third} <= left
    assert second not in left


def test_result_larger_than_the_cache_is_reported_and_not_kept(
    rows: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(held(rows), renderer())
    monkeypatch.setattr(cache, "MAX_BYTES", 100)
    prepare(held(rows, max_length=99), renderer())
    assert (
        "prepared rows are not cached: 0.0 GB is more than the cache may hold"
        in capsys.readouterr().err
    )
    assert len(list(folder.iterdir())) == 1


def test_cache_that_cannot_be_written_is_reported_and_stops_nothing(
    rows: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.parent.mkdir()
    folder.write_text("a file where the folder would be")
    assert prepare(held(rows), renderer()).train
    warning = capsys.readouterr().err
    assert f"warning: prepared rows cannot be cached in {folder} (" in warning
    assert "Set HALFBYTE_CACHE to another folder, or data.cache=false" in warning


def test_rows_that_change_while_they_are_prepared_are_not_kept(
    rows: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfbyte.data import prepare as module

    real = module._prepare_anew

    def slow(*arguments: Any) -> Prepared:
        prepared = real(*arguments)
        write_rows(rows, ROWS[:10])
        return prepared

    monkeypatch.setattr(module, "_prepare_anew", slow)
    assert len(module.prepare(held(rows), renderer()).full_lengths) > 10
    assert not list(folder.iterdir())


def test_faults_are_never_cached(tmp_path: Path, folder: Path) -> None:
    path = write_rows(tmp_path / "bad.jsonl", [pair("a \U000f0000")])
    for _ in range(2):
        with pytest.raises(DataError, match="private-use"):
            prepare(data_of(path), renderer())
    assert not list(folder.glob("*"))


def test_only_one_process_of_a_machine_writes_and_speaks(
    rows: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    first = prepare(held(rows), renderer())
    assert not list(folder.glob("*"))
    monkeypatch.setenv("LOCAL_RANK", "0")
    prepare(held(rows), renderer())
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert prepare(held(rows), renderer()) == first
    assert capsys.readouterr().err == ""


DATED = load_template("chatml").replace("{%- if add", "{%- set today = CLOCK -%}{%- if add")


def test_template_that_writes_the_date_is_cached_for_the_day(
    rows: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = DATED.replace("CLOCK", "strftime_now('%d %b %Y')")
    prepare(held(rows), Renderer(chatml_tokenizer(), clock, day=date(2026, 1, 2)))
    no_rows_are_prepared(monkeypatch)
    prepare(held(rows), Renderer(chatml_tokenizer(), clock, day=date(2026, 1, 2)))
    with pytest.raises(AssertionError, match="anew"):
        prepare(held(rows), Renderer(chatml_tokenizer(), clock, day=date(2026, 1, 3)))


def test_rows_of_the_hub_are_cached_by_their_fingerprint(
    rows: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfbyte.data import prepare as module

    reads = []

    def from_hub(source: DataSource) -> Any:
        reads.append(source.path)
        return open_table(source_at(rows))

    monkeypatch.setattr(module, "open_table", from_hub)
    data = held(Path("org/rows"))
    first = prepare(data, renderer())
    read_at_first = len(reads)
    no_rows_are_prepared(monkeypatch)
    assert prepare(data, renderer()) == first
    assert reads == ["org/rows"] * (read_at_first + 1)


def test_a_full_disk_of_the_cache_stops_nothing(
    rows: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from halfbyte.data import row_file

    def write_to(full: Any) -> None:
        real = row_file.Blob.flush

        def flush(blob: row_file.Blob) -> None:
            if full(blob._path):
                raise OSError(28, "No space left on device", str(blob._path))
            real(blob)

        monkeypatch.setattr(row_file.Blob, "flush", flush)

    write_to(lambda path: folder in path.parents)
    assert len(prepare(held(rows), renderer()).train)
    assert "No space left on device" in capsys.readouterr().err
    write_to(lambda path: True)
    with pytest.raises(DataError, match="No space left on device"):
        prepare(held(rows), renderer())


def test_another_process_that_is_first_is_no_fault(
    rows: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from halfbyte.data import cache

    prepare(held(rows), renderer())
    monkeypatch.setattr(cache, "read", lambda key: None)
    again = prepare(held(rows), renderer())
    assert len(again.train)
    assert "warning" not in capsys.readouterr().err


def test_a_file_that_cannot_be_opened_is_named(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def refuse(path: Path, *args: Any, **options: Any) -> Any:
        if path == rows:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match="Permission denied"):
        prepare(held(rows), renderer())
