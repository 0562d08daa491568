"""Owns the question whether a disk has room for all that a training writes, before it trains."""

from __future__ import annotations

import ctypes
import errno
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from halfbyte.errors import RunError
from halfbyte.model.footprint import num_parameters
from halfbyte.model.load import stored_dtype
from halfbyte.model.precision import DTYPES
from halfbyte.plan.memory import state_bytes
from halfbyte.train.arguments import num_steps
from halfbyte.train.checkpoints import all_checkpoints
from halfbyte.train.setup import Setup

TRIAL = ".room-"
WEIGHT_BYTES = 4  # adapters are trained and saved in fp32
SMALL_FILES_BYTES = 4 << 20  # of a checkpoint: states of the Trainer and of random numbers
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def make_sure_of_room(setup: Setup, folder: Path, done: int = 0) -> str:
    """Check that the disk takes all checkpoints and the adapter; return in words what they and a merge need.

    Args:
        setup: the base with its adapter.
        folder: the run folder.
        done: optimizer steps that are done.

    Raises:
        RunError: there is too little room.
    """
    run, base = setup.run, setup.loaded.base
    trained = [p for p in setup.model.parameters() if p.requires_grad]
    weights = sum(WEIGHT_BYTES * p.numel() for p in trained)
    states = sum(state_bytes(run.train.optimizer, tuple(p.shape)) for p in trained)
    tokenizer = sum(path.stat().st_size for path in Path(base.path).glob("token*"))
    number = _num_checkpoints(setup, folder, done)
    sizes = [weights + states + tokenizer + SMALL_FILES_BYTES] * number + [weights + tokenizer]
    claim(folder, sizes)
    dtype = stored_dtype(base) if run.merge.dtype == "auto" else DTYPES[run.merge.dtype]
    candidates = 1 if run.model.precision in DTYPES else 2
    merged = candidates * dtype.itemsize * num_parameters(setup.loaded.model)
    free = shutil.disk_usage(folder).free
    return (
        f"{_mb(sum(sizes))} for {number} checkpoints and the adapter can be had; a merge will need {_mb(merged)} of the"
        f" {_mb(free)} that are free"
    )


def _num_checkpoints(setup: Setup, folder: Path, done: int) -> int:
    """Return how many checkpoints will be on the disk at a time that are not there yet."""
    train = setup.run.train
    if not train.save_steps:
        return 0
    to_come = math.ceil((num_steps(setup.run, len(setup.train)) - done) / train.save_steps) + 1
    # One more than are kept: the oldest goes once the newest is whole.
    most = train.keep_checkpoints + 1 - len(all_checkpoints(folder / "checkpoints"))
    return max(1, min(most, to_come))


def claim(folder: Path, sizes: Sequence[int]) -> None:
    """Let the file system set aside files of some sizes in bytes, so that quotas count too, and give them back.

    Raises:
        RunError: there is too little room.
    """
    for path in folder.glob(f"{TRIAL}*"):  # of a process that was killed
        path.unlink()
    files = [folder / f"{TRIAL}{number}" for number in range(len(sizes))]
    about = shutil.disk_usage(folder)
    try:
        if (
            about.total and sum(sizes) > about.free
        ):  # some mounted drives say that they have nothing at all
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for path, size in zip(files, sizes, strict=True):
            _set_aside(path, size)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise RunError(
            f"{folder}: checkpoints and adapter need {_mb(sum(sizes))}, and the disk does not take them"
            f" ({error.strerror}; {_mb(about.free)} are free). Make room, set train.keep_checkpoints=1, or set runs_dir"
            " to another disk"
        ) from None
    finally:
        for path in files:
            path.unlink(missing_ok=True)


def _set_aside(path: Path, size: int) -> None:
    """Give a new file its room; nothing happens on systems and disks that cannot."""
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        number = _fallocate(descriptor, size)
    finally:
        os.close(descriptor)
    if number in FULL:
        raise OSError(number, os.strerror(number))


def _fallocate(descriptor: int, size: int) -> int:
    """Call Linux's own fallocate, and return the number of its error.

    ``posix_fallocate`` would write into every block where a file system lacks it.
    """
    if not sys.platform.startswith("linux"):
        return 0
    library = ctypes.CDLL(None, use_errno=True)
    failed = library.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size))
    return ctypes.get_errno() if failed else 0


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
