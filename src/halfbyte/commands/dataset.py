"""Build an example dataset.

halfbyte dataset addresses [--archive usaddress-0.5.16.tar.gz] [--out FOLDER]
halfbyte dataset icd10 [--chapter 9] [--out FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command line may say."""
    parser.add_argument(
        "name",
        choices=("addresses", "icd10"),
        help="US addresses to JSON with their parts; ICD-10-CM diagnoses to category codes",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: data/NAME")
    parser.add_argument(
        "--archive", type=Path, help="usaddress's source archive; default: it is downloaded"
    )
    parser.add_argument("--chapter", help="of ICD-10-CM, 1 to 22; default: 9, circulatory")


def main(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Write train.jsonl, test.jsonl and card.json, for addresses also schema.json."""
    folder = arguments.out or Path("data") / arguments.name
    if arguments.name == "addresses":
        if arguments.chapter:
            parser.error("--chapter is for icd10")
        from halfbyte.data.addresses import build_addresses

        counts = build_addresses(folder, arguments.archive)
    else:
        if arguments.archive:
            parser.error("--archive is for addresses")
        from halfbyte.data.icd10 import CIRCULATORY, build_icd10

        counts = build_icd10(folder, arguments.chapter or CIRCULATORY)
    print("\n".join(f"{name.replace('_', ' ')}: {count}" for name, count in counts.items()))
    print(f"written: {', '.join(str(path) for path in sorted(folder.glob('*.json*')))}")
