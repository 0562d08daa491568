"""Owns the cache of prepared rows: its keys, the check of its files, and their total size.

A file is named after the sha256 of everything that the rows depend on. It holds the sha256 of its
content, followed by the content as safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sys
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte import __version__, record
from halfbyte.config.dataset import Data
from halfbyte.data.render import Renderer
from halfbyte.run_dir import cache_dir, write_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_BYTES = 2 * 10**9  # of all files together; the least recently used are deleted first
DIGEST_BYTES = hashlib.sha256().digest_size
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


def key_of(data: Data, renderer: Renderer, sources: dict[str, str]) -> str:
    """Return the sha256 of all that prepared rows depend on: rows, settings, tokenizer, template, code.

    Args:
        data: the config's section.
        renderer: provides the tokenizer and the template.
        sources: a digest of the rows of each source.
    """
    tokenizer: Any = renderer.tokenizer
    parts = {
        "halfbyte": [__version__, _code_sha256()],
        "libraries": [platform.python_version(), *map(metadata.version, LIBRARIES)],
        "data": data.model_dump(mode="json", exclude={"cache", "date"}),
        "sources": sources,
        "tokenizer": [
            type(tokenizer).__qualname__,
            hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
            {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        ],
        "template": tokenizer.chat_template,
        "loss_on": renderer.loss_on,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read(key: str) -> dict[str, NDArray[Any]] | None:
    """Return the arrays that ``write`` stored under ``key``; None if there are none or they are damaged."""
    from safetensors.numpy import load

    path = _path(key)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _log(f"warning: {path} cannot be read ({error.strerror}): its rows are prepared again")
        return None
    digest, payload = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != digest:
        _log(f"warning: {path} is damaged: its rows are prepared again")
        return None
    with contextlib.suppress(OSError):  # the cache may be read-only
        os.utime(path)
    _log(f"prepared rows: read from {path}; data.cache=false prepares them again")
    arrays: dict[str, NDArray[Any]] = load(payload)
    return arrays


def write(key: str, arrays: dict[str, NDArray[np.generic]]) -> None:
    """Store arrays under ``key``, whole or not at all; delete the least recently used files for room."""
    from safetensors.numpy import save

    if os.environ.get("LOCAL_RANK", "0") != "0":
        return  # every process of this machine has the same rows
    payload = save(arrays)
    if len(payload) > MAX_BYTES:
        _log(
            f"prepared rows are not cached: {len(payload) / 1e9:.1f} GB is more than the cache may hold"
        )
        return
    path = _path(key)
    try:
        # Rows may be confidential, so other users of a shared machine cannot read them.
        write_bytes(path, hashlib.sha256(payload).digest() + payload, mode=0o600)
        _make_room(path)
    except OSError as error:
        _log(
            f"warning: prepared rows cannot be cached in {path.parent} ({error.strerror}). Set"
            " HALFBYTE_CACHE to another folder, or data.cache=false"
        )


def _path(key: str) -> Path:
    return folder() / f"{key}.rows"


def _make_room(newest: Path) -> None:
    """Delete the least recently used files other than ``newest`` until the rest fit."""
    files = [(path.stat(), path) for path in newest.parent.iterdir() if path != newest]
    total = newest.stat().st_size + sum(stat.st_size for stat, _ in files)
    for stat, path in sorted(files, key=lambda file: file[0].st_mtime):
        if total <= MAX_BYTES:
            return
        path.unlink(missing_ok=True)
        total -= stat.st_size


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
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr)
