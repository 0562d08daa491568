"""Owns records: the JSON files of a run folder, each with a frozen type, one reader and a version."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic import Field as Field

from halfbyte.errors import RunError
from halfbyte.run_dir import read_json, write_json

DIGEST = "digest"  # the key of a sealed record's digest


class RecordPart(BaseModel):
    """A frozen part of a record; unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    def as_json(self) -> dict[str, Any]:
        """Return plain values under the names used in the file."""
        return self.model_dump(mode="json", by_alias=True)


class Record(RecordPart):
    """A JSON file of a run folder.

    Attributes:
        version: version of the file's format; 0 in files written before versions were introduced.

    A class that is ``SEALED`` writes a digest of the content, and a file that lost it or differs is refused.
    """

    NEWEST: ClassVar[int] = 1
    SEALED: ClassVar[bool] = False
    version: int = 0

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file written by any known version of halfbyte.

        Raises:
            RunError: the file is missing or damaged, has an unknown version, or lacks fields.
        """
        return cls.of(read_json(path), path)

    @classmethod
    def of(cls, content: Any, path: Path) -> Self:
        """Build the record from the content of a file.

        Raises:
            RunError: in the same cases as ``read``.
        """
        digest = content.get(DIGEST) if isinstance(content, dict) else None
        version = content.get("version", 0) if isinstance(content, dict) else 0
        if not isinstance(version, int) or not 0 <= version <= cls.NEWEST:
            raise RunError(
                f"{path}: is of version {version!r}, and this halfbyte reads versions 0 to {cls.NEWEST}."
                " Read the run with the halfbyte that wrote it, or update this one"
            )
        is_sealed = isinstance(content, dict) and (version == cls.NEWEST or DIGEST in content)
        if cls.SEALED and is_sealed:
            content = {key: value for key, value in content.items() if key != DIGEST}
            if digest != _digest(content):
                raise RunError(
                    f"{path}: differs from what was written: it is damaged, or was changed by hand. Put back"
                    " the file, or make it again with the command that wrote it"
                )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, fault['loc'])) or 'the file'}: {fault['msg'].lower()}"
                for fault in error.errors()[:3]
            )
            raise RunError(
                f"{path}: is not a whole {cls.__name__} ({faults}). Make the file again with the command"
                " that wrote it"
            ) from None

    def write(self, path: Path) -> None:
        """Write the file atomically, in the newest version."""
        content = {**self.as_json(), "version": self.NEWEST}
        write_json(path, content | ({DIGEST: _digest(content)} if self.SEALED else {}))


def _digest(content: dict[str, Any]) -> str:
    """Return the hex sha256 of a record's content, whatever the order of its keys."""
    as_read = json.loads(json.dumps(content))  # in which keys are texts
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


class ProvenRecord(Record):
    """A record with the code and the machine that made it.

    Attributes:
        halfbyte: version of halfbyte; ``commit`` is its commit.
        libraries: versions of the libraries.
    """

    halfbyte: str = ""
    commit: str | None = None
    libraries: dict[str, str | None] = Field(default_factory=dict)
    python: str = ""
    platform: str = ""
