"""Owns records: JSON files that a run folder keeps, each a frozen type with one reader and a version."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic import Field as Field

from halfbyte.errors import RunError
from halfbyte.run_dir import read_json, write_json


class RecordPart(BaseModel):
    """A frozen part of a record; fields that it does not know are left out."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values, by the names that the file has."""
        return self.model_dump(mode="json", by_alias=True)


class Record(RecordPart):
    """A JSON file of a run folder.

    Attributes:
        version: of the file's format; 0 in files that were written before there were versions.
    """

    NEWEST: ClassVar[int] = 1
    version: int = 0

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file that some version of halfbyte wrote.

        Raises:
            RunError: it is missing, damaged, of a version that is not known here, or lacks fields.
        """
        return cls.of(read_json(path), path)

    @classmethod
    def of(cls, content: Any, path: Path) -> Self:
        """Read the content of a file.

        Raises:
            RunError: as ``read``.
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
    """A record that says which code made it, on what.

    Attributes:
        halfbyte: its version, and ``commit`` its commit.
        libraries: their versions.
    """

    halfbyte: str = ""
    commit: str | None = None
    libraries: dict[str, str | None] = Field(default_factory=dict)
    python: str = ""
    platform: str = ""
