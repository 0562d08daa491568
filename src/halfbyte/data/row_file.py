"""Owns files of rows: appended one after another, read back by their number; and the folders they are in."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import weakref
from array import array
from pathlib import Path
from typing import IO, Any

from halfbyte.data.conversation import Message, Row, message_from_json

PREFIX = "halfbyte-rows-"  # of folders that are not in the cache
LEFT_SECONDS = 2 * 24 * 3600  # after which a folder that nobody completed is deleted
BUFFER_BYTES = 1 << 20
MAX_KEPT_BYTES = 1 << 26  # of rows that are also held in memory while they are prepared


class Blob:
    """Bytes in a file: appended to the end, and read back from any place.

    Nothing is mapped into memory, so that what was read once does not stay there.

    Args:
        path: the file.
        new: whether it is written, and does not exist; else it is only read.
    """

    def __init__(self, path: Path, *, new: bool) -> None:
        self._path = path
        self._file: IO[bytes] = path.open("xb+" if new else "rb", buffering=0)
        self._pending: list[bytes] = []
        self._num_pending = 0

    def append(self, content: bytes) -> None:
        """Add bytes to the end."""
        self._pending.append(content)
        self._num_pending += len(content)
        if self._num_pending > BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was appended."""
        left = memoryview(b"".join(self._pending))
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:  # of a file that is open, the system names none
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self._pending, self._num_pending = [], 0

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes from ``start`` to ``end``."""
        if self._pending:
            self.flush()
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), end - start, start)
        self._file.seek(start)  # on Windows, where processes do not share the offset
        return self._file.read(end - start)

    def sha256(self) -> str:
        """Return the sha256 of the whole file."""
        self.flush()
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()  # type: ignore[arg-type]


class Scratch:
    """A folder for rows that are being prepared, deleted when it is no longer used, or kept.

    Args:
        parent: where to make it; None, or a folder that cannot be written, for that of temporary files.

    Attributes:
        path: the folder.
        fault: why it is not in ``parent``, "" if it is or if there is none.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self.fault, made = "", None
        if parent is not None:
            try:
                parent.mkdir(parents=True, exist_ok=True)
                made = tempfile.mkdtemp(prefix=".", dir=parent)
            except OSError as error:
                self.fault = error.strerror or str(error)
        if made is None:
            delete_left(Path(tempfile.gettempdir()), f"{PREFIX}*")
        self.path = Path(made or tempfile.mkdtemp(prefix=PREFIX))
        self._finalizer = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def keep_as(self, path: Path) -> None:
        """Move the folder, which is no longer deleted then.

        Raises:
            OSError: it cannot be moved.
        """
        self.path = self.path.rename(path)
        self._finalizer.detach()


def delete_left(parent: Path, pattern: str) -> None:
    """Delete folders that a process that was killed has left there."""
    for left in parent.glob(pattern):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


class RowFile:
    """Rows in a file.

    Args:
        path: the file.
        starts: the offset of each row and of the end as 64-bit integers, of a file that is written already.
    """

    def __init__(self, path: Path, starts: bytes | None = None) -> None:
        self._blob = Blob(path, new=starts is None)
        self.starts = array("Q", [0] if starts is None else starts)
        self._kept: list[Row] | None = [] if starts is None else None

    def append(self, row: Row) -> None:
        """Add a row."""
        messages = [
            [message.role, message.content]
            if message.learnt and message.is_plain
            else message.as_json()
            for message in row.messages
        ]
        record: list[Any] = [row.place, messages, row.text]
        if row.tools or row.weight != 1:
            record += [row.tools, row.weight]
        content = _encode(record).encode("utf-8", "surrogatepass")  # of a file's name
        self._blob.append(content)
        self.starts.append(self.starts[-1] + len(content))
        if self._kept is not None:
            self._kept.append(row)
            if self.starts[-1] > MAX_KEPT_BYTES:
                self.release()

    def release(self) -> None:
        """Hold no rows in memory any longer, as few rows are until then."""
        self._kept = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> Row:
        """Return a row."""
        if self._kept is not None:
            return self._kept[number]
        return _decode(self._blob.read(self.starts[number], self.starts[number + 1]))

    def sha256(self) -> str:
        """Return the sha256 of the file."""
        return self._blob.sha256()


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _decode(content: bytes) -> Row:
    place, messages, text, *rest = json.loads(content)
    turns = [
        Message(*message) if isinstance(message, list) else message_from_json(message)
        for message in messages
    ]
    return Row(place, tuple(turns), text, *rest)
