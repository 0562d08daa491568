"""Build the address dataset beside this file; ``halfbyte dataset addresses``."""

import sys
from pathlib import Path

from halfbyte.command_line import run_command

if __name__ == "__main__":
    folder = str(Path(__file__).parent / "addresses")
    run_command("dataset", ["addresses", "--out", folder, *sys.argv[1:]], None)
