"""Fold a run's adapter into its base; ``halfbyte merge``."""

from halfbyte.command_line import run_script

if __name__ == "__main__":
    run_script("merge")
