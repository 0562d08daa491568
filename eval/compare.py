"""Compare a trained run with its base, or runs with each other; ``halfbyte compare``."""

from halfbyte.command_line import run_script

if __name__ == "__main__":
    run_script("compare")
