"""Owns which files of a place are rows to train on, and which are to be held out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from halfbyte.config.dataset import DataSource
from halfbyte.config.paths import is_data_file
from halfbyte.data.fields import RowError
from halfbyte.data.files import INDEX_FILES, split_of
from halfbyte.data.raw import RawRow
from halfbyte.data.sources import open_table
from halfbyte.errors import DataError

HEAD_ROWS = 2000  # that are looked at
MIN_TEST_ROWS = 50  # of a file that is held out as it is
MAX_NAMED = 12


@dataclass(frozen=True)
class Places:
    """Where rows are.

    Attributes:
        train: as ``data.train``.
        test: as ``data.test``; None: a share of the training rows is held out.
        head: the first training rows as stored.
    """

    train: str
    test: str | None
    head: list[dict[str, Any]]


def find_rows(given: str) -> Places:
    """Return the rows of a file, a folder or a Hub dataset.

    Raises:
        DataError: there are none, or files of several kinds, of which one is to be named.
    """
    path = Path(given).expanduser().absolute()
    if path.is_file():
        test = _sibling(path)
        return Places(str(path), str(test) if test else None, _head(str(path)))
    if path.is_dir():
        return _in_folder(path)
    if given.count("/") == 1 and not given.startswith((".", "/", "~")) and not path.suffix:
        return _on_hub(given)
    raise DataError(f"{given}: no such file or folder, and no dataset of the Hub (org/name)")


def _on_hub(name: str) -> Places:
    head = _head(name)
    try:
        has_test = len(_head(name, "test")) >= MIN_TEST_ROWS
    except DataError:
        has_test = False
    return Places(name, name if has_test else None, head)


def _in_folder(folder: Path) -> Places:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and _may_hold_rows(file)]
    heads = {file: head for file in files if (head := _rows_or_none(file))}
    if not heads:
        raise DataError(
            f"{folder}: holds no rows; it has {_named(folder, sorted(folder.rglob('*')))}"
        )
    by_split: dict[str, list[Path]] = {}
    for file in heads:
        by_split.setdefault(split_of(file) or "train", []).append(file)
    columns = {frozenset(column for row in head[:20] for column in row) for head in heads.values()}
    common = frozenset.intersection(*columns)
    if not common or (len(columns) > 1 and len(heads) > len(by_split)):
        raise DataError(
            f"{folder}: holds files of several kinds; name one: {_named(folder, list(heads))}"
        )
    order = sorted(by_split, key=lambda split: (split != "train", -_size(by_split[split])))
    train = order[0]
    test = next((split for split in ("test", "validation") if split in by_split), None)
    held_out: str | None = None
    if test not in (None, train) and sum(len(heads[f]) for f in by_split[test]) >= MIN_TEST_ROWS:
        held_out = _pattern(folder, by_split[test])
    return Places(_pattern(folder, by_split[train]), held_out, heads[by_split[train][0]])


def _pattern(folder: Path, files: list[Path]) -> str:
    """Return the file, or a pattern of files of one name or one suffix."""
    if len(files) == 1:
        return str(files[0])
    names = {file.name for file in files}
    if len(names) == 1:
        return f"{folder}/**/{names.pop()}"
    raise DataError(
        f"{folder}: several files hold rows of one split; name one, or a pattern: {_named(folder, files)}"
    )


def _size(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _named(folder: Path, files: list[Path]) -> str:
    names = [str(file.relative_to(folder)) for file in files[:MAX_NAMED]]
    return ", ".join(names) + (" …" if len(files) > MAX_NAMED else "")


def _sibling(path: Path) -> Path | None:
    """Return the file of held-out rows beside one whose name says that its rows are for training."""
    if split_of(path) != "train":
        return None
    for other in sorted(path.parent.iterdir()):
        same_kind = other.suffixes == path.suffixes and other.is_file()
        if same_kind and split_of(other) == "test" and len(_rows_or_none(other)) >= MIN_TEST_ROWS:
            return other
    return None


def _may_hold_rows(file: Path) -> bool:
    return is_data_file(file.name) and file.name not in INDEX_FILES and file.name[0] not in "._"


def _rows_or_none(file: Path) -> list[dict[str, Any]]:
    """Return the first rows of a file, none if it holds other things."""
    try:
        return _head(str(file))
    except DataError:
        return []


def _head(path: str, split: str = "train") -> list[dict[str, Any]]:
    """Return the first rows of a source as stored."""
    source = path if "/" in path and not Path(path).exists() else str(Path(path).resolve())
    table = open_table(DataSource(path=source, split=split, encoding="utf-8"))
    return list(_values(islice(table, HEAD_ROWS)))


def _values(rows: Iterator[RawRow | RowError]) -> Iterator[dict[str, Any]]:
    for row in rows:
        if isinstance(row, RawRow):
            yield row.values
