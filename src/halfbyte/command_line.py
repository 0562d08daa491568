"""Owns the command line: ``halfbyte COMMAND …``, and the scripts that are one command each."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence

from halfbyte import __version__
from halfbyte.commands.table import COMMANDS, Command, command_parser
from halfbyte.errors import exit_on_user_error
from halfbyte.faults import RUNNING

DESCRIPTION = "Fine-tune a language model on a small machine, and prove what came of it."


def main() -> None:
    """Run ``halfbyte COMMAND …``."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        raise SystemExit(0 if words else 2)
    if words[0] in ("-V", "--version"):
        print(f"halfbyte {__version__}")
        return
    if words[0] not in COMMANDS:
        close = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(COMMANDS)}"
        print(f"error: halfbyte has no command {words[0]!r}; {hint}", file=sys.stderr)
        raise SystemExit(2)
    run_command(words[0], words[1:], f"halfbyte {words[0]}")


def run_script(name: str) -> None:
    """Run a script of the repository, which is one command."""
    run_command(name, sys.argv[1:], None)


def run_command(name: str, words: Sequence[str], prog: str | None) -> None:
    """Run a command; an error that the user can fix, a fault of the machine or a signal ends the process.

    Args:
        name: of the command.
        words: of the command line, without the command's name.
        prog: how the command was called; None for the name of the script.
    """
    command = COMMANDS[name]
    RUNNING[:] = [name, *words]
    exit_on_user_error(lambda: _run(command, list(words), prog), command.exit_code)


def _run(command: Command, words: list[str], prog: str | None) -> None:
    passed_on: list[str] = []
    if command.passes_on and "--" in words:
        at = words.index("--")
        words, passed_on = words[:at], words[at + 1 :]
    module = command.load()
    parser = command_parser(module, prog)
    arguments = parser.parse_intermixed_args(words)
    arguments.passed_on, arguments.words = passed_on, words
    run: Callable[[argparse.Namespace, argparse.ArgumentParser], None] = module.main
    run(arguments, parser)


def overview() -> str:
    """Return the list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: halfbyte COMMAND …",
            "",
            DESCRIPTION,
            "",
            *lines,
            "",
            "halfbyte COMMAND --help says what each takes; halfbyte --version prints the version.",
        ]
    )
