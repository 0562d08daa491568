"""Owns the question whether a disk has room for all that a training writes, before it trains."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from halfbyte.errors import RunError
from halfbyte.model.footprint import num_parameters
from halfbyte.model.load import stored_dtype
from halfbyte.model.precision import DTYPES
from halfbyte.plan.memory import STATES
from halfbyte.train.checkpoints import all_checkpoints
from halfbyte.train.setup import Setup

TRIAL = ".room-{}"
WEIGHT_BYTES = 4  # adapters are trained and saved in fp32
SMALL_FILES_BYTES = 4 << 20  # of a checkpoint: states of the Trainer and of random numbers
TOKENIZER_BYTES = 64 << 20  # at most, beside an adapter
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def make_sure_of_room(setup: Setup, folder: Path) -> str:
    """Check that the disk takes all checkpoints and the adapter; return in words what they and a merge need.

    Args:
        setup: the base with its adapter.
        folder: the run folder.

    Raises:
        RunError: there is too little room.
    """
    run, base = setup.run, setup.loaded.base
    trained = sum(p.numel() for p in setup.model.parameters() if p.requires_grad)
    states, in_8_bits = STATES[run.train.optimizer]
    checkpoint = trained * (WEIGHT_BYTES + states * (1 if in_8_bits else WEIGHT_BYTES))
    # One more than are kept: the oldest goes once the newest is whole.
    kept = len(all_checkpoints(folder / "checkpoints"))
    number = max(1, run.train.keep_checkpoints + 1 - kept) if run.train.save_steps else 0
    sizes = [checkpoint + SMALL_FILES_BYTES] * number
    sizes.append(trained * WEIGHT_BYTES + TOKENIZER_BYTES)
    claim(folder, sizes)
    dtype = stored_dtype(base) if run.merge.dtype == "auto" else DTYPES[run.merge.dtype]
    candidates = 1 if run.model.precision in DTYPES else 2
    merged = candidates * dtype.itemsize * num_parameters(setup.loaded.model)
    free = shutil.disk_usage(folder).free
    return (
        f"{_mb(sum(sizes))} for {number} checkpoints and the adapter can be had; a merge will need {_mb(merged)} of the"
        f" {_mb(free)} that are free"
    )


def claim(folder: Path, sizes: Sequence[int]) -> None:
    """Let the file system set aside files of some sizes in bytes, so that quotas count too, and give them back.

    Raises:
        RunError: there is too little room.
    """
    files = [folder / TRIAL.format(number) for number in range(len(sizes))]
    try:
        if sum(sizes) > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if hasattr(os, "posix_fallocate"):
            for path, size in zip(files, sizes, strict=True):
                _set_aside(path, size)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise RunError(
            f"{folder}: checkpoints and adapter need {_mb(sum(sizes))}, and the disk does not take them"
            f" ({error.strerror}; {_mb(shutil.disk_usage(folder).free)} are free). Make room, set"
            " train.keep_checkpoints=1, or set runs_dir to another disk"
        ) from None
    finally:
        for path in files:
            path.unlink(missing_ok=True)


def _set_aside(path: Path, size: int) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in FULL:  # other errors: this file system cannot set space aside
            raise
    finally:
        os.close(descriptor)


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
