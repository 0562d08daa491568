"""Owns checks of a model's files from elsewhere, before a library reads them: their sizes, and what those claim."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from halfbyte.bounds import BoundError, check_size, read_bounded_json
from halfbyte.errors import ModelError

MAX_CONFIG_BYTES = 16 << 20
MAX_HEADER_BYTES = 100_000_000  # that of the safetensors library
MAX_TOKENIZER_BYTES = 256 << 20
# The largest published models have 126 layers, a width of 53,248 and 262,208 tokens.
BOUNDS = {
    re.compile(r"(num_.*layers|n_layers?|depth)"): 10_000,
    re.compile(r"(num_.*heads|n_heads?|num_.*experts|.*_size|.*_dim|d_model|.*_rank)"): 1 << 24,
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def check_config(path: Path) -> dict[str, Any]:
    """Return the fields of a config.json, once its sizes are known to be those of a model.

    Raises:
        ModelError: it is no JSON object, is too large or nested too deep, or a size in it is beyond any model's.
    """
    try:
        fields = read_bounded_json(path, MAX_CONFIG_BYTES)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: damaged JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ModelError(f"{path}: holds {type(fields).__name__}; a model's config is an object")
    _check_sizes(path, fields)
    return fields


def _check_sizes(path: Path, fields: dict[str, Any]) -> None:
    for key, value in fields.items():
        if isinstance(value, dict):
            _check_sizes(path, value)
        most = next((most for name, most in BOUNDS.items() if name.fullmatch(key)), None)
        if most is not None and isinstance(value, int) and not 0 <= value <= most:
            raise ModelError(
                f"{path}: {key} is {value}; allowed: 0 to {most:,}. Is the file damaged?"
            )


def check_weights(path: Path) -> None:
    """Check that a safetensors file is whole: that its header can be read, and its tensors fill the rest.

    Raises:
        ModelError: it is not.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
        if size > min(MAX_HEADER_BYTES, path.stat().st_size):
            raise ModelError(
                f"{path}: is no whole safetensors file: its header is said to have {size:,} bytes, and the file has"
                f" {path.stat().st_size:,}. Download it again"
            )
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, ValueError, OverflowError, OSError) as error:
        raise ModelError(
            f"{path}: is no whole safetensors file: {error}. Download it again"
        ) from None


def check_tokenizer_files(folder: Path) -> None:
    """Check that a tokenizer's files are files, of a size that tokenizers have.

    Raises:
        ModelError: one is not.
    """
    for path in (folder / name for name in TOKENIZER_FILES):
        try:
            check_size(path, MAX_TOKENIZER_BYTES)
        except FileNotFoundError:
            continue
        except BoundError as error:
            raise ModelError(f"{path}: is no tokenizer's file: {error}") from None
