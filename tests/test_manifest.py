"""The manifest: what it says of a finished run, and that no half or unknown one passes for whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from toys import make_manifest

from halfbyte.errors import RunError
from halfbyte.run_dir import RunDir, read_json, write_json
from halfbyte.trained.manifest import Manifest, finished_manifest, read_manifest


def test_finished_manifest_is_what_was_written(tmp_path: Path) -> None:
    write_json(tmp_path / "adapter" / "adapter_config.json", {})
    manifest = make_manifest(finished=True, held_out_loss=1.25, memory={"micro_batch_size": 2})
    manifest.write(tmp_path / "manifest.json")

    assert finished_manifest(RunDir(tmp_path)) == manifest.model_copy(update={"version": 1})


def test_finished_manifest_names_the_training_command_when_the_run_has_not_finished(
    tmp_path: Path,
) -> None:
    write_json(tmp_path / "adapter" / "adapter_config.json", {})
    make_manifest().write(tmp_path / "manifest.json")

    with pytest.raises(RunError) as caught:
        finished_manifest(RunDir(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}: its training has not finished. Go on with it:"
        f" accelerate launch train/sft.py {tmp_path / 'run.yaml'}"
    )


def test_finished_manifest_names_the_training_command_when_the_adapter_is_not_whole(
    tmp_path: Path,
) -> None:
    (tmp_path / "adapter").mkdir()

    with pytest.raises(RunError) as caught:
        finished_manifest(RunDir(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path / 'adapter' / 'adapter_config.json'} is missing. Make it first:"
        f" accelerate launch train/sft.py {tmp_path / 'run.yaml'}"
    )


def test_manifest_is_none_before_training_began(tmp_path: Path) -> None:
    assert read_manifest(RunDir(tmp_path)) is None


@pytest.mark.parametrize("version", [2, -1, "1", None])
def test_manifest_of_an_unknown_version_is_an_error(tmp_path: Path, version: object) -> None:
    path = tmp_path / "manifest.json"
    write_json(path, make_manifest().as_json() | {"version": version})

    with pytest.raises(RunError) as caught:
        Manifest.read(path)
    assert str(caught.value) == (
        f"{path}: is of version {version!r}, and this halfbyte reads versions 0 to 1. Read the run with"
        " the halfbyte that wrote it, or update this one"
    )


def test_manifest_without_a_version_is_one_of_before_versions(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    make_manifest().write(path)
    content = read_json(path)
    del content["version"]
    write_json(path, content)

    assert Manifest.read(path).version == 0


@pytest.mark.parametrize("missing", ["base", "precision", "stop_ids"])
def test_manifest_that_lacks_a_field_is_an_error_that_names_it(
    tmp_path: Path, missing: str
) -> None:
    path = tmp_path / "manifest.json"
    content = make_manifest().as_json()
    del content[missing]
    write_json(path, content)

    with pytest.raises(RunError, match=rf"is not a whole Manifest \({missing}: field required\)"):
        Manifest.read(path)
