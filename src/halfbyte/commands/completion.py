"""Print what the shell needs to complete halfbyte's commands and options.

eval "$(halfbyte completion bash)"        (in ~/.bashrc; zsh and tcsh alike)
"""

from __future__ import annotations

import argparse

import shtab

from halfbyte.commands.table import COMMANDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command line may say."""
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)


def main(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Print the script."""
    print(shtab.complete(whole_parser(), arguments.shell))


def whole_parser() -> argparse.ArgumentParser:
    """Return one parser of all commands, in which arguments that are paths complete to files."""
    whole = argparse.ArgumentParser(prog="halfbyte")
    parts = whole.add_subparsers(dest="command")
    for name, command in COMMANDS.items():
        part = parts.add_parser(name, help=command.summary)
        command.load().add_arguments(part)
        for action in part._actions:
            if not action.choices and action.nargs != 0:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return whole
