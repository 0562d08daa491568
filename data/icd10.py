"""Build the medical-coding dataset: ICD-10-CM diagnoses to category codes.

python data/icd10.py [--chapter 9] [--out data/icd10]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from halfbyte.data.icd10 import CIRCULATORY, build_icd10
from halfbyte.errors import exit_on_user_error


def main() -> None:
    """Turn the package's tables into train.jsonl, test.jsonl and card.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--chapter",
        default=CIRCULATORY,
        help="chapter of ICD-10-CM, 1 to 22; default 9, circulatory",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "icd10")
    arguments = parser.parse_args()
    counts = build_icd10(arguments.out, arguments.chapter)
    print("\n".join(f"{name.replace('_', ' ')}: {count}" for name, count in counts.items()))
    print(f"written: {arguments.out}/train.jsonl, test.jsonl, card.json")


if __name__ == "__main__":
    exit_on_user_error(main)
