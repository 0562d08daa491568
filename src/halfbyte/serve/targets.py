"""Owns what may be served: runs, models and files by name, read from the command line."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from halfbyte.config.paths import absolute_if_local
from halfbyte.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MIN_KEY_CHARS = 8


@dataclass(frozen=True)
class ServeTarget:
    """A model to serve.

    Attributes:
        name: by which requests ask for it; None: its own.
        target: run folder, model folder, GGUF file, Hub id or ``pypi:`` package.
    """

    name: str | None
    target: str

    @property
    def is_run(self) -> bool:
        """Whether it is a run folder, which has a base and an adapter."""
        return (Path(self.target) / "run.yaml").is_file()

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file."""
        return self.target.endswith(".gguf")


def read_targets(given: list[str]) -> list[ServeTarget]:
    """``[NAME=]MODEL`` each.

    Raises:
        UserError: a name with other characters, or one given twice.
    """
    found = []
    for text in given:
        name, equals, target = text.partition("=")
        if not equals or Path(text).exists():
            found.append(ServeTarget(None, absolute_if_local(text)))
            continue
        if not NAME.fullmatch(name) or not target:
            raise UserError(
                f"{text}: NAME=MODEL needs a name of letters, digits and . _ -, at most 64, and a model"
            )
        found.append(ServeTarget(name, absolute_if_local(target)))
    names = [one.name for one in found if one.name]
    if len(set(names)) < len(names):
        raise UserError(f"{', '.join(names)}: each name once")
    return found


def read_keys(file: Path | None, variable: str | None) -> tuple[str, ...]:
    """API keys: one a line of a file, or separated by commas in an environment variable's value.

    Raises:
        UserError: the file cannot be read, or a key is too short to be one.
    """
    text = variable or ""
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api-key-file {file}: cannot be read: {error}") from None
    keys = tuple(key.strip() for key in re.split(r"[,\n]", text) if key.strip())
    if file is not None and not keys:
        raise UserError(f"--api-key-file {file}: holds no key; one a line is expected")
    short = [key for key in keys if len(key) < MIN_KEY_CHARS]
    if short:
        raise UserError(
            f"an API key of {len(short[0])} characters; at least {MIN_KEY_CHARS} are needed, such as from:"
            " openssl rand -hex 16"
        )
    return keys


def check_open(host: str, keys: tuple[str, ...]) -> None:
    """Refuse to be open to others without a key.

    Raises:
        UserError: an address that others reach, and no key.
    """
    if not is_loopback(host) and not keys:
        raise UserError(
            f"--host {host}: others can reach it, so a key is needed: put one into a file and give"
            " --api-key-file, or set HALFBYTE_API_KEYS. --host 127.0.0.1 needs none"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can call."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
