"""Train on growing shares of the rows; ``halfbyte curve``."""

from halfbyte.command_line import run_script

if __name__ == "__main__":
    run_script("curve")
