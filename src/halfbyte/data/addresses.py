"""Owns the address dataset: US addresses as people write them to JSON with their parts.

The addresses and the labels of their words were made by hand for usaddress (MIT), whose source archive holds
them. Which rows are test rows is decided by a hash of their text.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from halfbyte.data.normal import normalised
from halfbyte.errors import DataError
from halfbyte.run_dir import write_json, write_jsonl

VERSION = "0.5.16"
URL = (
    "https://files.pythonhosted.org/packages/5e/f9/"
    f"860e55d404434bba2c5d31ea2052d3aba4ffd32b352ebb9fd400c8ccbec5/usaddress-{VERSION}.tar.gz"
)
SHA256 = "f7e614e2489c159cf85be1b6f86edbfaf329dbeedef4d002a025757afd1ec6c6"
MEMBER = f"usaddress-{VERSION}/training/labeled.xml"
TIMEOUT_S = 60.0
NUM_TEST = 320

# The parts of an address, and the labels of the words that each is made of.
PARTS = {
    "recipient": {"Recipient"},
    "building": {"BuildingName", "LandmarkName"},
    "number": {"AddressNumberPrefix", "AddressNumber", "AddressNumberSuffix"},
    "street": {
        "StreetNamePreModifier",
        "StreetNamePreDirectional",
        "StreetNamePreType",
        "StreetName",
        "StreetNamePostType",
        "StreetNamePostDirectional",
        "StreetNamePostModifier",
    },
    "unit": {"OccupancyType", "OccupancyIdentifier", "SubaddressType", "SubaddressIdentifier"},
    "box": {"USPSBoxType", "USPSBoxID", "USPSBoxGroupType", "USPSBoxGroupID"},
    "city": {"PlaceName"},
    "state": {"StateName"},
    "zip": {"ZipCode", "ZipPlus4"},
    "country": {"CountryName"},
}
PART_OF = {label: part for part, labels in PARTS.items() for label in labels}
OTHER = "NotAddress"  # a word of no part
PUNCTUATION = " ,;"  # around a part


def build_addresses(folder: Path, archive: Path | None = None) -> dict[str, int]:
    """Write train.jsonl, test.jsonl, schema.json and card.json into ``folder`` and return the counts.

    The archive is downloaded unless it is given; the same archive gives the same bytes.

    Raises:
        DataError: it cannot be downloaded or read, or has another sha256.
    """
    data = _archive(archive)
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as members:
            text = members.extractfile(MEMBER).read()  # type: ignore[union-attr]
    except (tarfile.TarError, KeyError) as error:
        raise DataError(f"usaddress {VERSION}: {MEMBER} cannot be read: {error}") from error
    rows, left_out = rows_of(ElementTree.fromstring(text))
    rows.sort(key=lambda row: hashlib.sha256(row["prompt"].encode()).hexdigest())
    test, train = rows[:NUM_TEST], rows[NUM_TEST:]
    counts = {"addresses": sum(left_out.values()) + len(rows), "train": len(train)}
    counts |= {"test": len(test), **{f"left_out_{why}": n for why, n in sorted(left_out.items())}}
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "test.jsonl", test)
    write_json(folder / "schema.json", schema())
    source = f"usaddress {VERSION} (MIT, DataMade and The Atlanta Journal Constitution): {MEMBER}"
    write_json(folder / "card.json", {"source": source, "sha256": SHA256, "counts": counts})
    return counts


def schema() -> dict[str, object]:
    """Return the JSON Schema of the answers: the parts in their order, each text, none required."""
    properties = {part: {"type": "string"} for part in PARTS}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def rows_of(collection: ElementTree.Element) -> tuple[list[dict[str, str]], Counter[str]]:
    """Return the rows of labelled addresses, and how many were left out, by reason.

    Left out are crossings of streets, addresses of one part, those of which a part stands in several places,
    and repeated ones.
    """
    rows: dict[str, dict[str, str]] = {}
    left_out: Counter[str] = Counter()
    for address in collection:
        text, words = _words(address)
        if {label for label, _, _ in words} - {*PART_OF, OTHER}:
            left_out["crossing"] += 1
            continue
        spans: list[tuple[str, int, int]] = []
        for label, start, end in words:
            part = PART_OF.get(label, OTHER)
            if spans and spans[-1][0] == part:
                start = spans.pop()[1]
            spans.append((part, start, end))
        spans = [span for span in spans if span[0] != OTHER]
        values = {part: text[start:end].strip(PUNCTUATION) for part, start, end in spans}
        answer = {part: values[part] for part in PARTS if values.get(part)}
        if len(values) < len(spans):
            left_out["part_in_several_places"] += 1
        elif len(answer) < 2:
            left_out["one_part"] += 1
        elif normalised(text) in rows:
            left_out["repeated"] += 1
        else:
            completion = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
            rows[normalised(text)] = {"prompt": text, "completion": completion}
    return list(rows.values()), left_out


def _words(address: ElementTree.Element) -> tuple[str, list[tuple[str, int, int]]]:
    """Return the text of an address on one line, and the label, start and end of each of its words."""
    text, words = _one_line(address.text).lstrip(), []
    for word in address:
        start = len(text)
        text += _one_line(word.text).strip()
        words.append((word.tag, start, len(text)))
        text += _one_line(word.tail)
    return text.rstrip(), words


def _one_line(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "")


def _archive(path: Path | None) -> bytes:
    """Return the bytes of the archive, checked."""
    place = URL if path is None else str(path)
    try:
        if path is not None:
            data = path.read_bytes()
        else:
            with urllib.request.urlopen(URL, timeout=TIMEOUT_S) as response:
                data = response.read()
    except (OSError, urllib.error.URLError) as error:
        raise DataError(
            f"{place} could not be read: {error}. Download it by hand and give it with --archive"
        ) from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256:
        raise DataError(f"{place}: sha256 is {digest}, but {SHA256} is expected")
    return data
