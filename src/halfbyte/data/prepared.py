"""Owns prepared rows: the samples of each part with their ledger."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.config.dataset import Data
from halfbyte.data.ledger import Ledger
from halfbyte.data.samples import SampleFile, Samples
from halfbyte.run_dir import file_sha256

PARTS = ("train", "validation", "test")
NO_LENGTHS = np.zeros(0, dtype=np.int64)


@dataclass
class Prepared:
    """Everything that a run is trained and measured on.

    Attributes:
        train: samples to train on, those of one epoch.
        validation: samples held out for the loss during training.
        test: samples held out for the comparison.
        ledger: what happened to every row that was read; see ``Ledger``.
        formats: the format of each source.
        full_lengths: tokens of each training sample before any is dropped for its length or truncated.
    """

    train: Samples
    validation: Samples
    test: Samples
    ledger: Ledger
    formats: dict[str, str] = field(default_factory=dict)
    full_lengths: NDArray[np.int64] = field(default_factory=lambda: NO_LENGTHS)

    def __eq__(self, other: object) -> bool:
        """Return whether the other has equal samples and an equal ledger."""
        return isinstance(other, Prepared) and all(
            np.array_equal(getattr(self, name), getattr(other, name))
            if name == "full_lengths"
            else getattr(self, name) == getattr(other, name)
            for name in self.__dataclass_fields__
        )


def empty_shares(prepared: Prepared, data: Data) -> list[str]:
    """Return a line for each share of rows to be held out that holds out none."""
    return [
        f"data.{name}_frac {share:g} of {sum(prepared.ledger.rows_in.values())} rows holds out none; raise"
        " it, or name rows of their own with data.test"
        for name, share in (("validation", data.validation_frac), ("test", data.test_frac))
        if share > 0 and not getattr(prepared, name)
    ]


def write_prepared(prepared: Prepared, folder: Path) -> None:
    """Complete the folder of the samples' file, so that ``read_prepared`` restores equal rows.

    Raises:
        OSError: the folder cannot be written.
    """
    file = prepared.train.file
    arrays: dict[str, Any] = {name: getattr(prepared, name).numbers for name in PARTS}
    arrays |= {"full_lengths": prepared.full_lengths, **file.arrays()}
    with (folder / "numbers.npz").open("xb") as stream:
        np.savez(stream, **arrays)
    meta = {
        "ledger": prepared.ledger.as_json(),
        "formats": prepared.formats,
        "sha256": {**file.sha256(), "numbers.npz": file_sha256(folder / "numbers.npz")},
    }
    content = json.dumps(meta).encode()
    digest = hashlib.sha256(content).hexdigest().encode()
    (folder / "meta.json").write_bytes(digest + b"\n" + content)


def read_prepared(folder: Path) -> Prepared | None:
    """Restore the prepared rows of a folder; None if it is damaged."""
    try:
        digest, _, content = (folder / "meta.json").read_bytes().partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() != digest:
            return None
        meta = json.loads(content)
        if any(file_sha256(folder / name) != digest for name, digest in meta["sha256"].items()):
            return None
        with np.load(folder / "numbers.npz") as stored:
            arrays = dict(stored)
        file = SampleFile.read(folder, arrays)
        train, validation, test = (Samples(file, arrays[name]) for name in PARTS)
        ledger = Ledger.model_validate(meta["ledger"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return Prepared(train, validation, test, ledger, meta["formats"], arrays["full_lengths"])
