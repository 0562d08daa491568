"""Owns the sources of rows: files, folders and the Hub, each row with its place."""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from halfbyte.config.paths import bare_suffix
from halfbyte.data.fields import RowError
from halfbyte.data.files import data_files
from halfbyte.data.json_rows import read_json
from halfbyte.data.raw import RawRow, Table
from halfbyte.errors import DataError

DELIMITERS = (",", ";", "\t", "|")
MAX_CELL_CHARS = 2**31 - 1
Rows = tuple[list[RawRow], list[RowError]]


def read_table(
    source: str,
    *,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    field: str | None = None,
    encoding: str = "utf-8",
) -> Table:
    """Read every row of a file, a folder of files or a Hub dataset.

    Args:
        source: a Hub id, or an absolute path or pattern.
        split: split of a Hub dataset, of a folder that ``save_to_disk`` wrote, or of a folder with files
            of several splits.
        subset: configuration of a Hub dataset.
        revision: revision of a Hub dataset.
        field: key under which a JSON file holds its rows.
        encoding: of text files.

    Raises:
        DataError: the source does not exist, cannot be parsed, or holds no rows.
    """
    rows: list[RawRow] = []
    malformed: list[RowError] = []
    if not Path(source).is_absolute():
        rows = _read_hub(source, split, subset, revision)
    elif saved := _saved_dataset(Path(source), split):
        rows = _read_saved(saved)
    else:
        for file in data_files(source, split):
            read, errors = _read_file(file, field, encoding)
            rows += read
            malformed += errors
    if not rows:
        raise malformed[0] if malformed else DataError(f"{source}: holds no rows")
    digest = hashlib.sha256()
    encode = json.JSONEncoder(sort_keys=True, default=str).encode
    for row in rows:
        digest.update(encode(row.values).encode() + b"\n")
    return Table(source, rows, digest.hexdigest(), malformed)


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


def _read_saved(folder: Path) -> list[RawRow]:
    from datasets import load_from_disk  # slow to import, and most data is JSONL

    try:
        return _numbered(folder, load_from_disk(str(folder)).with_format("arrow")[:].to_pylist())
    except Exception as error:  # the library raises many types; each means an unreadable folder
        raise DataError(f"{folder}: cannot be read: {error}") from error


def _read_file(path: Path, field: str | None, encoding: str) -> Rows:
    suffix = bare_suffix(path.name)
    if suffix in (".parquet", ".arrow"):
        return _read_arrow(path, suffix), []
    text = _read_text(path, encoding)
    if suffix in (".csv", ".tsv"):
        return _read_csv(path, text, "\t" if suffix == ".tsv" else None), []
    return read_json(path, text, field)


def _read_bytes(path: Path) -> bytes:
    """Return the bytes of a file, decompressed if its name says that they are compressed.

    Raises:
        DataError: they are not.
    """
    try:
        match path.suffix.lower():
            case ".gz":
                return gzip.decompress(path.read_bytes())
            case ".xz":
                return lzma.decompress(path.read_bytes())
            case ".zst":
                import pyarrow

                with pyarrow.input_stream(str(path), compression="zstd") as stream:
                    return bytes(stream.read())
        return path.read_bytes()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _read_text(path: Path, encoding: str) -> str:
    content = _read_bytes(path)
    try:
        is_utf8 = codecs.lookup(encoding).name == "utf-8"
        text = content.decode("utf-8-sig" if is_utf8 else encoding)
    except (UnicodeDecodeError, LookupError) as error:
        if isinstance(error, LookupError):
            raise DataError(f"data.encoding: {encoding!r} is unknown; such as cp1252") from None
        guess = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252"
        raise DataError(
            f"{path}: not {encoding} text: {error.reason} at byte {error.start}. Set"
            f" data.encoding={guess} if it was written so, or save it as UTF-8"
        ) from None
    return text.replace("\r\n", "\n")


def _read_csv(path: Path, text: str, delimiter: str | None) -> list[RawRow]:
    """Read a table of text; nothing is inferred, so that "007" and "NA" stay what they are.

    Raises:
        DataError: a row has more cells than the header.
    """
    csv.field_size_limit(MAX_CELL_CHARS)

    def num_columns(sign: str) -> int:
        return len(next(csv.reader(io.StringIO(text), delimiter=sign), []))

    delimiter = delimiter or max(DELIMITERS, key=num_columns)
    # "prompt, completion" has a space behind each comma.
    spaced = ", " in text.partition("\n")[0]
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=spaced, strict=True
    )
    names = reader.fieldnames or []
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: has several columns named {twice[0]!r}; rename all but one")
    rows = []
    try:
        for number, record in enumerate(reader, start=1):
            if None in record:
                raise csv.Error(
                    f"row {number} has more cells than the header; quote cells that contain"
                    f" {delimiter!r}"
                )
            if any(value for value in record.values()):
                rows.append(RawRow(f"{path} row {number}", dict(record)))
    except csv.Error as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    return rows


def _read_arrow(path: Path, suffix: str) -> list[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        source = pyarrow.BufferReader(_read_bytes(path))
        if suffix == ".parquet":
            table = pyarrow.parquet.read_table(source)
        else:
            try:
                table = pyarrow.ipc.open_stream(source).read_all()
            except pyarrow.ArrowInvalid:
                table = pyarrow.ipc.open_file(source).read_all()
        return _numbered(path, table.to_pylist())
    except DataError:
        raise
    except Exception as error:  # the readers raise many types; each means an unreadable file
        raise DataError(f"{path}: cannot be read: {error}") from error


def _numbered(source: Any, records: Iterable[Any]) -> list[RawRow]:
    """Return the records of an Arrow table as rows with numbers."""
    return [
        RawRow(f"{source} row {number}", _without_nulls(dict(record)))
        for number, record in enumerate(records, start=1)
    ]


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


def _read_hub(source: str, split: str, subset: str | None, revision: str | None) -> list[RawRow]:
    if Path(source).exists():
        raise DataError(
            f"{source}: was read as a Hub id, but the working folder also holds something of that name."
            " Run from another folder, or write the full path if you mean the local one"
        )
    from datasets import get_dataset_split_names, load_dataset

    try:
        data = load_dataset(source, subset, split=split, revision=revision)
    except ValueError as error:
        if "split" not in str(error).lower():
            raise DataError(f"{source}: cannot be loaded from the Hub: {error}") from error
        names = get_dataset_split_names(source, subset, revision=revision)
        raise DataError(f"{source}: has no split {split!r}; found: {', '.join(names)}") from error
    except Exception as error:
        raise DataError(
            f"{source}: cannot be loaded from the Hub: {error}. If it is a file, write its path with"
            " a leading ./ or with its suffix; if it is gated, run `hf auth login` first"
        ) from error
    # As stored: decoded pictures would be other objects each time.
    return _numbered(f"{source}[{split}]", data.with_format("arrow")[:].to_pylist())
