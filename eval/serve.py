"""Serve runs, models and GGUF files; ``halfbyte serve``."""

from halfbyte.command_line import run_script

if __name__ == "__main__":
    run_script("serve")
