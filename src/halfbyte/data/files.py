"""Owns which files a source names: a file, a pattern, or a folder with the files of one split; and their text."""

from __future__ import annotations

import codecs
import gzip
import lzma
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

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
CHUNK_BYTES = 1 << 20
MAX_NAMED = 10
MAX_ROW_CHARS = 1 << 25
MAX_HELD_CHARS = 1 << 29  # of a text that is held as a whole
READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error)
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
    try:
        return sorted(Path(*parts[:first]).glob(str(Path(*parts[first:]))))
    except ValueError as error:
        raise DataError(f"{pattern}: no pattern: {error}; such as rows/**/*.jsonl") from None


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """Return the files of a folder that belong to a split, by the words in their names.

    Raises:
        DataError: the folder holds no data file, or none of this split.
    """
    entries = sorted(folder.iterdir())
    files = [file for file in entries if _holds_rows(file)]
    passed_over = [file.name for file in entries if _may_hold_rows(file)]
    if files and passed_over:
        names = ", ".join(passed_over[:MAX_NAMED])
        print(f"{folder}: passed over {names}", file=sys.stderr)
    if not files:
        nested = next((f for f in sorted(folder.rglob("*")) if is_data_file(f.name)), None)
        hint = f"; for {nested} write {folder}/**/*{nested.suffix}" if nested else ""
        raise DataError(f"{folder}: the folder holds no {', '.join(DATA_SUFFIXES)} file{hint}")
    splits = {file: split_of(file) for file in files}
    wanted = SPLIT_WORDS.get(split, split)
    if set(splits.values()) <= {None, wanted} or len(set(splits.values())) == 1:
        return files  # nothing to tell apart
    chosen = [file for file in files if (splits[file] or "train") == wanted]
    others = ", ".join(file.name for file in files if file not in chosen)
    if not chosen:
        raise DataError(
            f"{folder}: no file of the split {split!r}; found: {others}. Name one with data.train_split or"
            " data.test_split, or as the split of an entry of data.train"
        )
    print(
        f"{folder}: read {', '.join(file.name for file in chosen)} as {split}, and not {others}",
        file=sys.stderr,
    )
    return chosen


def _holds_rows(file: Path) -> bool:
    """Return whether a file holds rows, by its name."""
    hidden = file.name in INDEX_FILES or file.name.startswith((".", "_"))
    return not hidden and is_data_file(file.name) and file.is_file()


def _may_hold_rows(file: Path) -> bool:
    """Return whether a file or folder is passed over although its name, or one in it, is like that of rows."""
    if file.name in INDEX_FILES or file.name.startswith(".") or _holds_rows(file):
        return False
    if file.is_dir():
        return any(is_data_file(inner.name) for inner in file.iterdir())
    return any(suffix in file.name.lower() for suffix in DATA_SUFFIXES)


def split_of(file: Path) -> str | None:
    """Return the split that a file's name says, None if it says none."""
    words = re.split(r"[-_. ]", file.name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def _how_to_build(path: Path) -> str:
    """Return a hint at the script that builds a missing file, or at the data files beside it.

    ``data/icd10/train.jsonl`` is built by ``halfbyte dataset icd10``.
    """
    for candidate in (path, *path.parents):
        script = candidate.parent / f"{candidate.name}.py"
        if candidate.name and script.is_file():
            return f". Build it: python {script}"
    siblings = sorted(file.name for file in path.parent.glob("*") if is_data_file(file.name))
    return f"; {path.parent} holds {', '.join(siblings)}" if siblings else ""


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressed if its name says that it is compressed."""
    match path.suffix.lower():
        case ".gz":
            return cast(IO[bytes], gzip.open(path, "rb"))
        case ".xz":
            return lzma.open(path, "rb")
        case ".zst":
            import pyarrow

            return cast(IO[bytes], pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def text_of(path: Path, encoding: str) -> Iterator[str]:
    """Yield the text of a file in pieces.

    Raises:
        DataError: it cannot be read, or is not text of this encoding.
    """
    try:
        is_utf8 = codecs.lookup(encoding).name == "utf-8"
        "".encode(encoding)  # not of one such as hex, which is none of text
    except LookupError:
        raise DataError(f"data.encoding: {encoding!r} is unknown; such as cp1252") from None
    decoder = codecs.getincrementaldecoder("utf-8-sig" if is_utf8 else encoding)()
    start, at_end = b"", False
    num_bytes = 0
    try:
        with open_bytes(path) as stream:
            while not at_end:
                chunk = bytes(stream.read(CHUNK_BYTES))
                start = start or chunk[:2]
                num_bytes, at_end = num_bytes + len(chunk), not chunk
                yield decoder.decode(chunk, final=at_end)
    except UnicodeDecodeError as error:
        guess = "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "cp1252"
        at = num_bytes - len(error.object) + error.start
        raise DataError(
            f"{path}: not {encoding} text: {error.reason} at byte {at}. Set"
            f" data.encoding={guess} if it was written so, or save it as UTF-8"
        ) from None
    except READ_ERRORS as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def lines_of(path: Path, chunks: Iterator[str]) -> Iterator[str]:
    """Yield the lines of a file's text without their line ends.

    Raises:
        DataError: a line is longer than any row.
    """
    parts: list[str] = []
    for chunk in chunks:
        first, *others = chunk.split("\n")
        parts.append(first)
        if not others and sum(map(len, parts)) > MAX_ROW_CHARS:
            raise DataError(
                f"{path}: a line has more than {MAX_ROW_CHARS:,} characters, which no row needs"
            )
        if others:
            yield "".join(parts).removesuffix("\r")
            for line in others[:-1]:
                yield line.removesuffix("\r")
            parts = others[-1:]
    if last := "".join(parts):
        yield last.removesuffix("\r")
