"""Load any model at any precision and chat with it; ``halfbyte chat``."""

from halfbyte.command_line import run_script

if __name__ == "__main__":
    run_script("chat")
