"""Owns the keys of a config's data section: sources, formats, rendering, policies and splits."""

from __future__ import annotations

import datetime
import itertools
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from halfbyte.config.section import BRANCH, Fraction, Name, Positive, Section


def _read_day(value: Any) -> Any:
    """Return the day that a text such as ``2026-11-28`` names; YAML reads it without quotes as a day."""
    return datetime.date.fromisoformat(value) if isinstance(value, str) else value


SPLIT_NAMES = ("train", "test", "validation", "valid", "dev", "data")
Day = Annotated[datetime.date, BeforeValidator(_read_day)]


Format = Literal[
    "auto", "messages", "prompt_completion", "alpaca", "sharegpt", "multiple_choice", "text"
]
Repair = Literal["merge_turns", "drop_leading_assistant", "drop_trailing_user", "blank_system"]


class DataSource(Section):
    """One of several sources of rows; what it does not say is as in the section ``data``."""

    path: Name = Field(description="As `data.train`.")
    name: Name | None = Field(
        None, description="Name in the ledger and of the losses; default: of the file or folder."
    )
    weight: Annotated[float, Field(gt=0, le=1000)] = Field(
        1.0,
        description="How often each of its training rows is in an epoch: 2 is twice, 0.5 a half of them, drawn"
        " by `seed`.",
    )
    rows: Positive | None = Field(
        None, description="Number of its rows to use, drawn by `seed`; default: all."
    )
    format: Format | None = Field(None, description="As `data.format`.")
    columns: dict[str, Name] | None = Field(None, description="As `data.columns`.")
    system: Name | None = Field(None, description="As `data.system`.")
    split: Name | None = Field(None, description="As `data.train_split`, or `data.test_split`.")
    subset: Name | None = Field(None, description="As `data.subset`.")
    revision: Name | None = Field(None, description="As `data.revision`.")
    field: Name | None = Field(None, description="As `data.field`.")
    encoding: Name | None = Field(None, description="As `data.encoding`.")


# The branch is chosen by the value's type, so that an error is about one of them.
Sources = Annotated[
    Annotated[Name, Tag(f"{BRANCH}one")]
    | Annotated[list[DataSource], Field(min_length=1), Tag(f"{BRANCH}several")],
    Discriminator(lambda value: BRANCH + ("several" if isinstance(value, list) else "one")),
]


