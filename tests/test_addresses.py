"""The address dataset: parts as they are written, the same bytes each time, no test prompt in training."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from toys import read_table

from halfbyte.data import addresses
from halfbyte.data.addresses import MEMBER, build_addresses, rows_of
from halfbyte.data.normal import normalised
from halfbyte.errors import DataError

LABELLED = """<AddressCollection>
  <AddressString><Recipient>Acme</Recipient>\n <Recipient>&amp;</Recipient> <Recipient>Co.,</Recipient>
    <AddressNumber>12</AddressNumber> <StreetNamePreDirectional>N.</StreetNamePreDirectional>
    <StreetName>Main</StreetName> <StreetNamePostType>St.,</StreetNamePostType>
    (<OccupancyType>Apt</OccupancyType> <OccupancyIdentifier>3</OccupancyIdentifier>)
    <PlaceName>New</PlaceName> <PlaceName>Ulm,</PlaceName> <StateName>MN</StateName> <ZipCode>56073</ZipCode>
  </AddressString>
  <AddressString><NotAddress>at</NotAddress> <AddressNumber>5</AddressNumber> <StreetName>Elm</StreetName></AddressString>
  <AddressString><AddressNumber>5</AddressNumber> <NotAddress>the</NotAddress> <StreetName>Oak</StreetName></AddressString>
  <AddressString><StreetName>Elm</StreetName> <IntersectionSeparator>and</IntersectionSeparator> <StreetName>Oak</StreetName></AddressString>
  <AddressString><ZipCode>56073</ZipCode></AddressString>
  <AddressString><PlaceName>Ulm</PlaceName> <StateName>MN</StateName> <PlaceName>New</PlaceName></AddressString>
  <AddressString><NotAddress>AT</NotAddress> <AddressNumber>5</AddressNumber> <StreetName>ELM</StreetName></AddressString>
</AddressCollection>"""
ROWS = [
    {
        "prompt": "Acme & Co., 12 N. Main St., (Apt 3) New Ulm, MN 56073",
        "completion": '{"recipient":"Acme & Co.","number":"12","street":"N. Main St.","unit":"Apt 3",'
        '"city":"New Ulm","state":"MN","zip":"56073"}',
    },
    {"prompt": "at 5 Elm", "completion": '{"number":"5","street":"Elm"}'},
    {"prompt": "5 the Oak", "completion": '{"number":"5","street":"Oak"}'},
]
FILES = ("train.jsonl", "test.jsonl", "schema.json", "card.json")


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path, text = tmp_path / "usaddress.tar.gz", LABELLED.encode()
    with tarfile.open(path, "w:gz") as members:
        member = tarfile.TarInfo(MEMBER)
        member.size = len(text)
        members.addfile(member, io.BytesIO(text))
    monkeypatch.setattr(addresses, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_parts_are_the_words_between_their_first_and_last() -> None:
    rows, left_out = rows_of(ElementTree.fromstring(LABELLED))
    assert rows == ROWS
    assert left_out == {"crossing": 1, "one_part": 1, "part_in_several_places": 1, "repeated": 1}


def test_build_addresses_writes_the_same_bytes_each_time(archive: Path, tmp_path: Path) -> None:
    counts = build_addresses(tmp_path / "new" / "a", archive)
    build_addresses(tmp_path / "b", archive)
    for name in FILES:
        assert (tmp_path / "new/a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (counts["addresses"], counts["train"], counts["test"]) == (7, 0, 3)
    card = json.loads((tmp_path / "b" / "card.json").read_text(encoding="utf-8"))
    assert card["counts"] == counts


def test_a_wrong_archive_writes_nothing(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"could not be read: .*--archive"):
        build_addresses(tmp_path / "out", tmp_path / "none.tar.gz")
    data = archive.read_bytes()
    archive.write_bytes(data[:-1])
    with pytest.raises(DataError, match=r"sha256 is \w+, but \w+ is expected"):
        build_addresses(tmp_path / "out", archive)
    assert not (tmp_path / "out").exists()


def test_an_archive_without_the_labels_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "empty.tar.gz"
    with tarfile.open(path, "w:gz"):
        pass
    monkeypatch.setattr(addresses, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(DataError, match=r"labeled\.xml cannot be read"):
        build_addresses(tmp_path / "out", path)


@pytest.mark.real
def test_real_addresses(tmp_path: Path) -> None:
    counts = build_addresses(tmp_path)
    assert (counts["addresses"], counts["train"], counts["test"]) == (1513, 1069, 320)
    schema = json.loads((tmp_path / "schema.json").read_text(encoding="utf-8"))
    rows: dict[str, list[dict[str, Any]]] = {
        name: [row.values for row in read_table(str(tmp_path / f"{name}.jsonl")).rows]
        for name in ("train", "test")
    }
    prompts = {name: {normalised(row["prompt"]) for row in rows[name]} for name in rows}
    assert {name: len(texts) for name, texts in prompts.items()} == {"train": 1069, "test": 320}
    assert prompts["train"].isdisjoint(prompts["test"])
    for row in (*rows["train"], *rows["test"]):
        answer = json.loads(row["completion"])
        jsonschema.validate(answer, schema)
        assert len(answer) > 1
        assert all(value and value in row["prompt"] for value in answer.values())
