"""Compare one model at every precision; ``halfbyte ladder``."""

from halfbyte.command_line import run_script

if __name__ == "__main__":
    run_script("ladder")
