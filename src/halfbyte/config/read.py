"""Owns the reading of a YAML file and overrides into a checked Run, reporting all faults at once."""

from __future__ import annotations

import difflib
import hashlib
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML

from halfbyte.bounds import shorten
from halfbyte.config.checks import cross_faults, environment_faults, secret_faults
from halfbyte.config.paths import RESOLVED_NAME, resolve_paths
from halfbyte.config.schema import Run
from halfbyte.config.section import BRANCH, Name, Positive
from halfbyte.config.source import (
    SECRET,
    SHOWN_CHARS,
    KeyPath,
    Source,
    read_source,
    sealed,
    source_of,
)
from halfbyte.errors import ConfigError, RunError

MAX_NAME_LENGTH = 100
# Overrides of `train` that do not change the run's name, because they do not change what is learnt.
UNNAMED = ("existing", "ignore_plan", "micro_batch_size", "checkpointing", "preflight_only")
# Types that a key may accept besides its fixed words, with their descriptions.
BESIDES = ((Positive, "a whole number ≥ 1"), (list[Name], "a list of names"))


def load_run(config: Path, overrides: list[str], environ: Mapping[str, str] = os.environ) -> Run:
    """Read and check a config; every path in the result is absolute and ``name`` is set.

    Reading takes milliseconds and imports neither torch nor transformers.

    Raises:
        ConfigError: the config has faults; it lists all faults of structure or, if there are none, all
            contradictions of values, paths and environment.
    """
    source = read_source(config, overrides)
    # A run.yaml written by a run holds every key, so none of them was chosen by hand.
    run = _validate(source, resolved=config.name == RESOLVED_NAME, environ=environ)
    if run.name is None:
        run = run.model_copy(update={"name": default_name(config, overrides)})
        return run
    overridden = {text.partition("=")[0].strip() for text in overrides}
    # Without the override it is the config of a run that went on from there.
    if "train.resume_from" in overridden and "name" not in overridden and run.train.resume_from:
        step = Path(str(run.train.resume_from)).name.rpartition("-")[2]
        run = run.model_copy(update={"name": f"{run.name}-from-{step}"})
    return run


def model_run(model: str, overrides: list[str]) -> Run:
    """Return a config of defaults for a model given only by name, for planning.

    Raises:
        ConfigError: in the same cases as ``load_run``.
    """
    values = {
        "model": {"name": model},
        "data": {"train": "rows.jsonl"},
        "train": {"learning_rate": 2e-4},
    }
    return run_of(values, model, overrides)


def run_of(values: dict[str, Any], place: str, overrides: Sequence[str] = ()) -> Run:
    """Return a checked config of values that are in no file; its paths start from the current folder.

    Raises:
        ConfigError: in the same cases as ``load_run``; ``place`` names where the values are from.
    """
    return _validate(source_of(values, place, list(overrides)), environ=os.environ)


def read_run_folder(folder: Path, overrides: list[str] | None = None) -> Run:
    """Read the resolved config in a run folder, with the overrides of this call.

    Raises:
        RunError: the folder is not a run folder.
        ConfigError: an override is wrong, or changes a key that the finished run has fixed.
    """
    path = folder / RESOLVED_NAME
    if not path.is_file():
        raise RunError(
            f"{folder}: no run folder: it holds no run.yaml. Train one first: halfbyte train CONFIG"
        )
    allowed = ("eval.", "merge.", "export.", "track.")
    wrong = [text for text in overrides or [] if not text.startswith(allowed)]
    if wrong:
        raise ConfigError(
            [
                f"override {text!r}: the run is trained; only eval.*, merge.*, export.* and track.* still vary"
                for text in wrong
            ]
        )
    source = read_source(path, overrides or [])
    return _validate(source, resolved=True)


def check_values(values: dict[str, Any], place: str) -> list[str]:
    """Return the faults of a config's values that can be seen without its files and this machine."""
    source = source_of(values, place, [])
    try:
        run = Run.model_validate(values)
    except ValidationError as error:
        return [_fault(item, source) for item in _one_a_value([dict(e) for e in error.errors()])]
    return cross_faults(run, source, resolved=False)


def run_as_yaml(run: Run) -> str:
    """Return the whole resolved config as YAML, in the order of the schema."""
    stream = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    # Escape characters so that each is read back unchanged: plain YAML folds some line breaks.
    yaml.allow_unicode = False
    yaml.width = 4096
    yaml.dump(run.model_dump(mode="json"), stream)
    return sealed(stream.getvalue())


def default_name(config: Path, overrides: list[str]) -> str:
    """Return ``quickstart`` or ``quickstart+train.max_steps=5``, so each variation has its own folder."""
    silent = ("runs_dir=", "track.", "speed.", "data.cache=", *(f"train.{key}=" for key in UNNAMED))
    parts = [config.stem, *(text for text in overrides if not text.startswith(silent))]
    name = re.sub(r"[^\w.=+,-]+", "_", "+".join(parts), flags=re.ASCII)
    if len(name) > MAX_NAME_LENGTH:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name[: MAX_NAME_LENGTH - 9]}~{digest}"
    return name


