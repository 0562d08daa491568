"""Build the medical-coding dataset beside this file; ``halfbyte dataset icd10``."""

import sys
from pathlib import Path

from halfbyte.command_line import run_command

if __name__ == "__main__":
    folder = str(Path(__file__).parent / "icd10")
    run_command("dataset", ["icd10", "--out", folder, *sys.argv[1:]], None)
