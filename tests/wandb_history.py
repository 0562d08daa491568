"""Reads what a W&B run recorded offline: the records of its .wandb file (LevelDB log framing)."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from waiting import wait_until

BLOCK_BYTES = 32768
FILE_HEADER_BYTES = 7
RECORD_HEADER_BYTES = 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def history(folder: Path) -> list[dict[str, Any]]:
    """Every row that was logged, without W&B's own columns (those that begin with ``_``)."""
    from wandb.proto.wandb_internal_pb2 import Record

    def read() -> list[Any]:
        records = []
        for path in folder.rglob("*.wandb"):
            for data in _records(path.read_bytes()):
                records.append(Record())
                records[-1].ParseFromString(data)
        return records

    # A run may end before W&B's process has written all of it.
    wait_until(lambda: any(r.WhichOneof("record_type") == "exit" for r in read()), "no end", 60)
    rows = []
    for record in read():
        if record.WhichOneof("record_type") == "history":
            items = {
                (item.key or ".".join(item.nested_key)): json.loads(item.value_json)
                for item in record.history.item
            }
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows


def _records(data: bytes) -> Iterator[bytes]:
    at, parts = FILE_HEADER_BYTES, b""
    while at + RECORD_HEADER_BYTES <= len(data):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        if left < RECORD_HEADER_BYTES:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + RECORD_HEADER_BYTES])
        at += RECORD_HEADER_BYTES
        part = data[at : at + size]
        at += size
        parts = part if kind in (FULL, FIRST) else parts + part
        if kind in (FULL, LAST):
            yield parts
