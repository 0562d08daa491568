"""A power cut: of the files below a folder only that remains which was flushed, and the names that were.

``watch`` runs in the process that is to lose power. At each flush of a file it keeps a copy of its content, at each
flush of a folder the names in it; a deleted or replaced file or folder is moved away, so that no number of it (inode)
is used again. ``cut_power`` then lays out what a disk may hold that was never told to write the rest.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any


class Watched:
    """The calls of a process that change files below a folder, recorded in another folder."""

    def __init__(self, root: Path, kept: Path, die_at: int) -> None:
        self.root, self.kept, self.die_at = root, kept, die_at
        self.num_flushes = self.num_moved = 0
        self.flush, self.rename, self.replace = os.fsync, os.rename, os.replace
        self.unlink, self.rmdir = os.unlink, os.rmdir

    def below(self, path: Any, folder: int | None = None) -> Path | None:
        """Return the absolute path of a file below the folder, or None."""
        start = Path(os.readlink(f"/proc/self/fd/{folder}")) if folder is not None else Path.cwd()
        place = Path(os.path.abspath(start / path))
        return place if place.is_relative_to(self.root) else None

    def on_flush(self, file: Any) -> None:
        """Keep what is flushed; at the last flush kill the process."""
        number = file if isinstance(file, int) else file.fileno()
        self.flush(number)
        path = self.below(os.readlink(f"/proc/self/fd/{number}"))
        if path is None:
            return
        inode = os.fstat(number).st_ino
        if path.is_dir():
            names = {entry.name: [entry.inode(), entry.is_dir()] for entry in os.scandir(path)}
            (self.kept / f"names-{inode}").write_text(json.dumps(names))
        else:
            shutil.copyfile(f"/proc/self/fd/{number}", self.kept / f"content-{inode}")
        self.num_flushes += 1
        if self.num_flushes == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def put_away(self, path: Path) -> None:
        """Move something that is deleted, so that its inode is not used again."""
        self.num_moved += 1
        self.rename(path, self.kept / f"moved-{self.num_moved}")

    def on_unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        """Put a deleted file away."""
        place = self.below(path, dir_fd)
        if place:
            self.put_away(place)
        else:
            self.unlink(path, dir_fd=dir_fd)

    def on_rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        """Put a deleted folder away."""
        place = self.below(path, dir_fd)
        if place and not os.listdir(place):
            self.put_away(place)
        else:
            self.rmdir(path, dir_fd=dir_fd)

    def on_move(self, real: Any, old: Any, new: Any, **options: Any) -> None:
        """Put away the file that is replaced."""
        target = self.below(new)
        if target and target.is_file():
            self.put_away(target)
        real(old, new, **options)


def watch(root: Path, kept: Path, die_at: int) -> None:
    """Record flushes below ``root`` in ``kept``, and kill this process at the flush of this number."""
    watched = Watched(root, kept, die_at)
    os.fsync = watched.on_flush  # type: ignore[assignment]
    os.unlink = os.remove = watched.on_unlink
    os.rmdir = watched.on_rmdir
    os.rename = partial(watched.on_move, os.rename)
    os.replace = partial(watched.on_move, os.replace)


def cut_power(root: Path, kept: Path, mode: str) -> None:
    """Leave below ``root`` what a disk holds after a power cut.

    Args:
        root: the folder that was watched.
        kept: what was recorded of it.
        mode: ``dropped``: names and contents that were not flushed are gone; ``torn``: of contents a half is there;
            ``named``: all names are there, and contents that were not flushed are empty.
    """
    after = root.with_name(f"{root.name}-after")
    after.mkdir()
    lay_out(root.stat().st_ino, root, after, kept, mode)
    shutil.rmtree(root)
    after.rename(root)


def lay_out(number: int, now: Path | None, target: Path, kept: Path, mode: str) -> None:
    """Fill a folder with what remains of the one with this inode, which is at ``now`` if it still has a name."""
    flushed = kept / f"names-{number}"
    names: dict[str, list[Any]] = json.loads(flushed.read_text()) if flushed.is_file() else {}
    if mode == "named" and now is not None:
        names = {entry.name: [entry.inode(), entry.is_dir()] for entry in os.scandir(now)}
    for name, (inode, is_folder) in names.items():
        here = now / name if now is not None and (now / name).exists() else None
        if is_folder:
            (target / name).mkdir()
            lay_out(inode, here, target / name, kept, mode)
            continue
        content = kept / f"content-{inode}"
        if content.is_file():
            shutil.copyfile(content, target / name)
        elif mode == "torn" and here is not None:
            whole = here.read_bytes()
            (target / name).write_bytes(whole[: len(whole) // 2])
        else:
            (target / name).write_bytes(b"")
