"""Owns the sources of rows: files, folders and the Hub, each row with its place."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.config.paths import DATA_SUFFIXES
from halfbyte.errors import DataError


@dataclass(frozen=True)
class RawRow:
    """One row as it was stored.

    Attributes:
        place: ``file:line`` or ``source row N`` (1-based).
        values: column name to value.
    """

    place: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Every row of one source.

    Attributes:
        name: the source.
        rows: its rows.
        fingerprint: sha256 of the rows' canonical JSON.
    """

    name: str
    rows: list[RawRow]
    fingerprint: str

    @property
    def columns(self) -> list[str]:
        """Names of all columns, in order of first appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row.values))


def read_table(
    source: str, *, split: str = "train", subset: str | None = None, revision: str | None = None
) -> Table:
    """Read every row of a file, a folder of files or a Hub dataset.

    A local source is given as an absolute path. ``split``, ``subset`` and ``revision`` apply to Hub
    datasets alone.

    Raises:
        DataError: the source does not exist, cannot be parsed, or holds no rows.
    """
    if Path(source).is_absolute():
        rows = [row for file in _files(Path(source)) for row in _read_file(file)]
    else:
        rows = _read_hub(source, split, subset, revision)
    if not rows:
        raise DataError(f"{source}: holds no rows")
    digest = hashlib.sha256()
    encode = json.JSONEncoder(sort_keys=True, default=str).encode
    for row in rows:
        digest.update(encode(row.values).encode() + b"\n")
    return Table(source, rows, digest.hexdigest())


def files_sha256(source: str) -> str | None:
    """Return the sha256 of the names and bytes of a local source's files; None for a Hub dataset.

    Raises:
        DataError: the source does not exist.
    """
    if not Path(source).is_absolute():
        return None
    digest = hashlib.sha256()
    for file in _files(Path(source)):
        with file.open("rb") as stream:
            file_sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file}\n{file_sha256}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    """Return the data files that a path names: itself, or those in its folder by name.

    Raises:
        DataError: there are none.
    """
    if path.is_file():
        if path.suffix not in DATA_SUFFIXES:
            raise DataError(
                f"{path}: cannot read {path.suffix or 'a file without suffix'}; allowed: "
                + ", ".join(DATA_SUFFIXES)
            )
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in DATA_SUFFIXES)
        if not files:
            raise DataError(f"{path}: the folder holds no {', '.join(DATA_SUFFIXES)} file")
        return files
    raise DataError(f"{path}: no such file or folder{_how_to_build(path)}")


def _how_to_build(path: Path) -> str:
    """Return a hint at the script that builds a missing file, or at the data files beside it.

    ``data/icd10/train.jsonl`` is built by ``data/icd10.py``.
    """
    for candidate in (path, *path.parents):
        script = candidate.parent / f"{candidate.name}.py"
        if candidate.name and script.is_file():
            return f". Build it: python {script}"
    siblings = sorted(file.name for file in path.parent.glob("*") if file.suffix in DATA_SUFFIXES)
    return f"; {path.parent} holds {', '.join(siblings)}" if siblings else ""


def _read_file(path: Path) -> list[RawRow]:
    if path.suffix == ".jsonl":
        return _read_jsonl(path)
    if path.suffix == ".json":
        return _read_json(path)
    return _read_with_datasets(path)


def _read_jsonl(path: Path) -> list[RawRow]:
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not valid JSON: {error}") from None
        rows.append(RawRow(place, _as_mapping(value, place)))
    return rows


def _read_json(path: Path) -> list[RawRow]:
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, list):
        raise DataError(f"{path}: holds {type(value).__name__}; a list of rows is expected")
    return [
        RawRow(f"{path} row {n}", _as_mapping(row, f"{path} row {n}"))
        for n, row in enumerate(value, start=1)
    ]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from None


def _as_mapping(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: holds {value!r}; a row is an object with columns")
    return value


def _read_with_datasets(path: Path) -> list[RawRow]:
    from datasets import Dataset  # slow to import, and most data is JSONL

    try:
        if path.suffix == ".csv":
            # Keeps text as text: no type inference turns "007" or "NA" into something else.
            import pandas

            frame = pandas.read_csv(path, dtype=str, keep_default_na=False)
            if not isinstance(frame.index, pandas.RangeIndex):
                raise ValueError(
                    "its rows have more cells than its header; quote cells that contain commas"
                )
            records = frame.to_dict(orient="records")
        else:
            import pyarrow.parquet

            records = Dataset(pyarrow.parquet.read_table(path)).to_list()
    except Exception as error:  # the readers raise many types; each means an unreadable file
        raise DataError(f"{path}: cannot be read: {error}") from error
    return [
        RawRow(f"{path} row {n}", {str(key): value for key, value in record.items()})
        for n, record in enumerate(records, start=1)
    ]


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
    return [
        RawRow(f"{source}[{split}] row {n}", dict(record)) for n, record in enumerate(data, start=1)
    ]
