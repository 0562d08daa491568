"""Owns the parsing of YAML configs and overrides into plain values, each with the place it came from."""

from __future__ import annotations

import hashlib
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from halfbyte.bounds import BoundError, read_text, shorten
from halfbyte.errors import ConfigError

KeyPath = tuple[str | int, ...]
SECRET = re.compile(r"hf_[A-Za-z0-9]{30,}|^[0-9a-f]{40}$|wandb_v1_\w{20,}|sk-[A-Za-z0-9_-]{20,}")
HEADER = "# The resolved config of this run; every later step reads it. Change it by overrides, section.key=value."
SEAL = "# sha256 "
MAX_CONFIG_BYTES = 128 << 10
MAX_VALUES = 10_000
MAX_INT_BITS = 1024  # as the largest float
SHOWN_CHARS = 200
UNREADABLE = object()  # a value that has been reported already


@dataclass
class Source:
    """The plain values of a config with their places.

    ``places`` maps a key path to ``file:line`` or to the override's text; ``folders`` maps it to
    the folder against which a relative path in that value is read. ``num_values`` are read so far.
    """

    values: dict[str, Any]
    places: dict[KeyPath, str] = field(default_factory=dict)
    folders: dict[KeyPath, Path] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    num_values: int = 0

    def place(self, path: KeyPath) -> str:
        """Return where ``path`` or else its nearest parent was written."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, "")

    def folder(self, path: KeyPath) -> Path:
        """Return the folder against which a relative path at ``path`` is resolved."""
        while path and path not in self.folders:
            path = path[:-1]
        return self.folders.get(path, Path.cwd())


def read_source(config: Path, overrides: list[str]) -> Source:
    """Read a YAML 1.2 file, then apply ``section.key=value`` overrides to it.

    Values of overrides go through the same YAML parser as the file. Relative paths in the file are
    resolved against its folder, those in an override against the working directory. Duplicate keys
    and malformed overrides are collected in ``Source.faults``.

    Raises:
        ConfigError: the file is missing, unreadable, or not a YAML mapping.
    """
    try:
        text = read_text(config, MAX_CONFIG_BYTES)
    except FileNotFoundError:
        raise ConfigError([_no_such_config(config)]) from None
    except BoundError as error:
        raise ConfigError([f"{error}. Is it the config?"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{config}: cannot be read as UTF-8 text: {error}"]) from None
    _check_seal(text, config)
    source = Source(values={})
    source.places[()] = str(config)
    source.folders[()] = config.resolve().parent
    node = _compose(text, str(config))
    if node is None:
        raise ConfigError([f"{config}: is empty; see docs/config.md for the keys"])
    if not isinstance(node, MappingNode):
        raise ConfigError([f"{config}:1: holds {_kind(node)}; a mapping of sections is expected"])
    source.values = _values(node, (), source, str(config))
    for override in overrides:
        _lay_over(override, source)
    return source


def sealed(text: str) -> str:
    """Return the text of a resolved config with the lines that tell a change of it."""
    return f"{HEADER}\n{SEAL}{_digest(text)}\n{text}"


def _check_seal(text: str, config: Path) -> None:
    """Check that a config that a run wrote is as it wrote it; configs of users have no seal.

    Raises:
        ConfigError: it is not.
    """
    first, _, rest = text.partition("\n")
    second, _, body = rest.partition("\n")
    is_ours = first == HEADER or second.startswith(SEAL)  # one flipped bit spares one of them
    if is_ours and text != sealed(body):
        raise ConfigError(
            [
                f"{config}: differs from what the run wrote: it is damaged, or was changed by hand. Put it back, and"
                " give changes as overrides, section.key=value"
            ]
        )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def source_of(values: dict[str, Any], place: str, overrides: list[str]) -> Source:
    """Return the source of values that come from no file, with overrides applied to them."""
    source = Source(values, {(): place}, {(): Path.cwd()})
    for override in overrides:
        _lay_over(override, source)
    return source


def _no_such_config(config: Path) -> str:
    folder = config.parent
    found = sorted(str(path) for path in folder.glob("*.yaml")) if folder.is_dir() else []
    return f"{config}: no such config; " + (
        f"here are {', '.join(found)}" if found else f"{folder} holds no .yaml file"
    )


def _compose(text: str, name: str) -> Node | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an anchor may be used again (YAML 1.2.2, 7.1)
            node: Node | None = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError([f"{name}{line}: not valid YAML: {error.problem}"]) from None
    except (YAMLError, RecursionError, ValueError) as error:
        raise ConfigError([f"{name}: not valid YAML: {error}"]) from None
    return node


def _values(node: Node, path: KeyPath, source: Source, name: str) -> Any:
    try:
        return _plain(node, path, source, name)
    except RecursionError:
        raise ConfigError([f"{name}: an alias contains itself; write the values out"]) from None


def _plain(node: Node, path: KeyPath, source: Source, name: str) -> Any:
    """Return the plain Python value of ``node``; record the line of every key and every repeated key."""
    source.num_values += 1
    if source.num_values > MAX_VALUES:
        raise ConfigError([f"{name}: holds more than {MAX_VALUES:,} values, aliases written out"])
    if isinstance(node, MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            here = (*path, key)
            place = f"{name}:{key_node.start_mark.line + 1}"
            if key in mapping:
                dotted = ".".join(map(str, here))
                source.faults.append(
                    f"{place}: {dotted} is written twice (first at {source.place(here)}); keep one"
                )
                continue
            source.places[here] = place
            value = _plain(value_node, here, source, name)
            if value is not UNREADABLE:
                mapping[key] = value
        return mapping
    if isinstance(node, SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            here = (*path, index)
            source.places[here] = f"{name}:{item.start_mark.line + 1}"
            items.append(_plain(item, here, source, name))
        return items
    try:
        return _scalar(node)
    except (YAMLError, ValueError, TypeError, LookupError):
        place = source.place(path) or name
        dotted = ".".join(map(str, path))
        shown = shorten(repr(node.value), SHOWN_CHARS)
        source.faults.append(f"{place}: {dotted} is {shown}, which is no {node.tag}")
        return UNREADABLE


def _scalar(node: Node) -> Any:
    # The schema has no dates, so they stay text as written.
    if node.tag == "tag:yaml.org,2002:timestamp":
        return node.value
    value = YAML(typ="safe", pure=True).constructor.construct_object(node, deep=True)
    if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
        raise ValueError
    return value


def _kind(node: Node) -> str:
    return "a list" if isinstance(node, SequenceNode) else f"the value {node.value!r}"


def _lay_over(override: str, source: Source) -> None:
    key, equals, text = override.partition("=")
    place = "override " + repr(f"{key}=…" if SECRET.search(text) else override)
    keys = tuple(key.strip().split("."))
    if not equals or not all(keys):
        source.faults.append(
            f"{place}: not of the form section.key=value, such as train.max_steps=5"
        )
        return
    try:
        node = _compose(text, place) if text.strip() else None
    except ConfigError as error:
        source.faults.extend(error.faults)
        return
    target = source.values
    for depth, part in enumerate(keys[:-1], start=1):
        if part not in target:
            source.places[keys[:depth]] = place
        inner = target.setdefault(part, {})
        if not isinstance(inner, dict):
            source.faults.append(f"{place}: {part} holds {inner!r}, which has no keys")
            return
        target = inner
    for known in [known for known in source.places if known[: len(keys)] == keys]:
        del source.places[known]
    source.places[keys] = place
    source.folders[keys] = Path.cwd()
    value = None if node is None else _values(node, keys, source, place)
    if value is not UNREADABLE:
        target[keys[-1]] = value
    source.places = {
        known: place if known[: len(keys)] == keys else written
        for known, written in source.places.items()
    }
