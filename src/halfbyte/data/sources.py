"""Owns the sources of rows: files, folders and the Hub, each row with its place."""

from __future__ import annotations

import contextlib
import csv
import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from halfbyte.config.dataset import DataSource
from halfbyte.config.paths import PACKED_SUFFIXES, bare_suffix
from halfbyte.data.files import data_files, lines_of, open_bytes, text_of
from halfbyte.data.json_rows import Rows, read_json
from halfbyte.data.raw import RawRow, Table
from halfbyte.errors import DataError

DELIMITERS = (",", ";", "\t", "|")
MAX_CELL_CHARS = 2**31 - 1
MAX_HEADER_LINES = 64  # a quoted column name may hold line breaks
BATCH_ROWS = 1024  # rows that are read at once of columnar files


def open_table(source: DataSource) -> Table:
    """Return the rows of a source of local files or of the Hub; nothing is read before they are iterated."""
    return Table(source.path, lambda: _read(source))


def _read(source: DataSource) -> Rows:
    path = Path(source.path)
    if not path.is_absolute():
        yield from _read_hub(source)
    elif saved := _saved_dataset(path, source.split or "train"):
        yield from _read_saved(saved)
    else:
        for file in data_files(source.path, source.split or "train"):
            yield from _read_file(file, source.field, source.encoding or "utf-8")


def files_sha256(source: str, split: str) -> str | None:
    """Return the sha256 of the names and bytes of a local source's files; None for a Hub dataset.

    Raises:
        DataError: the source does not exist.
    """
    if not Path(source).is_absolute():
        return None
    saved = _saved_dataset(Path(source), split)
    digest = hashlib.sha256()
    for file in sorted(saved.glob("*.arrow")) if saved else data_files(source, split):
        with file.open("rb") as stream:
            file_sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file}\n{file_sha256}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _saved_dataset(path: Path, split: str) -> Path | None:
    """Return the folder of a dataset that ``save_to_disk`` wrote; None if it wrote none there.

    Raises:
        DataError: it wrote several splits, but not this one.
    """
    names = path / "dataset_dict.json"
    if not names.is_file():
        return path if (path / "state.json").is_file() else None
    if not (path / split / "state.json").is_file():
        found = ", ".join(sorted(state.parent.name for state in path.glob("*/state.json")))
        raise DataError(f"{path}: has no split {split!r}; found: {found}")
    return path / split


def _read_saved(folder: Path) -> Rows:
    from datasets import load_from_disk  # slow to import, and most data is JSONL

    try:
        yield from _rows_of_dataset(folder, load_from_disk(str(folder)))
    except Exception as error:  # the library raises many types; each means an unreadable folder
        raise DataError(f"{folder}: cannot be read: {error}") from error


def _rows_of_dataset(name: Any, data: Any) -> Iterator[RawRow]:
    # As stored: decoded pictures would be other objects each time.
    batches = data.with_format("arrow").iter(batch_size=BATCH_ROWS)
    return _numbered(name, (row for batch in batches for row in batch.to_pylist()))


def _read_file(path: Path, field: str | None, encoding: str) -> Rows:
    suffix = bare_suffix(path.name)
    if suffix in (".parquet", ".arrow"):
        yield from _read_arrow(path, suffix)
    elif suffix in (".csv", ".tsv"):
        yield from _read_csv(path, text_of(path, encoding), "\t" if suffix == ".tsv" else None)
    else:
        yield from read_json(path, text_of(path, encoding), field)


