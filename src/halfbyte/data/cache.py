"""Owns the cache of prepared rows: what they depend on, files that are checked, and their total size.

A file is named by the sha256 of everything that the rows depend on. It holds the sha256 of its
content, then the content as safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import sys
from datetime import datetime
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte import __version__
from halfbyte.config.schema import Data
from halfbyte.data.render import Renderer
from halfbyte.run_dir import cache_dir, write_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_BYTES = 2 * 10**9  # of all files together; the ones unused for longest go first
DIGEST_BYTES = hashlib.sha256().digest_size
# Libraries that read, render, tokenise or compare rows.
LIBRARIES = (
    "datasets",
    "jinja2",
    "numpy",
    "pandas",
    "pyarrow",
    "scipy",
    "tokenizers",
    "transformers",
)
CLOCK = re.compile(r"""strftime_now\(\s*(["'])([^"']*)\1\s*\)""")
CLOCK_NAMED = re.compile(r"strftime_now(?!\s+is\s)")


def folder() -> Path:
    """Where prepared rows are kept."""
    return cache_dir() / "prepared"


def key_of(data: Data, renderer: Renderer, sources: dict[str, str]) -> str | None:
    """Sha256 of everything that prepared rows depend on: rows, settings, tokenizer, template, code.

    None where nobody can tell: a template that reads the clock other than by fixed formats.

    Args:
        data: the config's section.
        renderer: brings tokenizer and template.
        sources: a digest of the rows of each source.
    """
    tokenizer: Any = renderer.tokenizer
    clock = _clock(tokenizer.chat_template)
    if clock is None:
        _say("prepared rows are not cached: the chat template reads the clock")
        return None
    parts = {
        "halfbyte": [__version__, _code_sha256()],
        "libraries": [platform.python_version(), *map(metadata.version, LIBRARIES)],
        "data": data.model_dump(mode="json", exclude={"cache"}),
        "sources": sources,
        "tokenizer": [
            type(tokenizer).__qualname__,
            hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
            {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        ],
        "template": [tokenizer.chat_template, clock],
        "loss_on": renderer.loss_on,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read(key: str) -> dict[str, NDArray[Any]] | None:
    """The arrays that ``write`` has kept under ``key``; None if there are none or the file is damaged."""
    from safetensors.numpy import load

    path = _path(key)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _say(f"warning: {path} cannot be read ({error.strerror}): its rows are prepared anew")
        return None
    digest, payload = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != digest:
        _say(f"warning: {path} is damaged: its rows are prepared anew")
        return None
    with contextlib.suppress(OSError):  # a cache that cannot be written to
        os.utime(path)
    _say(f"prepared rows: read from {path}; data.cache=false prepares them anew")
    arrays: dict[str, NDArray[Any]] = load(payload)
    return arrays


def write(key: str, arrays: dict[str, NDArray[np.generic]]) -> None:
    """Keep arrays under ``key``, whole or not at all; files unused for longest make room."""
    from safetensors.numpy import save

    if os.environ.get("LOCAL_RANK", "0") != "0":
        return  # every process of this machine has the same
    payload = save(arrays)
    if len(payload) > MAX_BYTES:
        _say(f"prepared rows are not cached: {len(payload) / 1e9:.1f} GB is more than it may hold")
        return
    path = _path(key)
    try:
        # Rows may be confidential; a shared machine need not see them.
        write_bytes(path, hashlib.sha256(payload).digest() + payload, mode=0o600)
        _make_room(path)
    except OSError as error:
        _say(
            f"warning: prepared rows cannot be cached in {path.parent} ({error.strerror}). Set"
            " HALFBYTE_CACHE to another folder, or data.cache=false"
        )


def _path(key: str) -> Path:
    return folder() / f"{key}.rows"


def _make_room(newest: Path) -> None:
    files = [(path.stat(), path) for path in newest.parent.iterdir() if path != newest]
    total = newest.stat().st_size + sum(stat.st_size for stat, _ in files)
    for stat, path in sorted(files, key=lambda file: file[0].st_mtime):
        if total <= MAX_BYTES:
            return
        path.unlink(missing_ok=True)
        total -= stat.st_size


def _code_sha256() -> str:
    """Of the source of every module beside this one: a change of code never meets an old result."""
    digest = hashlib.sha256()
    modules = resources.files("halfbyte.data").iterdir()
    for module in sorted(modules, key=lambda module: module.name):
        if module.name.endswith(".py"):
            digest.update(f"{module.name}\n".encode() + module.read_bytes())
    return digest.hexdigest()


def _clock(template: str | None) -> list[str] | None:
    """What a template reads off the clock now; None if that cannot be told from its text."""
    text = template or ""
    formats = [found.group(2) for found in CLOCK.finditer(text)]
    if len(CLOCK_NAMED.findall(text)) != len(formats):
        return None
    return [datetime.now().strftime(each) for each in formats]


def _say(line: str) -> None:
    # Beside what a script prints, which may be JSON.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr)
