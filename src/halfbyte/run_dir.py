"""Owns the run folder: the names and meaning of its files, atomic writes, provenance, and the cache.

run.yaml           the fully resolved config
manifest.json      where the base, the data and the code came from, and what the run cost
ledger.json        rows in = trained + held out + dropped{reason}
metrics.jsonl      one line of numbers for each logged step; the same numbers go to W&B
samples.jsonl      answers to held-out prompts, written during training
data/              the held-out rows (test, validation) and the few-shot examples
checkpoints/       checkpoint-<step>/ of the Trainer
adapter/           the trained adapter with tokenizer and chat template
merged/            the merged model, and merge_report.json
export/            one folder for each artefact with its proof, export_report.json, export_report.md
eval/              report.json, .md, .html; answers.jsonl, benchmarks.jsonl, judge.jsonl; ladder.json, .md
"""

from __future__ import annotations

import errno
import functools
import hashlib
import itertools
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from halfbyte import __version__
from halfbyte.errors import RunError

# What file systems without a flush answer, as those of mounted cloud drives.
NO_FLUSH = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
NUM_HASHING = 4  # files at a time
LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "datasets",
    "accelerate",
    "tokenizers",
)


class RunDir:
    """The paths inside one run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "run.yaml"
        self.manifest = path / "manifest.json"
        self.ledger = path / "ledger.json"
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"
        self.data = path / "data"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.merged = path / "merged"
        self.export = path / "export"
        self.eval = path / "eval"

    def need(self, path: Path, command: str) -> Path:
        """Return ``path`` if it exists.

        Raises:
            RunError: it is missing; the message names the command that makes it.
        """
        if not path.exists():
            raise RunError(f"{path} is missing. Make it first: {command}")
        return path


def cache_dir() -> Path:
    """Return the folder of reproducible files: ``$HALFBYTE_CACHE``, else ``~/.cache/halfbyte``."""
    return Path(os.environ.get("HALFBYTE_CACHE") or Path.home() / ".cache" / "halfbyte")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` atomically: ``path`` is either the old file or the complete new one."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write ``content`` atomically: ``path`` is either the old file or the complete new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            _sync(stream.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
        flush_folder(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically; NaN and infinities are rejected."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file that a run wrote.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} is missing: the run folder is not complete") from None
    except ValueError as error:
        raise RunError(f"{path}: damaged JSON: {error}") from None


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """Write one JSON value per line, atomically."""
    lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records]
    write_text(path, "".join(line + "\n" for line in lines))


def read_jsonl(path: Path) -> Iterator[Any]:
    """Yield the JSON value of each line.

    An incomplete last line, as a power cut leaves after ``append_jsonl``, is skipped.

    Raises:
        RunError: the file is missing, or another line is damaged.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise RunError(f"{path} is missing: the run folder is not complete") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return
            raise RunError(f"{path}:{number}: damaged JSON: {error}") from None
        yield value


def append_jsonl(path: Path, record: Any) -> None:
    """Append one JSON line and flush it to the disk."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        stream.flush()
        _sync(stream.fileno())


def move_aside(folder: Path) -> Path:
    """Rename ``folder`` to a name with the time and return the new path; nothing is deleted."""
    stamp = f"{folder.name}~{time.strftime('%Y%m%d-%H%M%S')}"
    target = folder.with_name(stamp)
    for number in itertools.count(2):
        if not target.exists():
            break
        target = folder.with_name(f"{stamp}-{number}")
    folder.rename(target)
    return target


def replace_folder(new: Path, final: Path) -> None:
    """Flush a finished folder to the disk and give it its final name; an existing one is deleted afterwards."""
    final.parent.mkdir(exist_ok=True)
    flush_tree(new)
    old = move_aside(final) if final.exists() else None
    new.rename(final)
    flush_folder(final.parent)
    if old is not None:
        shutil.rmtree(old)


def flush_tree(folder: Path) -> None:
    """Flush all files below a folder, and the names of all of them, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            flush_folder(path)
        else:
            _flush(path)


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk: without it a rename may be lost in a power cut (POSIX fsync)."""
    if os.name != "nt":  # where a folder cannot be opened
        _flush(folder)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        _sync(handle)
    finally:
        os.close(handle)


def _sync(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FLUSH:  # a disk that is full or broken says so here
            raise


def provenance() -> dict[str, Any]:
    """Return the versions of libraries and of this code, and the machine, for the manifest."""
    return {
        "halfbyte": __version__,
        "commit": _commit(),
        "libraries": {name: library_version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


@functools.cache
def library_version(name: str) -> str | None:
    """Return the version of an installed library, or None if it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """Return the hex sha256 of each file below a folder, by its name there, as it is read back."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    with ThreadPoolExecutor(NUM_HASHING) as threads:
        return dict(zip(names, threads.map(file_sha256, files), strict=True))


def check_files(folder: Path, sha256: Mapping[str, str], subject: str, remedy: str) -> None:
    """Check that files still have the digests that a report recorded.

    Args:
        folder: the folder that holds the files.
        sha256: hex digest of each file, by its name in the folder.
        subject: words for the message, such as ``the file that was proven``.
        remedy: advice for the message on how to fix it.

    Raises:
        RunError: a file is missing, cut short or changed.
    """
    for name, digest in sha256.items():
        path = folder / name
        if not path.is_file() or file_sha256(path) != digest:
            raise RunError(f"{path}: is not {subject} (missing, cut short or changed). {remedy}")