def _read_csv(path: Path, chunks: Iterator[str], delimiter: str | None) -> Iterator[RawRow]:
    """Yield the rows of a table of text; nothing is inferred, so that "007" and "NA" stay what they are.

    Raises:
        DataError: a row has more cells than the header.
    """
    csv.field_size_limit(MAX_CELL_CHARS)
    lines = (f"{line}\n" for line in lines_of(path, chunks))
    head = list(islice(lines, MAX_HEADER_LINES))

    def num_columns(sign: str) -> int:
        return len(next(csv.reader(head, delimiter=sign), []))

    # "prompt, completion" has a space behind each comma.
    spaced = bool(head) and ", " in head[0]
    line = 0
    try:
        delimiter = delimiter or max(DELIMITERS, key=num_columns)
        reader = csv.DictReader(
            chain(head, lines), delimiter=delimiter, skipinitialspace=spaced, strict=True
        )
        names = reader.fieldnames or []
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(f"{path}: has several columns named {twice[0]!r}; rename all but one")
        for number, record in enumerate(reader, start=1):
            line = reader.line_num
            if None in record:
                raise csv.Error(
                    f"row {number} has more cells than the header; quote cells that contain"
                    f" {delimiter!r}"
                )
            yield RawRow(f"{path} row {number}", dict(record))
    except csv.Error as error:
        raise DataError(
            f"{path}: cannot be read: {error}, behind line {line}. Cells with quotes or line breaks are written"
            ' as "a ""b"" c"; lines end with a line feed'
        ) from None


def _read_arrow(path: Path, suffix: str) -> Iterator[RawRow]:
    try:
        with contextlib.closing(_open_arrow(path)) as source:
            batches = _parquet_batches(source) if suffix == ".parquet" else _arrow_batches(source)
            yield from _numbered(path, (row for batch in batches for row in _records(path, batch)))
    except DataError:
        raise
    except Exception as error:  # the readers raise many types; each means an unreadable file
        raise DataError(f"{path}: cannot be read: {error}") from error


def _records(path: Path, batch: Any) -> list[dict[str, Any]]:
    names = batch.schema.names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: has several columns named {twice!r}; rename all but one")
    records: list[dict[str, Any]] = batch.to_pylist()
    return records


def _open_arrow(path: Path) -> Any:
    """Return a file that pyarrow can seek in; a compressed one is held in memory."""
    import pyarrow

    if path.suffix.lower() in PACKED_SUFFIXES:
        with open_bytes(path) as stream:
            return pyarrow.BufferReader(stream.read())
    return pyarrow.OSFile(str(path))


def _parquet_batches(source: Any) -> Iterator[Any]:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(source).iter_batches(BATCH_ROWS)  # type: ignore[no-any-return]


def _arrow_batches(source: Any) -> Iterator[Any]:
    import pyarrow

    try:
        yield from pyarrow.ipc.open_stream(source)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        file = pyarrow.ipc.open_file(source)
        yield from map(file.get_batch, range(file.num_record_batches))


def _numbered(source: Any, records: Iterable[Any]) -> Iterator[RawRow]:
    """Yield the records of an Arrow table as rows with numbers."""
    for number, record in enumerate(records, start=1):
        yield RawRow(f"{source} row {number}", _without_nulls(record))


def _without_nulls(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record of an Arrow table without the nulls inside of its columns.

    Arrow gives each object of a list the keys of all others, with null where it had none: without this,
    the arguments of one tool would appear in the calls of another.
    """
    return {
        key: _nested(value) if isinstance(value, dict | list) else value
        for key, value in record.items()
    }


def _nested(value: Any) -> Any:
    if isinstance(value, list):
        return [_nested(item) for item in value]
    if isinstance(value, dict):
        return {key: _nested(item) for key, item in value.items() if item is not None}
    return value


def _read_hub(source: DataSource) -> Rows:
    name = source.path
    if Path(name).exists():
        raise DataError(
            f"{name}: was read as a Hub id, but the working folder also holds something of that name."
            " Run from another folder, or write the full path if you mean the local one"
        )
    from datasets import get_dataset_split_names, load_dataset

    try:
        data = load_dataset(name, source.subset, split=source.split, revision=source.revision)
    except ValueError as error:
        if "split" not in str(error).lower():
            raise DataError(f"{name}: cannot be loaded from the Hub: {error}") from error
        names = get_dataset_split_names(name, source.subset, revision=source.revision)
        found = ", ".join(names)
        raise DataError(f"{name}: has no split {source.split!r}; found: {found}") from error
    except Exception as error:
        raise DataError(
            f"{name}: cannot be loaded from the Hub: {error}. If it is a file, write its path with"
            " a leading ./ or with its suffix; if it is gated, run `hf auth login` first"
        ) from error
    yield from _rows_of_dataset(f"{name}[{source.split}]", data)
