"""Owns checkpoints: each is complete or not there, and it is verified before a training goes on from it.

The Trainer writes into ``.staged/``, where nobody looks. What it wrote is flushed to the disk, read back and hashed;
the seal with the digests comes last, and a rename makes the checkpoint visible. Older ones are deleted only after
that. A power cut, a full disk or a kill at any moment leaves the checkpoint before.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.errors import RunError
from halfbyte.faults import SEAL as SEAL
from halfbyte.record import Field, Record
from halfbyte.run_dir import (
    LIBRARIES,
    digests,
    file_sha256,
    flush_folder,
    library_version,
    replace_folder,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

STAGED = ".staged"
PICKLED = "training_args.bin"  # the Trainer's arguments, which nobody reads back


class Seal(Record):
    """What a whole checkpoint consists of.

    Attributes:
        step: optimizer steps that are done.
        processes: how many processes trained; each has its random state and its share of the rows.
        libraries: versions of the libraries that wrote it.
        sha256: digest of each of its files, by name.
    """

    SEALED = True
    step: int
    processes: int
    libraries: dict[str, str | None] = Field(default_factory=dict)
    sha256: dict[str, str]


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name, or -1."""
    number = re.search(r"-(\d+)$", path.name)
    return int(number.group(1)) if number else -1


def all_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest first."""
    return sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True)


@contextmanager
def staged(folder: Path, step: int, number: int, processes: Accelerator) -> Iterator[None]:
    """Commit what all processes write into ``.staged/checkpoint-<step>`` within the ``with`` block.

    A checkpoint of step 0 is sealed there, and not committed.

    Args:
        folder: the folder of all checkpoints.
        step: optimizer steps that are done.
        number: how many checkpoints to keep.
        processes: those that train together; the main one commits.
    """
    if processes.is_main_process:
        stage(folder)
    processes.wait_for_everyone()
    yield
    processes.wait_for_everyone()
    if processes.is_main_process:
        written = folder / STAGED / f"checkpoint-{step}"
        if step:
            commit(written, folder, processes.num_processes)
            keep_newest(folder, number)
        else:
            seal(written, processes.num_processes)


def stage(folder: Path) -> Path:
    """Return an empty folder to write a checkpoint into; what an earlier attempt left there goes."""
    staged = folder / STAGED
    if staged.exists():
        shutil.rmtree(staged)
    staged.mkdir(parents=True)
    return staged


def commit(written: Path, folder: Path, processes: int) -> None:
    """Seal a checkpoint that is wholly written, and make it visible in ``folder``.

    Args:
        written: ``.staged/checkpoint-<step>``.
        folder: the folder of all checkpoints.
        processes: how many processes trained.
    """
    seal(written, processes)
    replace_folder(written, folder / written.name)


def seal(written: Path, processes: int) -> None:
    """Flush, read back and hash the files of a written checkpoint, and record what it consists of."""
    (written / PICKLED).unlink(missing_ok=True)
    versions = {name: library_version(name) for name in LIBRARIES}
    record = Seal(
        step=step_of(written), processes=processes, libraries=versions, sha256=digests(written)
    )
    record.write(written / SEAL)


def keep_newest(folder: Path, number: int) -> None:
    """Delete all but the newest checkpoints; of a link only the link."""
    for path in all_checkpoints(folder)[number:]:
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)
    flush_folder(folder)


def newest_checkpoint(folder: Path, processes: int) -> Path | None:
    """Return the newest checkpoint that is whole, and print which ones are passed over and why.

    Raises:
        RunError: there are checkpoints, but none is whole; or it belongs to another number of processes.
    """
    faults = []
    for path in all_checkpoints(folder):
        fault = fault_of(path)
        if fault:
            print(f"warning: {path} is passed over: {fault}")
            faults.append(f"{path.name}: {fault}")
            continue
        seal = Seal.read(path / SEAL)
        _check_processes(path, seal, processes)
        _warn_of_libraries(path, seal)
        return path
    if faults:
        raise RunError(
            f"{folder}: none of its checkpoints is whole: {'; '.join(faults)}. Put back what is missing, or"
            " start over with train.existing=replace, which moves the run aside"
        )
    return None


def fault_of(path: Path) -> str:
    """Return why a checkpoint is not the one that was written, or ""."""
    if path.is_symlink():
        return "it is a link"
    if not (path / SEAL).is_file():
        return f"it has no {SEAL}: it is not complete, or from a version before 0.2"
    try:
        seal = Seal.read(path / SEAL)
    except RunError as error:
        return str(error)
    if seal.step != step_of(path):
        return f"it is that of step {seal.step}"
    present = {p.relative_to(path).as_posix() for p in path.rglob("*") if not p.is_dir()} - {SEAL}
    for what, names in (
        ("is missing", seal.sha256.keys() - present),
        ("was not written with it", present - seal.sha256.keys()),
    ):
        if names:
            return f"{', '.join(sorted(names))} {what}"
    changed = [name for name, digest in seal.sha256.items() if file_sha256(path / name) != digest]
    return f"{', '.join(changed)}: cut short or changed since it was written" if changed else ""


def _check_processes(path: Path, seal: Seal, processes: int) -> None:
    if seal.processes != processes:
        raise RunError(
            f"{path}: was written by {seal.processes} processes, and {processes} are to go on. Order of rows and"
            f" random states belong to their number: go on with --num_processes {seal.processes}, or start over"
            " with train.existing=replace"
        )


def _warn_of_libraries(path: Path, seal: Seal) -> None:
    changed = [
        f"{name} {before} → {now}"
        for name, before in seal.libraries.items()
        if (now := library_version(name)) != before
    ]
    if changed:
        print(
            f"warning: {path} was written with other libraries, whose sums may differ: {', '.join(changed)}"
        )
