"""``python -m halfbyte`` is ``halfbyte``."""

from halfbyte.command_line import main

if __name__ == "__main__":
    main()
