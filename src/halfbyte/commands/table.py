"""Owns the list of commands: what each is for, and its module."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType


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


def command_parser(module: ModuleType, prog: str | None) -> argparse.ArgumentParser:
    """Return the parser of a command's arguments."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return parser
