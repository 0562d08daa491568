"""Owns the upload of an artefact and its card to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from halfbyte.errors import RunError, UserError
from halfbyte.run_dir import RunDir, write_text
from halfbyte.ship.card import artefact_card
from halfbyte.trained.artefact import ExportReport


def check_push(name: str) -> None:
    """Check that an upload can succeed, before anything is made.

    Raises:
        UserError: the name is not that of a repository, or no login is found.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push {name}: no name of a repository on the Hub: {error}") from None
    if get_token() is None:
        raise UserError(
            f"--push {name}: no login to the Hub is found. Run `hf auth login` with a write token"
            " (https://huggingface.co/settings/tokens), or set HF_TOKEN"
        )


def push(folder: RunDir, report: ExportReport, name: str) -> str:
    """Upload a proven artefact as NAME and return its address.

    Raises:
        RunError: the Hub rejects it; the artefact stays on the local disk.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    path: Path = folder.export / report.name
    write_text(path / "README.md", artefact_card(folder, report))
    hub = HfApi()
    try:
        hub.create_repo(name, exist_ok=True, private=True)
        hub.upload_folder(repo_id=name, folder_path=path, commit_message=f"{report.name}, proven")
    except (HfHubHTTPError, OSError) as error:
        raise RunError(
            f"{path}: the Hub did not take it: {error}. It stays on this disk"
        ) from error
    return f"https://huggingface.co/{name}"
