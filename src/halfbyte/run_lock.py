"""Owns the right to write into a run folder: one command at a time, and nothing in it leads elsewhere."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from halfbyte.errors import RunError, UserError
from halfbyte.faults import what_is_safe
from halfbyte.host import is_main_process
from halfbyte.run_dir import write_json

UNWRITABLE = (
    errno.EACCES,
    errno.EDQUOT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EPERM,
    errno.EROFS,
)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a run folder for the commands in the ``with`` block; the system lets go of it if the process dies.

    The lock lies beside the folder, in ``.locks``, since the folder may be moved aside. Of processes that train
    together only the main one holds it.

    Raises:
        RunError: another process writes there, nothing can be written there, or a link in the folder leads
            out of it.
    """
    if not is_main_process():
        yield
        return
    from filelock import FileLock, Timeout

    folder = folder.absolute()
    locks = folder.parent / ".locks"
    owner, lock = locks / f"{folder.name}.json", FileLock(locks / f"{folder.name}.lock", timeout=0)
    try:
        locks.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        if isinstance(error, Timeout):
            raise RunError(
                f"{folder}: {_holder(owner)} writes here. Wait until it has ended, or stop it; two at a time"
                " would mix their files"
            ) from None
        if getattr(error, "errno", None) in UNWRITABLE:
            raise RunError(
                f"{folder.parent}: cannot be written: {error}. Make room or set runs_dir to another folder"
            ) from error
        print(f"warning: {folder}: no lock can be had here ({error}); start one command at a time")
    try:
        if owner.exists():
            print(f"{folder}: taken over from {_holder(owner)}, which ended without a word")
        check_entries(folder)
        write_json(owner, {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()})
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not isinstance(error, UserError):  # whose messages say how to go on
            error.add_note(what_is_safe(folder))
        raise
    finally:
        with suppress(OSError):
            owner.unlink(missing_ok=True)  # a process that is killed leaves it
        lock.release()


def check_entries(folder: Path) -> None:
    """Check that all in a run folder can be replaced, and that no link leads out of it but those of W&B to its logs.

    Raises:
        RunError: what a run writes or deletes through a link would be somebody else's; or it would notice at its end
            that it cannot.
    """
    home = folder.resolve()
    for place, folders, files in os.walk(folder):
        here = Path(place)
        if here.name == "wandb":
            folders.clear()
            continue
        for path in (here, *(here / name for name in (*folders, *files))):
            if path.is_symlink() and not path.resolve().is_relative_to(home):
                raise RunError(
                    f"{path}: is a link to {path.resolve()}, out of the run folder, where halfbyte neither writes"
                    " nor deletes. Replace it by a folder of its own, or set runs_dir to the disk you want"
                )
            if not (path.is_symlink() or _can_be_replaced(path)):
                raise RunError(
                    f"{path}: cannot be replaced by this user, which would show only at the end. Change its rights"
                    " (chmod, chown, chattr -i), or give the run another folder (name=…, runs_dir=…)"
                )


def _can_be_replaced(path: Path) -> bool:
    """Whether nothing but its owner's wish keeps an entry from being replaced.

    Somebody else's folder cannot be; somebody else's file can, and what its owner has write-protected is left to them.
    """
    if os.access(path, os.W_OK):
        return True
    about = path.stat()
    if not hasattr(os, "geteuid") or os.geteuid() in (0, about.st_uid):
        return (
            not about.st_mode & stat.S_IWUSR
        )  # else it is immutable, or the file system is read-only
    return path.is_file()


def _holder(owner: Path) -> str:
    try:
        who = json.loads(owner.read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']} (since {who['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