class Data(Section):
    """The rows, how they are rendered to tokens, and which of them are held out."""

    train: Sources = Field(
        description="Training rows: a .jsonl, .ndjson, .json, .csv, .tsv, .parquet or .arrow file (also as"
        " .gz, .xz or .zst), a pattern such as `rows/**/*.jsonl`, a folder of files, a folder that"
        " `save_to_disk` wrote, or a Hub dataset id. Several are a list of mappings: see below."
    )
    test: Sources | None = Field(
        None,
        description="Rows for the comparison, likewise. Else `test_frac`.",
    )
    train_split: Name = Field(
        "train", description="Split for training, of a Hub dataset or of a folder with several."
    )
    test_split: Name = Field("test", description="Split for the comparison, likewise.")
    field: Name | None = Field(
        None, description="Key under which a JSON file holds its rows: `data` in `{data: [...]}`."
    )
    encoding: Name = Field(
        "utf-8", description="Encoding of text files, such as `cp1252`, `utf-16`."
    )
    subset: Name | None = Field(None, description="Configuration name of a Hub dataset.")
    revision: Name | None = Field(None, description="Revision of a Hub dataset.")
    format: Format = Field(
        "auto", description="Shape of a row; `auto` reads it off the columns and prints it."
    )
    columns: dict[str, Name] = Field(
        default_factory=dict,
        description="Column names that differ from the format's: `{prompt: question, completion:"
        " answers.text.0}`; dots lead into nested columns.",
    )
    system: Name | None = Field(
        None, description="System message for rows without one of their own."
    )
    chat_template: Name | None = Field(
        None,
        description="`gemma`, `chatml`, `hermes` (ChatML with tools and thoughts), `plain`, or a Jinja file;"
        " required for a base model without its own chat template.",
    )
    loss_on: Literal["completion", "last", "all"] = Field(
        "completion",
        description="`completion`: assistant turns with their stop token, but for turns of weight 0;"
        " `last`: the last of them alone; `all`: every token. Raw text rows are always `all`.",
    )
    stop: Literal["template", "eos"] = Field(
        "template",
        description="What ends an answer: the token that the chat template writes, or the tokenizer's EOS"
        " token, for a template that writes none.",
    )
    system_as: Literal["system", "user"] = Field(
        "system",
        description="`user` puts a system message into the first user turn, for a chat template that has no"
        " such role.",
    )
    new_tokens: list[Annotated[str, Field(pattern=r"^\S(.*\S)?$")]] = Field(
        default_factory=list,
        description="Tokens to add to the tokenizer, such as `[<gene>]` or the marks of `chat_template`. Their"
        " rows in embedding and head begin as the mean of those of the tokens that they replace, are trained"
        " with the adapter, and are in what is merged, exported and served.",
    )
    date: Day | None = Field(
        None,
        description="Day that a chat template is told for today, as `2026-11-28`; default: the day on which"
        " training began, which the run keeps.",
    )
    max_length: Annotated[int, Field(ge=8)] = Field(1024, description="Longest row, in tokens.")
    on_overlength: Literal["error", "drop", "truncate"] = Field(
        "error",
        description="What to do with a row over `max_length`: stop and name it, leave it out and"
        " count it, or cut its end off.",
    )
    on_malformed: Literal["error", "drop"] = Field(
        "error",
        description="What to do with a row that cannot be read or rendered: stop and name it, or leave it"
        " out and count it by reason.",
    )
    repair: list[Repair] = Field(
        default_factory=list,
        description="Repairs of rows, each counted: `merge_turns` joins neighbouring turns of one role,"
        " `drop_leading_assistant` leaves a greeting out, `drop_trailing_user` a last turn without answer,"
        " `blank_system` a system message or input that says `None`, `null` or `N/A`.",
    )
    on_leak: Literal["error", "drop"] = Field(
        "error",
        description="What to do with a training row whose prompt is also held out: stop, or leave it"
        " out of training.",
    )
    train_frac: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="Share of the training rows to train on, chosen by the hash of the prompt: a smaller share is part"
        " of a larger one, where no source has a fractional weight, and what is held out stays the same. halfbyte curve trains on several.",
    )
    validation_frac: Fraction = Field(
        0.0,
        description="Share of prompts whose rows are held out for the loss during training, chosen by the"
        " hash of the prompt, which is all that the model sees before the answer. A prompt stays on its side"
        " when others come or go, but where the hashes of a few would miss a share by more than a half.",
    )
    test_frac: Fraction = Field(
        0.0,
        description="Share of prompts whose rows are held out for the comparison where `test` names none.",
    )
    cache: bool = Field(
        True,
        description="Keep prepared rows in `~/.cache/halfbyte` (or `$HALFBYTE_CACHE`), and reuse"
        " them while rows, settings, tokenizer, template and code are the same. Changes speed, not"
        " the result.",
    )

    def sources(self) -> list[tuple[str, DataSource]]:
        """Return each source with its part, ``train`` or ``test``; every key but ``rows`` has a value.

        The names of the sources differ: of one path they are those of the parts, of a list those of the files
        or folders, with a number where two are alike.
        """
        found: list[tuple[str, DataSource]] = []
        names: set[str] = set()
        for part, entries, split in (
            ("train", self.train, self.train_split),
            ("test", self.test or [], self.test_split),
        ):
            if isinstance(entries, str):
                entries = [DataSource(path=entries, name=part)]
            for entry in entries:
                name = entry.name or _name_of(entry.path)
                numbered = (f"{name}-{number}" for number in itertools.count(2))
                name = next(n for n in itertools.chain([name], numbered) if n not in names)
                names.add(name)
                found.append((part, entry.model_copy(update=self._defaults(entry, name, split))))
        return found

    def _defaults(self, entry: DataSource, name: str, split: str) -> dict[str, Any]:
        keys = ("format", "columns", "system", "subset", "revision", "field", "encoding")
        own = {key: getattr(self, key) for key in keys if getattr(entry, key) is None}
        return own | {"name": name, "split": entry.split or split}


def _name_of(path: str) -> str:
    """Return the name of a file without suffixes, or that of the nearest folder that says more than a split."""
    names = [part.partition(".")[0] or part for part in path.split("/") if part]
    telling = [name for name in names if name not in SPLIT_NAMES and not set(name) & set("*?[")]
    return (telling or names or ["rows"])[-1]
