"""Owns which config values are paths, and turns each into an absolute one."""

from __future__ import annotations

import re
from pathlib import Path

from halfbyte.config.schema import Run
from halfbyte.config.source import KeyPath, Source
from halfbyte.errors import ConfigError

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
MODEL_SUFFIXES = (".gguf",)
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
TEMPLATE_SUFFIXES = (".jinja", ".j2")
TEMPLATE_NAMES = ("gemma", "chatml", "plain")


def resolve_paths(run: Run, source: Source, *, resolved: bool = False) -> Run:
    """Make ``runs_dir`` and every value that names a local file or folder absolute.

    A value names something local if it begins with ``/``, ``./``, ``../`` or ``~``, ends in a known
    suffix, or exists beside the config. Anything else must look like a Hub id.

    Raises:
        ConfigError: a value is neither a path nor a Hub id.
    """
    faults: list[str] = []

    def local(path: KeyPath, value: str, suffixes: tuple[str, ...]) -> str:
        folder = source.folder(path)
        if is_local(value, folder, suffixes):
            return str((folder / Path(value).expanduser()).resolve())
        if not value.startswith("pypi:") and not HUB_ID.fullmatch(value):
            faults.append(
                f"{source.place(path)}: {'.'.join(map(str, path))} is {value!r}, neither a path nor a"
                " Hub id such as org/name"
            )
        return value

    if is_local(run.data.train, source.folder(("data", "train")), DATA_SUFFIXES):
        faults += [
            f"{source.place(('data', key))}: data.{key} has no effect: data.train is a local file or folder"
            for key in ("train_split", "subset", "revision")
            if not resolved and source.values["data"].get(key) is not None
        ]

    model = run.model.model_copy(
        update={"name": local(("model", "name"), run.model.name, MODEL_SUFFIXES)}
    )
    data_update: dict[str, str] = {"train": local(("data", "train"), run.data.train, DATA_SUFFIXES)}
    if run.data.test is not None:
        data_update["test"] = local(("data", "test"), run.data.test, DATA_SUFFIXES)
    template = run.data.chat_template
    if template is not None and template not in TEMPLATE_NAMES:
        if not template.endswith(TEMPLATE_SUFFIXES):
            faults.append(
                f"{source.place(('data', 'chat_template'))}: data.chat_template is {template!r};"
                f" allowed: {', '.join(TEMPLATE_NAMES)}, or a .jinja file"
            )
        folder = source.folder(("data", "chat_template"))
        data_update["chat_template"] = str((folder / template).resolve())
    baselines = [
        baseline.model_copy(
            update={
                "model": local(("eval", "baselines", i, "model"), baseline.model, MODEL_SUFFIXES)
            }
        )
        for i, baseline in enumerate(run.eval.baselines)
    ]
    runs_dir = source.folder(("runs_dir",)) / Path(run.runs_dir).expanduser()
    if faults:
        raise ConfigError(faults)
    return run.model_copy(
        update={
            "model": model,
            "data": run.data.model_copy(update=data_update),
            "eval": run.eval.model_copy(update={"baselines": baselines}),
            "runs_dir": str(runs_dir.resolve()),
        }
    )


def absolute_if_local(value: str) -> str:
    """A command-line argument as an absolute path where it names something on this disk."""
    if is_local(value, Path.cwd(), (*MODEL_SUFFIXES, *DATA_SUFFIXES)):
        return str(Path(value).expanduser().resolve())
    return value


def is_local(value: str, folder: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a model or dataset name means something on this disk rather than on the Hub."""
    if value.startswith("pypi:"):
        return False
    if value.startswith(("/", "./", "../", "~")) or value in (".", ".."):
        return True
    return value.endswith(suffixes) or (folder / value).exists()
