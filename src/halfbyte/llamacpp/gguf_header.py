"""Owns parsing the header of a GGUF file: its metadata, and the shapes and types of its tensors.

The package gguf builds an object for each entry of the vocabulary, which takes seconds; this module skips
arrays of text. A tensor's size is the distance to the next one, its padding included, so newer tensor types
need no support here.
Source, for facts only: docs/gguf.md of ggml, version 3 of the format (version 2 has the same layout).
"""

from __future__ import annotations

import itertools
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from halfbyte.errors import PlanError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
MAX_DEPTH = 4  # of arrays in arrays


@dataclass(frozen=True)
class Header:
    """Holds what a file says before its tensors.

    Attributes:
        metadata: values by key, without arrays of text and arrays of arrays.
        tensor_bytes: the bytes of each tensor in the file.
        shapes: the shape of each tensor, the row length first.
    """

    metadata: dict[str, Any]
    tensor_bytes: dict[str, int]
    shapes: dict[str, tuple[int, ...]]


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file.

    Raises:
        PlanError: there is no such file, it is not GGUF of version 2 or 3, or it is cut short.
    """
    try:
        with path.open("rb") as file:
            return _read(file, path)
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}") from error
    except (
        struct.error,
        UnicodeDecodeError,
        KeyError,
        TypeError,
        ZeroDivisionError,
        EOFError,
    ) as error:
        raise PlanError(f"{path}: its header is broken or cut short") from error


def _read(file: BinaryIO, path: Path) -> Header:
    if file.read(4) != MAGIC:
        raise PlanError(f"{path}: is not a GGUF file; those begin with the letters GGUF")
    version = _scalar(file, "I")
    if version not in VERSIONS:
        raise PlanError(f"{path}: is GGUF version {version}; versions 2 and 3 are supported")
    num_tensors, num_values = _scalar(file, "Q"), _scalar(file, "Q")
    metadata: dict[str, Any] = {}
    for _ in range(_count(file, num_values)):
        key = _text(file)
        value = _value(file, _scalar(file, "I"))
        if value is not None:
            metadata[key] = value
    shapes, offsets = {}, {}
    for _ in range(_count(file, num_tensors)):
        name = _text(file)
        num_dims = _count(file, _scalar(file, "I"), 8)
        shapes[name] = struct.unpack(f"<{num_dims}Q", file.read(8 * num_dims))
        _scalar(file, "I")  # skip the type
        offsets[name] = _scalar(file, "Q")
    alignment = metadata.get("general.alignment", ALIGNMENT)
    start = -(-file.tell() // alignment) * alignment
    ends = sorted(offsets.values())
    ends.append(path.stat().st_size - start)
    if not offsets or ends[-1] <= ends[-2]:
        raise PlanError(
            f"{path}: is cut short: the tensors that its header names are not all there"
        )
    next_offset = dict(itertools.pairwise(ends))
    sizes = {name: next_offset[offset] - offset for name, offset in offsets.items()}
    return Header(metadata, sizes, shapes)


def _count(file: BinaryIO, number: int, item_bytes: int = 1) -> int:
    """Return a number of items that follow, if the file is long enough for them."""
    if number * item_bytes > os.fstat(file.fileno()).st_size - file.tell():
        raise EOFError
    return number


def _value(file: BinaryIO, kind: int, depth: int = 0) -> Any:
    if kind == STRING:
        return _text(file)
    if kind != ARRAY:
        return _scalar(file, SCALARS[kind])
    element, count = _scalar(file, "I"), _scalar(file, "Q")
    if element == STRING:
        for _ in range(_count(file, count)):
            file.seek(_count(file, _scalar(file, "Q")), 1)
        return None
    if element == ARRAY:
        if depth == MAX_DEPTH:
            raise EOFError
        for _ in range(_count(file, count)):
            _value(file, ARRAY, depth + 1)
        return None
    code = f"<{_count(file, count, struct.calcsize(SCALARS[element]))}{SCALARS[element]}"
    return list(struct.unpack(code, file.read(struct.calcsize(code))))


def _text(file: BinaryIO) -> str:
    return file.read(_count(file, _scalar(file, "Q"))).decode("utf-8")


def _scalar(file: BinaryIO, code: str) -> Any:
    size = struct.calcsize("<" + code)
    return struct.unpack("<" + code, file.read(size))[0]
