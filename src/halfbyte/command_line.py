"""Owns the command line: ``halfbyte COMMAND …``, and the scripts that are one command each."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from halfbyte import __version__
from halfbyte.errors import exit_on_user_error
from halfbyte.faults import RUNNING

DESCRIPTION = "Fine-tune a language model on a small machine, and prove what came of it."


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        summary: a line for the list of commands.
        module: in ``halfbyte.commands``; it has ``add_arguments(parser)`` and ``main(arguments, parser)``.
        exit_code: of an error that the user can fix; None for the error's own.
        passes_on: whether what follows ``--`` is for a program that it starts (``arguments.passed_on``).
    """

    summary: str
    module: str
    exit_code: int | None = None
    passes_on: bool = False

    def load(self) -> ModuleType:
        """Import the module of this command."""
        return import_module(f"halfbyte.commands.{self.module}")


COMMANDS = {
    "init": Command("look at rows and machine, and write a config for them", "init"),
    "plan": Command("memory to load, train and run, before a download", "plan", exit_code=2),
    "preview": Command("rows as they are trained on: tokens, labels, lengths", "preview"),
    "train": Command("fine-tune with QLoRA; run it again to resume", "train"),
    "curve": Command("train on growing shares of the rows", "curve"),
    "merge": Command("fold the adapter into its base, measured before it is kept", "merge"),
    "compare": Command("tuned model against its base and opponents: a verdict", "compare"),
    "ladder": Command("one model at every precision", "ladder"),
    "export": Command("GGUF, AWQ or PEFT folder, each proven in its engine", "export"),
    "serve": Command("OpenAI-compatible server with a page", "serve", passes_on=True),
    "chat": Command("any model at any precision: footprint, an answer, a chat", "chat"),
    "dataset": Command("build an example dataset: addresses, icd10", "dataset"),
    "import": Command("read a config of Axolotl, LLaMA-Factory, Unsloth or TRL", "import_config"),
    "schema": Command("JSON Schema of the config, for editors", "schema"),
    "doctor": Command("what is wrong with this machine, and what mends it", "doctor"),
    "completion": Command("words for the shell to complete", "completion"),
}


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


def command_parser(module: ModuleType, prog: str | None) -> argparse.ArgumentParser:
    """Return the parser of a command's arguments."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return parser


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
