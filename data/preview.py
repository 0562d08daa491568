"""Show the data of a config as it is trained on; ``halfbyte preview``."""

from halfbyte.command_line import run_script

if __name__ == "__main__":
    run_script("preview")
