"""Owns the targets to serve: runs, models and files by name, read from the command line."""

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
        name: the name that requests use; None takes the model's own.
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


def read_targets(arguments: list[str]) -> list[ServeTarget]:
    """Parse arguments of the form ``[NAME=]MODEL``.

    Raises:
        UserError: a name has characters that are not allowed, or is given twice.
    """
    targets = []
    for text in arguments:
        name, equals, target = text.partition("=")
        if not equals or Path(text).exists():
            targets.append(ServeTarget(None, absolute_if_local(text)))
            continue
        if not NAME.fullmatch(name) or not target:
            raise UserError(
                f"{text}: NAME=MODEL needs a model and a name of at most 64 letters, digits and . _ -"
            )
        targets.append(ServeTarget(name, absolute_if_local(target)))
    names = [target.name for target in targets if target.name]
    if len(set(names)) < len(names):
        raise UserError(f"{', '.join(names)}: use each name only once")
    return targets


def read_keys(file: Path | None, variable: str | None) -> tuple[str, ...]:
    """Read API keys from a file, one per line, or from an environment variable, separated by commas.

    Raises:
        UserError: the file cannot be read, or a key is too short.
    """
    text = variable or ""
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api-key-file {file}: cannot be read: {error}") from None
    keys = tuple(key.strip() for key in re.split(r"[,\n]", text) if key.strip())
    if file is not None and not keys:
        raise UserError(f"--api-key-file {file}: contains no key; expected one per line")
    short = [key for key in keys if len(key) < MIN_KEY_CHARS]
    if short:
        raise UserError(
            f"an API key has {len(short[0])} characters but needs at least {MIN_KEY_CHARS}; generate one with:"
            " openssl rand -hex 16"
        )
    return keys


def require_keys(host: str, keys: tuple[str, ...]) -> None:
    """Check that there is an API key if other machines can reach the server.

    Raises:
        UserError: other machines can reach the address, and there is no key.
    """
    if not is_loopback(host) and not keys:
        raise UserError(
            f"--host {host}: other machines can reach this address, so an API key is required: pass a file"
            " with --api-key-file, or set HALFBYTE_API_KEYS. --host 127.0.0.1 needs no key"
        )


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
