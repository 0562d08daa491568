"""Build the address dataset: US addresses as people write them to JSON with their parts.

python data/addresses.py [--archive usaddress-0.5.16.tar.gz] [--out data/addresses]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from halfbyte.data.addresses import build_addresses
from halfbyte.errors import exit_on_user_error


def main() -> None:
    """Turn usaddress's labelled addresses into train.jsonl, test.jsonl, schema.json and card.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--archive", type=Path, help="usaddress's source archive; default: it is downloaded"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "addresses")
    arguments = parser.parse_args()
    counts = build_addresses(arguments.out, arguments.archive)
    print("\n".join(f"{name.replace('_', ' ')}: {count}" for name, count in counts.items()))
    print(f"written: {arguments.out}/train.jsonl, test.jsonl, schema.json, card.json")


if __name__ == "__main__":
    exit_on_user_error(main)
