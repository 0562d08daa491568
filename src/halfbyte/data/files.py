"""Owns which files a source names: a file, a pattern, or a folder with the files of one split."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from halfbyte.config.paths import DATA_SUFFIXES, is_data_file, is_pattern
from halfbyte.errors import DataError

# Files of the datasets library and others that describe data beside them.
INDEX_FILES = {
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "index.json",
    "metadata.json",
    "state.json",
}
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
ALLOWED = f"{', '.join(DATA_SUFFIXES)}, each also with .gz, .xz or .zst"


def data_files(source: str, split: str) -> list[Path]:
    """Return the data files that a local source names: itself, those of a pattern or of a folder.

    Of a folder whose files name several splits, such as ``train.jsonl`` and ``test.jsonl``, these are the
    files of ``split``.

    Args:
        source: absolute path or pattern.
        split: name of the split to read.

    Raises:
        DataError: there are none.
    """
    path = Path(source)
    if is_pattern(source) and not path.exists():
        files = [file for file in _matches(source) if _holds_rows(file)]
        if not files:
            raise DataError(f"{source}: no data file fits the pattern; allowed: {ALLOWED}")
        return files
    if path.is_file():
        if not is_data_file(path.name):
            suffix = path.suffix or "a file without suffix"
            raise DataError(f"{path}: cannot read {suffix}; allowed: {ALLOWED}")
        return [path]
    if path.is_dir():
        return _files_of_split(path, split)
    raise DataError(f"{path}: no such file or folder{_how_to_build(path)}")


def _matches(pattern: str) -> list[Path]:
    parts = Path(pattern).parts
    first = next(number for number, part in enumerate(parts) if is_pattern(part))
    return sorted(Path(*parts[:first]).glob(str(Path(*parts[first:]))))


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """Return the files of a folder that belong to a split, by the words in their names.

    Raises:
        DataError: the folder holds no data file, or none of this split.
    """
    files = sorted(file for file in folder.iterdir() if _holds_rows(file))
    if not files:
        nested = next((f for f in sorted(folder.rglob("*")) if is_data_file(f.name)), None)
        hint = f"; for {nested} write {folder}/**/*{nested.suffix}" if nested else ""
        raise DataError(f"{folder}: the folder holds no {', '.join(DATA_SUFFIXES)} file{hint}")
    splits = {file: _split_of(file) for file in files}
    wanted = SPLIT_WORDS.get(split, split)
    if set(splits.values()) <= {None, wanted} or len(set(splits.values())) == 1:
        return files  # nothing to tell apart
    chosen = [file for file in files if (splits[file] or "train") == wanted]
    others = ", ".join(file.name for file in files if file not in chosen)
    if not chosen:
        raise DataError(f"{folder}: no file of the split {split!r}; found: {others}")
    print(
        f"{folder}: read {', '.join(file.name for file in chosen)} as {split}, and not {others}",
        file=sys.stderr,
    )
    return chosen


def _holds_rows(file: Path) -> bool:
    """Return whether a file holds rows, by its name."""
    hidden = file.name in INDEX_FILES or file.name.startswith((".", "_"))
    return not hidden and is_data_file(file.name) and file.is_file()


def _split_of(file: Path) -> str | None:
    """Return the split that a file's name says, None if it says none."""
    words = re.split(r"[-_. ]", file.name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def _how_to_build(path: Path) -> str:
    """Return a hint at the script that builds a missing file, or at the data files beside it.

    ``data/icd10/train.jsonl`` is built by ``data/icd10.py``.
    """
    for candidate in (path, *path.parents):
        script = candidate.parent / f"{candidate.name}.py"
        if candidate.name and script.is_file():
            return f". Build it: python {script}"
    siblings = sorted(file.name for file in path.parent.glob("*") if is_data_file(file.name))
    return f"; {path.parent} holds {', '.join(siblings)}" if siblings else ""
