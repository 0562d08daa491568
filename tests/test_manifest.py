"""The manifest: what it says of a finished run, and that no half or unknown one passes for whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from toys import make_manifest

from halfbyte.errors import RunError
from halfbyte.run_dir import RunDir, digests, write_json
from halfbyte.trained.manifest import Manifest, finished_manifest, read_manifest


def test_finished_manifest_is_what_was_written(tmp_path: Path) -> None:
    write_json(tmp_path / "adapter" / "adapter_config.json", {})
    manifest = make_manifest(finished=True, held_out_loss=1.25, memory={"micro_batch_size": 2})
    manifest.write(tmp_path / "manifest.json")

    assert finished_manifest(RunDir(tmp_path)) == manifest.model_copy(update={"version": 2})


def test_finished_manifest_names_the_training_command_when_the_run_has_not_finished(
    tmp_path: Path,
) -> None:
    write_json(tmp_path / "adapter" / "adapter_config.json", {})
    make_manifest().write(tmp_path / "manifest.json")

    with pytest.raises(RunError) as caught:
        finished_manifest(RunDir(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}: its training has not finished. Go on with it:"
        f" halfbyte train {tmp_path / 'run.yaml'}"
    )


def test_finished_manifest_names_the_training_command_when_the_adapter_is_not_whole(
    tmp_path: Path,
) -> None:
    (tmp_path / "adapter").mkdir()

    with pytest.raises(RunError) as caught:
        finished_manifest(RunDir(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path / 'adapter' / 'adapter_config.json'} is missing. Make it first:"
        f" halfbyte train {tmp_path / 'run.yaml'}"
    )


def test_manifest_is_none_before_training_began(tmp_path: Path) -> None:
    assert read_manifest(RunDir(tmp_path)) is None


@pytest.mark.parametrize("version", [3, -1, "1", None])
def test_manifest_of_an_unknown_version_is_an_error(tmp_path: Path, version: object) -> None:
    path = tmp_path / "manifest.json"
    write_json(path, make_manifest().as_json() | {"version": version})

    with pytest.raises(RunError) as caught:
        Manifest.read(path)
    assert str(caught.value) == (
        f"{path}: is of version {version!r}, and this halfbyte reads versions 0 to 2. Read the run with"
        " the halfbyte that wrote it, or update this one"
    )


def test_manifest_without_a_version_is_one_of_before_versions(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    content = make_manifest().as_json()
    del content["version"]
    write_json(path, content)

    assert Manifest.read(path).version == 0


def test_every_flipped_bit_of_a_manifest_is_seen(tmp_path: Path) -> None:
    """Also one in a key or in the version, that would make the file an older one without a digest."""
    path = tmp_path / "manifest.json"
    make_manifest(finished=True, memory={"rows": {2: 0.1}}, held_out_loss=1 / 3).write(path)
    content, whole = path.read_bytes(), Manifest.read(path)
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = Manifest.read(path)
        except RunError:
            continue
        assert found == whole, bit  # white space alone


@pytest.mark.parametrize("fault", ["flipped", "gone", "cut short"])
def test_an_adapter_that_is_not_the_one_that_was_trained_is_refused(
    tmp_path: Path, fault: str
) -> None:
    """One flipped bit in a weight, or another alpha, loads without a word elsewhere."""
    folder = RunDir(tmp_path)
    path = folder.adapter / "adapter_model.safetensors"
    write_json(folder.adapter / "adapter_config.json", {"lora_alpha": 8})
    path.write_bytes(bytes(range(64)))
    make_manifest(finished=True, adapter_sha256=digests(folder.adapter)).write(folder.manifest)
    assert finished_manifest(folder).finished
    if fault == "flipped":
        path.write_bytes(bytes([1 << 6, *range(1, 64)]))
    elif fault == "gone":
        path.unlink()
    else:
        path.write_bytes(bytes(range(63)))
    with pytest.raises(RunError, match=f"{path}: is not the file that the training wrote"):
        finished_manifest(folder)
    path.write_bytes(bytes(range(64)))
    write_json(folder.adapter / "adapter_config.json", {"lora_alpha": 16})
    with pytest.raises(RunError, match=r"adapter_config\.json: is not the file that the training"):
        finished_manifest(folder)


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


@pytest.mark.parametrize("content", [None, 5, "text", [], ["digest"]])
def test_a_manifest_that_is_no_object_is_an_error_that_names_it(
    tmp_path: Path, content: object
) -> None:
    path = tmp_path / "manifest.json"
    write_json(path, content)
    with pytest.raises(RunError, match=f"{path}: is not a whole Manifest"):
        Manifest.read(path)
