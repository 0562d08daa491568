"""Plan the memory of a config or a model; ``halfbyte plan``."""

from halfbyte.command_line import run_script

if __name__ == "__main__":
    run_script("plan")
