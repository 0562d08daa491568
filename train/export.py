"""Export a merged run for other engines; ``halfbyte export``."""

from halfbyte.command_line import run_script

if __name__ == "__main__":
    run_script("export")
