"""Owns the paths in a config: it decides which values are paths and makes them absolute."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.config.dataset import Data, DataSource
from halfbyte.config.schema import Run
from halfbyte.config.source import KeyPath, Source

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
MODEL_SUFFIXES = (".gguf",)
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
PACKED_SUFFIXES = (".gz", ".xz", ".zst")
PATTERN_CHARS = re.compile(r"[*?\[]")
TEMPLATE_SUFFIXES = (".jinja", ".j2")
RESOLVED_NAME = "run.yaml"
TEMPLATE_NAMES = ("gemma", "chatml", "hermes", "plain")


def resolve_paths(run: Run, source: Source, faults: list[str], *, resolved: bool = False) -> Run:
    """Make ``runs_dir`` and every value that names a local file or folder absolute.

    A value is local if it begins with ``/``, ``./``, ``../`` or ``~``, ends in a known suffix, or exists
    beside the config. Anything else must look like a Hub id, or is added to ``faults``. ``resolved``
    means that a run wrote the config, so that no key was chosen by hand.
    """
    resolver = _Resolver(source, faults)
    name = resolver.local(("model", "name"), run.model.name, MODEL_SUFFIXES)
    if run.model.revision is not None and (name.startswith("pypi:") or os.path.isabs(name)):
        resolver.fault(
            ("model", "revision"), f"has no effect: {run.model.name!r} is not on the Hub"
        )
    data: dict[str, Any] = {
        key: _resolve_sources(resolver, key, entries)
        for key, entries in (("train", run.data.train), ("test", run.data.test))
        if entries is not None
    }
    if not resolved:
        _check_hub_keys(resolver, run.data.model_copy(update=data))
    if run.data.chat_template is not None:
        data["chat_template"] = resolver.template(("data", "chat_template"), run.data.chat_template)
    baselines = [
        baseline.model_copy(
            update={
                "model": resolver.local(
                    ("eval", "baselines", i, "model"), baseline.model, MODEL_SUFFIXES
                ),
                "chat_template": baseline.chat_template
                and resolver.template(
                    ("eval", "baselines", i, "chat_template"), baseline.chat_template
                ),
            }
        )
        for i, baseline in enumerate(run.eval.baselines)
    ]
    evaluation: dict[str, Any] = {"baselines": baselines}
    for key in ("benchmark_data", "json_schema"):
        if getattr(run.eval, key) is not None:
            evaluation[key] = resolver.absolute(("eval", key), getattr(run.eval, key))
    train = {"resume_from": resolver.checkpoint(run.train.resume_from, resolved=resolved)}
    return run.model_copy(
        update={
            "train": run.train.model_copy(update=train),
            "model": run.model.model_copy(update={"name": name}),
            "data": run.data.model_copy(update=data),
            "eval": run.eval.model_copy(update=evaluation),
            "runs_dir": resolver.absolute(("runs_dir",), run.runs_dir),
        }
    )


def _resolve_sources(
    resolver: _Resolver, key: str, entries: str | list[DataSource]
) -> str | list[DataSource]:
    if isinstance(entries, str):
        return resolver.local(("data", key), entries, DATA_SUFFIXES)
    return [
        entry.model_copy(
            update={
                "path": resolver.local(("data", key, number, "path"), entry.path, DATA_SUFFIXES)
            }
        )
        for number, entry in enumerate(entries)
    ]


def _check_hub_keys(resolver: _Resolver, data: Data) -> None:
    """Add a fault for each key of the section that says something of the Hub alone where nothing is from there."""
    sources = data.sources()
    for part in ("train", "test"):
        entries = getattr(data, part)
        for number, entry in enumerate(entries if isinstance(entries, list) else ()):
            idle = dict.fromkeys(("subset", "revision"), "the rows come from local files")
            if not os.path.isdir(entry.path):
                idle["split"] = "a file or a pattern has no splits"
            if bare_suffix(entry.path) in (".parquet", ".arrow"):
                idle |= dict.fromkeys(("field", "encoding"), "the file is no text")
            for key, why in idle.items():
                if getattr(entry, key) is not None and os.path.isabs(entry.path):
                    resolver.fault(("data", part, number, key), f"has no effect: {why}")
    if not all(os.path.isabs(entry.path) for _, entry in sources):
        return
    folders = {f"{part}_split" for part, entry in sources if os.path.isdir(entry.path)}
    for key in ("train_split", "test_split", "subset", "revision"):
        if key not in folders and resolver.source.values["data"].get(key) is not None:
            resolver.fault(("data", key), "has no effect: the rows come from local files")


@dataclass(frozen=True)
class _Resolver:
    """Turns values into absolute paths, and collects faults for the others."""

    source: Source
    faults: list[str]

    def fault(self, path: KeyPath, text: str) -> None:
        self.faults.append(f"{self.source.place(path)}: {'.'.join(map(str, path))} {text}")

    def absolute(self, path: KeyPath, value: str) -> str:
        if "\0" in value:
            self.fault(path, f"is {value!r}, which is no path: it holds a null byte")
            return value
        try:
            # Links are kept: in the Hub's cache a link has the file's name, and its target does not.
            return os.path.abspath(self.source.folder(path) / Path(value).expanduser())
        except (RuntimeError, ValueError, OSError) as error:
            self.fault(path, f"is {value!r}, which is no path: {error}")
            return value

    def local(self, path: KeyPath, value: str, suffixes: tuple[str, ...]) -> str:
        if is_local(value, self.source.folder(path), suffixes):
            return self.absolute(path, value)
        if not value.startswith("pypi:") and not HUB_ID.fullmatch(value):
            self.fault(path, f"is {value!r}, neither a path nor a Hub id such as org/name")
        return value

    def checkpoint(self, value: int | str | None, *, resolved: bool) -> str | None:
        """Return the path of a checkpoint, which may be given as a step of the run whose config this is."""
        if value is None:
            return None
        by_run = resolved and ("train", "resume_from") in self.source.places
        if isinstance(value, str) and by_run and os.path.isabs(value):
            return value  # which a run wrote; it has a copy, and need not be there any more
        path, config = ("train", "resume_from"), Path(self.source.place(()))
        if isinstance(value, str):
            folder = Path(self.absolute(path, value))
        elif config.name == RESOLVED_NAME:
            folder = Path(os.path.abspath(config.parent / "checkpoints" / f"checkpoint-{value}"))
        else:
            self.fault(
                path,
                f"is {value}: for a step the config is RUN/run.yaml, not {config}; or give a path",
            )
            return None
        if not folder.is_dir():
            there = sorted(p.name for p in folder.parent.glob("checkpoint-*"))
            self.fault(
                path, f"is {value!r}: no {folder}; found there: {', '.join(there) or 'none'}"
            )
        return str(folder)

    def template(self, path: KeyPath, value: str) -> str:
        if value in TEMPLATE_NAMES:
            return value
        if not value.endswith(TEMPLATE_SUFFIXES):
            allowed = ", ".join(TEMPLATE_NAMES)
            self.fault(path, f"is {value!r}; allowed: {allowed}, or a .jinja file")
        return self.absolute(path, value)


def absolute_if_local(value: str) -> str:
    """Return a command-line argument, as an absolute path if it names something on this disk."""
    if is_local(value, Path.cwd(), (*MODEL_SUFFIXES, *DATA_SUFFIXES)):
        return os.path.abspath(Path(value).expanduser())
    return value


def bare_suffix(name: str) -> str:
    """Return the suffix of a data file in lower case, without that of its compression."""
    path = Path(name.lower())
    return (path.with_suffix("") if path.suffix in PACKED_SUFFIXES else path).suffix


def is_data_file(name: str) -> bool:
    """Return whether a file's name says that it holds rows."""
    return bare_suffix(name) in DATA_SUFFIXES


def is_pattern(value: str) -> bool:
    """Return whether a path has wildcards: ``data/**/*.jsonl``."""
    return PATTERN_CHARS.search(value) is not None


def is_local(value: str, folder: Path, suffixes: tuple[str, ...]) -> bool:
    """Return whether a model or dataset name refers to this disk rather than to the Hub."""
    if value.startswith("pypi:"):
        return False
    if value.startswith(("/", "./", "../", "~")) or value in (".", ".."):
        return True
    if value.endswith(suffixes) or (
        suffixes[-len(DATA_SUFFIXES) :] == DATA_SUFFIXES
        and (is_data_file(value) or is_pattern(value))
    ):
        return True
    try:
        return (folder / value).exists()
    except (OSError, ValueError):
        return False
