"""Owns digests of large files: all bytes are read once, and the digest is kept by the file's inode, size and time."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sys
from pathlib import Path

from halfbyte.run_dir import cache_dir, file_sha256, write_text

KEPT_BYTES = 64 << 20  # smaller files are read again
SAID_BYTES = 1 << 30


def known_sha256(path: Path) -> str:
    """Return the hex sha256 of a file, from the cache if the file is the one that was read before."""
    about = path.stat()
    key = f"{about.st_dev} {about.st_ino} {about.st_size} {about.st_mtime_ns}"
    return file_sha256(path) if about.st_size < KEPT_BYTES else _known(path, key, about.st_size)


@functools.cache
def _known(path: Path, key: str, size: int) -> str:
    kept = cache_dir() / "digests" / hashlib.sha256(key.encode()).hexdigest()[:32]
    digest, _, check = (
        kept.read_text(encoding="utf-8").partition(" ") if kept.is_file() else [""] * 3
    )
    if digest and check == _check(key, digest):
        return digest
    if size >= SAID_BYTES:
        print(
            f"reading all of {path.name}, {size / 1e9:.1f} GB, for its sha256 (once)",
            file=sys.stderr,
        )
    digest = file_sha256(path)
    with contextlib.suppress(OSError):  # without a cache it is read again the next time
        write_text(kept, f"{digest} {_check(key, digest)}")
    return digest


def _check(key: str, digest: str) -> str:
    """Return what tells a kept digest from a damaged one."""
    return hashlib.sha256(f"{key} {digest}".encode()).hexdigest()[:16]
