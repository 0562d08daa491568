"""Owns records: the JSON files of a run folder, each with a frozen type, one reader and a version."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic import Field as Field

from halfbyte.errors import RunError
from halfbyte.run_dir import read_json, write_json


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
    """

    NEWEST: ClassVar[int] = 1
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
        version = content.get("version", 0) if isinstance(content, dict) else 0
        if not isinstance(version, int) or not 0 <= version <= cls.NEWEST:
            raise RunError(
                f"{path}: is of version {version!r}, and this halfbyte reads versions 0 to {cls.NEWEST}."
                " Read the run with the halfbyte that wrote it, or update this one"
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
        write_json(path, {**self.as_json(), "version": self.NEWEST})


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
