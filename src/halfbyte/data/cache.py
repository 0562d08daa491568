"""Owns the cache of prepared rows: its keys, the folders that rows are prepared in, and their total size.

A folder is named after the sha256 of everything that the rows depend on. It holds the sha256 of each of its
files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from halfbyte import __version__, record
from halfbyte.config.dataset import Data
from halfbyte.data.prepared import Prepared, read_prepared, write_prepared
from halfbyte.data.render import Renderer
from halfbyte.data.row_file import Scratch, delete_left
from halfbyte.run_dir import cache_dir

MAX_BYTES = 10**10  # of all rows together; the least recently used are deleted first
# Libraries that read, render, tokenise or compare rows.
LIBRARIES = (
    "datasets",
    "jinja2",
    "numpy",
    "pyarrow",
    "scipy",
    "tokenizers",
    "transformers",
)


def folder() -> Path:
    """Return the folder of prepared rows."""
    return cache_dir() / "prepared"


def key_of(data: Data, renderer: Renderer, seed: int, sources: list[str]) -> str:
    """Return the sha256 of all that prepared rows depend on: rows, settings, tokenizer, template, code.

    Args:
        data: the config's section.
        renderer: provides the tokenizer and the template.
        seed: draws rows of sources that are not used as a whole.
        sources: a digest of the rows of each source.
    """
    tokenizer: Any = renderer.tokenizer
    parts = {
        "halfbyte": [__version__, _code_sha256()],
        "libraries": [platform.python_version(), *map(metadata.version, LIBRARIES)],
        "data": data.model_dump(mode="json", exclude={"cache", "date"}),
        "sources": sources,
        "seed": seed if any(s.rows or s.weight != 1 for _, s in data.sources()) else None,
        "tokenizer": [
            type(tokenizer).__qualname__,
            hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
            {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        ],
        "template": tokenizer.chat_template,
        "loss_on": renderer.loss_on,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def is_writer() -> bool:
    """Return whether this process writes and speaks: every process of a machine has the same rows."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def read(key: str) -> Prepared | None:
    """Return the rows that ``write`` stored under ``key``; None if there are none or they are damaged."""
    path = _path(key)
    if not path.exists():
        return None
    prepared = read_prepared(path)
    if prepared is None:
        _log(f"warning: {path} is damaged: its rows are prepared again")
        shutil.rmtree(path, ignore_errors=True)
        return None
    with contextlib.suppress(OSError):  # the cache may be read-only
        os.utime(path)
    _log(f"prepared rows: read from {path}; data.cache=false prepares them again")
    return prepared


def write(key: str, prepared: Prepared, scratch: Scratch) -> None:
    """Store rows under ``key``, whole or not at all; delete the least recently used for room."""
    if not is_writer():
        return
    path, error = _path(key), scratch.fault
    if not error:
        try:
            write_prepared(prepared, scratch.path)
            size = _size(scratch.path)
            if size > MAX_BYTES:
                _log(
                    f"prepared rows are not cached: {size / 1e9:.1f} GB is more than the cache may hold"
                )
                return
            try:
                scratch.keep_as(path)
            except OSError:
                if not path.exists():  # else another process was first
                    raise
            _make_room(path)
        except OSError as fault:
            error = fault.strerror or str(fault)
    if error:
        _log(
            f"warning: prepared rows cannot be cached in {path.parent} ({error}). Set"
            " HALFBYTE_CACHE to another folder, or data.cache=false"
        )


def _path(key: str) -> Path:
    return folder() / f"{key}.rows"


def _size(path: Path) -> int:
    """Return the bytes of a folder's files; 0 if another process deletes it meanwhile."""
    with contextlib.suppress(OSError):
        return sum(file.stat().st_size for file in path.iterdir())
    return 0


def _make_room(newest: Path) -> None:
    """Delete the least recently used rows other than ``newest`` until the rest fit."""
    delete_left(newest.parent, ".*")
    kept = [path for path in newest.parent.glob("*.rows") if path != newest and path.is_dir()]
    sizes = {path: _size(path) for path in kept}
    total = _size(newest) + sum(sizes.values())
    for path in sorted(kept, key=lambda path: path.stat().st_mtime):
        if total <= MAX_BYTES:
            return
        shutil.rmtree(path, ignore_errors=True)
        total -= sizes[path]


def _code_sha256() -> str:
    """Return the sha256 of every module that shapes prepared rows: changed code never gets an old result."""
    digest = hashlib.sha256()
    modules = [*resources.files("halfbyte.data").iterdir(), Path(record.__file__)]
    for module in sorted(modules, key=lambda module: module.name):
        if module.name.endswith(".py"):
            digest.update(f"{module.name}\n".encode() + module.read_bytes())
    return digest.hexdigest()


def _log(line: str) -> None:
    # To stderr, because what a script prints to stdout may be JSON.
    if is_writer():
        print(line, file=sys.stderr)
