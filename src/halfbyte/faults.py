"""Owns faults of the machine: which errors mean that a disk, a file or memory failed, in words and with a remedy."""

from __future__ import annotations

import errno
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

STARTED = time.time()  # of this process, but for its first imports
RUNNING: list[str] = []  # the command that this process runs, and the words that follow it
SEAL = "checkpoint.json"  # the last file of a checkpoint
REMEDIES = {
    errno.ENOSPC: "the disk is full; make room",
    errno.EDQUOT: "the disk quota is used up; make room",
    errno.EFBIG: "the file is larger than is allowed here (ulimit -f); raise the limit",
    errno.EROFS: "the file system is read-only; mount it for writing, or use a folder elsewhere",
    errno.EACCES: "this user may not write or read it; change its rights, or use a folder elsewhere",
    errno.EPERM: "this user may not change it; change its rights (chmod, chattr -i), or use a folder elsewhere",
    errno.EIO: "the disk cannot be read or written; look at the system's log",
    errno.ENOENT: "it has vanished; put it back",
    errno.ENOTDIR: "a folder of its path has become a file; put it back",
    errno.EISDIR: "a folder has taken its place; move that away",
    errno.ESTALE: "the network drive has lost it; mount it again",
    errno.ETIMEDOUT: "the network drive does not answer",
    errno.EMFILE: "too many files are open; raise ulimit -n",
    errno.ENFILE: "too many files are open on this machine",
    errno.ENAMETOOLONG: "the name is longer than the file system allows; choose a shorter one",
    errno.ELOOP: "its links lead in a circle; remove them",
}
# How libraries in Rust and in C++ pass on what the system said.
QUOTED_ERRNO = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")
QUOTED_TEXT = re.compile("strerror: (.+)")
# PyTorch's words where a folder has vanished.
GONE = re.compile(r"Parent directory (.+) does not exist")
SHORT_WRITES = ("PytorchStreamWriter failed", "unexpected pos", "iostream error", "fwrite")
KILLED_WORKERS = ("BrokenProcessPool", "terminated abruptly", "is killed by signal")
# Texts in the messages of allocators that raise a plain RuntimeError: PyTorch's on Linux and Windows,
# CUDA's, HIP's and MPS's, and those of their libraries (cuBLAS, cuDNN, cuSOLVER).
OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "STATUS_ALLOC_FAILED",
)
MORE_MEMORY = (
    "Use a smaller train.micro_batch_size, train.checkpointing=on, a shorter data.max_length, or"
    " eval.batch_size when comparing"
)


def machine_fault(error: BaseException) -> str:
    """Return in words what failed outside the program, with a remedy, or "" if an error means something else."""
    if is_out_of_memory(error):
        return f"the device ran out of memory: {error}\n{MORE_MEMORY}"
    for cause in _causes(error):
        text = f"{type(cause).__name__}: {cause}"
        number = _errno(cause, text)
        if number is not None:
            place = getattr(cause, "filename", None)
            return f"{f'{place}: ' if place else ''}{REMEDIES[number]} ({os.strerror(number)})"
        if gone := GONE.search(text):
            return f"{gone.group(1)}: {REMEDIES[errno.ENOENT]}"
        if any(part in text for part in SHORT_WRITES):
            return f"a file could not be written whole; make room on the disk ({cause})"
        if any(part in text for part in KILLED_WORKERS):
            return (
                f"the system has killed one of this command's processes, most often for memory ({cause})."
                f" {MORE_MEMORY}"
            )
    return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or one that it was raised from, means that memory ran out."""
    # torch.OutOfMemoryError is matched by name, to avoid importing torch here.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_TEXTS):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def what_is_safe(folder: Path) -> str:
    """Return what of a run is whole on the disk, and the command that goes on."""
    newest = [f"checkpoint-{step}" for step in sealed_steps(folder)[-1:]]
    parts = {"adapter": "adapter_config.json", "merged": "merge_report.json"}
    parts |= {"export": "export_report.json", "eval": "report.json"}
    kept = newest + [name for name, file in parts.items() if (folder / name / file).is_file()]
    safe = f"whole in {folder}: {', '.join(kept)}" if kept else f"{folder} holds nothing whole yet"
    return f"{safe}. Go on with: {_way_on(folder)}"


def _way_on(folder: Path) -> str:
    config = folder / "run.yaml"
    several = any(word.partition("=")[0] == "--seeds" for word in RUNNING)
    is_ours = config.is_file() and config.stat().st_mtime > STARTED
    if RUNNING[:1] == ["train"] and is_ours and not several:
        return train_command(config)
    return this_command()


def train_command(config: Path, *settings: str) -> str:
    """Return the command that trains a config, or goes on with a run's ``run.yaml``, as this process does."""
    count = os.environ.get("WORLD_SIZE", "1")
    processes = ["--processes", count] if count != "1" else []
    return shlex.join(["halfbyte", "train", *processes, str(config), *settings])


def sealed_steps(folder: Path) -> list[int]:
    """Return the steps of a run's checkpoints that were written to their end, in order."""
    seals = folder.glob(f"checkpoints/checkpoint-*/{SEAL}")
    return sorted(int(seal.parent.name.rpartition("-")[2]) for seal in seals)


def this_command() -> str:
    """Return the command line of this process, as its user would repeat it."""
    return shlex.join(["halfbyte", *RUNNING] if RUNNING else ["python", *sys.argv])


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _errno(error: BaseException, text: str) -> int | None:
    """Return the number of the system's error, if it is one that has a remedy."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (quoted := QUOTED_ERRNO.search(text)):
        number = int(quoted.group(1) or quoted.group(2))
    if number is None and (quoted := QUOTED_TEXT.search(text)):
        number = next((n for n in REMEDIES if os.strerror(n) == quoted.group(1)), None)
    return number if number in REMEDIES else None