def _validate(
    source: Source, *, resolved: bool = False, environ: Mapping[str, str] | None = None
) -> Run:
    """Validate a source; ``resolved`` means that it holds every key, so none was chosen by hand."""
    faults = list(source.faults) + secret_faults(source)
    try:
        run = Run.model_validate(source.values)
    except ValidationError as error:
        errors = _one_a_value([dict(item) for item in error.errors()])
        faults += [_fault(item, source) for item in errors]
        raise ConfigError(_in_file_order(faults)) from None
    faults += cross_faults(run, source, resolved=resolved)
    run = resolve_paths(run, source, faults, resolved=resolved)
    if environ is not None:
        faults += environment_faults(run, environ)
    if faults:
        raise ConfigError(_in_file_order(faults))
    return run


def _in_file_order(faults: list[str]) -> list[str]:
    def line(fault: str) -> int:
        found = re.match(r"[^\n]*?:(\d+): ", fault)
        return int(found.group(1)) if found else 1 << 30

    return sorted(dict.fromkeys(faults), key=line)


def _one_a_value(errors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge the errors that pydantic reports for each branch of a union into one.

    If the value is a list, its wrong items are reported; otherwise only the error of the fixed words is.
    """
    unions = {
        error["loc"][:-1]
        for error in errors
        if error["type"] == "literal_error" and str(error["loc"][-1]).startswith("literal[")
    }
    groups: dict[KeyPath, list[dict[str, Any]]] = {}
    for error in errors:
        loc = error["loc"]
        group = next((union for union in unions if loc[: len(union)] == union), loc)
        groups.setdefault(group, []).append(error)
    found: list[dict[str, Any]] = []
    for group, branches in groups.items():
        inner = [
            error | {"loc": (*group, *error["loc"][len(group) + 1 :])}
            for error in branches
            if len(error["loc"]) > len(group) + 1
        ]
        found += inner or branches[:1]
    return found


def _fault(error: dict[str, Any], source: Source) -> str:
    """Return one line with the place, the key, the value found, what is allowed, and the nearest key."""
    # pydantic adds the chosen branch of a union to ``loc``; only keys that were written count.
    path: KeyPath = tuple(part for part in error["loc"] if not str(part).startswith(BRANCH))
    while error["type"] != "missing" and len(path) > 1 and path not in source.places:
        path = path[:-1]
    dotted = ".".join(map(str, path))
    place = source.place(path)
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{place}: unknown key {dotted}{_nearest(path)}"
    if kind == "missing":
        return f"{place}: {dotted} is missing; it has no default{_meaning(path)}"
    if kind == "literal_error":
        came = error["input"]
        options = [text.strip("'") for text in re.findall(r"'[^']*'", context["expected"])]
        close = difflib.get_close_matches(str(came), options, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        allowed = ", or ".join([", ".join(options), *_besides(path)])
        return f"{place}: {dotted} is {_shown(came)}; allowed: {allowed}{hint}"
    message = error["msg"].replace("Input should", "should")
    message = re.sub(r"dictionary( or instance of \w+)?$", "mapping", message)
    return f"{place}: {dotted} is {_shown(error['input'])}, which {message[0].lower()}{message[1:]}"


def _shown(value: Any) -> str:
    """Return the value for a message, hidden if it looks like a secret."""
    text = shorten(repr(value), SHOWN_CHARS)
    return "a secret (not shown)" if SECRET.search(str(value)) else text


def _nearest(path: KeyPath) -> str:
    known = keys_of(path[:-1])
    everywhere = [f"{section}.{key}" for section in keys_of(()) for key in keys_of((section,))]
    elsewhere = [key for key in everywhere if key.rpartition(".")[2] == path[-1]]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    close = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {'.'.join(map(str, (*path[:-1], close[0])))}?"
    return f"; allowed here: {', '.join(known)}"


def keys_of(path: KeyPath) -> list[str]:
    """Return the keys that the schema has below ``path``."""
    model = _model_at(path)
    return list(model.model_fields) if model else []


def _model_at(path: KeyPath) -> type[BaseModel] | None:
    model: type[BaseModel] | None = Run
    for part in path:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if model else None
        model = _section_of(field.annotation) if field else None
    return model


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        found = _section_of(inner)
        if found:
            return found
    return None


def _field_at(path: KeyPath) -> FieldInfo | None:
    model = _model_at(path[:-1])
    return model.model_fields.get(str(path[-1])) if model else None


def _besides(path: KeyPath) -> list[str]:
    """Return what a key accepts besides its fixed words, such as a number besides ``auto``."""
    field = _field_at(path)
    kinds = get_args(field.annotation) if field is not None else ()
    return [words for kind, words in BESIDES if kind in kinds]


def _meaning(path: KeyPath) -> str:
    field = _field_at(path)
    return f". {field.description}" if field is not None and field.description else ""
