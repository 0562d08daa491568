"""Owns a base's tokenizer: it is loaded with the run's new tokens, and saved so that it is read as it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import ModelError, RunError
from halfbyte.model.new_tokens import add_tokens
from halfbyte.model.resolve import Base
from halfbyte.model.untrusted import check_tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG = "tokenizer_config.json"


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """Load the base's fast tokenizer with its new tokens, as ``read_tokenizer`` and ``add_tokens``."""
    tokenizer = read_tokenizer(Path(base.path), base.name)
    if base.new_tokens:
        add_tokens(tokenizer, base)
    return tokenizer


def read_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    """Read a folder's fast tokenizer; a missing pad token becomes the EOS token.

    Padding is recognised by position, never by id, so sharing an id with EOS is safe.

    Raises:
        ModelError: the folder holds no tokenizer, or only a slow one.
    """
    from transformers import AutoTokenizer

    check_tokenizer_files(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
    except Exception as error:  # each kind of tokenizer checks its files in its own way
        raise ModelError(f"{name}: no tokenizer can be loaded from {folder}: {error}") from error
    if not tokenizer.is_fast:
        raise ModelError(f"{name}: has no fast tokenizer (tokenizer.json), which rendering needs")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a fast tokenizer so that ``read_tokenizer`` finds one that reads every text alike.

    transformers 5.23 builds some tokenizers anew from their class, and no longer saves what says how: a Llama-2
    tokenizer with ``legacy`` comes back without the mark at the beginning of a text. Such a one is saved
    under the class that takes tokenizer.json as it is.

    Raises:
        RunError: no class reads it as it was.
    """
    tokenizer.save_pretrained(folder)
    wanted = _rules(tokenizer)
    if _rules(read_tokenizer(folder, str(folder))) == wanted:
        return
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if _rules(read_tokenizer(folder, str(folder))) != wanted:
        raise RunError(
            f"{folder}: transformers reads the saved {type(tokenizer).__name__} otherwise than the one in memory"
        )


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the hex sha256 of all that decides how a fast tokenizer reads a text."""
    return hashlib.sha256(json.dumps(_rules(tokenizer), sort_keys=True).encode()).hexdigest()


def _rules(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return what decides how a fast tokenizer reads a text."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    keys = ("normalizer", "pre_tokenizer", "model", "added_tokens")
    return [rules.get(key) for key in keys], tokenizer("x").input_ids
