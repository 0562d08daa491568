"""Checkpoints: complete or not there, verified before use, and deleted only when a newer one is whole."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from halfbyte.errors import RunError
from halfbyte.train import checkpoints as checkpoints_module
from halfbyte.train.checkpoints import (
    PICKLED,
    SEAL,
    STAGED,
    Seal,
    commit,
    fault_of,
    keep_newest,
    newest_checkpoint,
    stage,
    staged,
)
from halfbyte.train.finite import check_finite

FILES = ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "global/shard.pt")


def write(folder: Path, step: int) -> Path:
    """Write a checkpoint as the Trainer does, up to the commit."""
    written = stage(folder) / f"checkpoint-{step}"
    for name in (*FILES, PICKLED):
        (written / name).parent.mkdir(parents=True, exist_ok=True)
        (written / name).write_text(f"{name} of step {step}", encoding="utf-8")
    return written


def make(folder: Path, step: int, processes: int = 1) -> Path:
    """A whole checkpoint."""
    commit(write(folder, step), folder, processes)
    return folder / f"checkpoint-{step}"


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


def test_newest_goes_by_number_when_names_sort_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, 9)
    newest = make(tmp_path, 100)
    make(tmp_path, 20)
    assert newest_checkpoint(tmp_path, 1) == newest
    assert capsys.readouterr().out == ""
    assert not (newest / PICKLED).exists()


@pytest.mark.parametrize("name", [*FILES, SEAL])
def test_every_flipped_bit_of_every_file_is_seen_and_the_one_before_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    before, damaged = make(tmp_path, 5), make(tmp_path, 10)
    content = (damaged / name).read_bytes()
    bits = range(8 * len(content))
    for bit in bits[:: max(1, len(bits) // 400)]:
        flip(damaged / name, bit)
        assert newest_checkpoint(tmp_path, 1) == before, bit
        told = capsys.readouterr().out
        assert told.startswith(f"warning: {damaged} is passed over: ")
        assert Path(name).name in told
        (damaged / name).write_bytes(content)
    assert newest_checkpoint(tmp_path, 1) == damaged


@pytest.mark.parametrize("name", [*FILES, SEAL])
@pytest.mark.parametrize("fault", ["gone", "empty", "cut short", "of another step"])
def test_a_file_that_is_not_its_own_is_seen(tmp_path: Path, name: str, fault: str) -> None:
    before, damaged = make(tmp_path, 5), make(tmp_path, 10)
    path = damaged / name
    if fault == "gone":
        path.unlink()
    else:
        content = path.read_bytes()
        other = (before / name).read_bytes()
        path.write_bytes({"empty": b"", "cut short": content[:-2]}.get(fault, other))
    assert fault_of(damaged)
    assert newest_checkpoint(tmp_path, 1) == before


def test_a_strange_file_and_another_name_are_seen(tmp_path: Path) -> None:
    path = make(tmp_path, 5)
    (path / "adapter_model.bin").write_text("x")
    assert fault_of(path) == "adapter_model.bin was not written with it"
    (path / "adapter_model.bin").unlink()
    assert fault_of(path) == ""
    assert fault_of(path.rename(tmp_path / "checkpoint-6")) == "it is that of step 5"


def test_none_whole_is_an_error_that_names_each(tmp_path: Path) -> None:
    (make(tmp_path, 5) / SEAL).unlink()
    (make(tmp_path, 10) / "optimizer.pt").unlink()
    with pytest.raises(
        RunError, match=r"none .* is whole: checkpoint-10: optimizer\.pt is missing; checkpoint-5"
    ):
        newest_checkpoint(tmp_path, 1)


@pytest.mark.parametrize("exists", [True, False])
def test_no_checkpoint_is_none(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "checkpoints"
    if exists:
        stage(folder)
    assert newest_checkpoint(folder, 1) is None


def test_another_number_of_processes_is_refused_by_name(tmp_path: Path) -> None:
    make(tmp_path, 5, processes=2)
    assert newest_checkpoint(tmp_path, 2) is not None
    with pytest.raises(RunError, match=r"by 2 processes, and 1 are to go on\..*--num_processes 2"):
        newest_checkpoint(tmp_path, 1)


def test_other_libraries_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path, 5)
    monkeypatch.setattr(checkpoints_module, "library_version", lambda name: "0.0")
    assert newest_checkpoint(tmp_path, 1) == path
    assert f"torch {torch.__version__} → 0.0" in capsys.readouterr().out


def test_only_the_newest_are_kept_and_links_are_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "checkpoint-1").mkdir(parents=True)
    folder = tmp_path / "checkpoints"
    for step in (5, 10, 15):
        make(folder, step)
    (folder / "checkpoint-1").symlink_to(elsewhere / "checkpoint-1")
    keep_newest(folder, 2)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-10", "checkpoint-15"}
    assert (elsewhere / "checkpoint-1").is_dir()


def test_a_step_that_is_saved_again_replaces_the_damaged_one(tmp_path: Path) -> None:
    flip(make(tmp_path, 5) / "optimizer.pt", 3)
    assert fault_of(make(tmp_path, 5)) == ""
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]


class Killed(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("again", [False, True])
def test_a_kill_at_any_call_of_a_commit_leaves_the_checkpoint_before_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """At each write, flush and rename, with one checkpoint kept; then the next attempt succeeds."""
    alone: Any = SimpleNamespace(
        is_main_process=True, num_processes=1, wait_for_everyone=lambda: None
    )
    outcomes = set()
    for at in itertools.count():
        folder = tmp_path / str(at)
        before = make(folder, 5)
        if again:
            make(folder, 10)
        calls = itertools.count()

        def dies(call: Callable[..., object]) -> Callable[..., object]:
            def maybe(*args: object, **options: object) -> object:
                if next(calls) == at:  # noqa: B023 (called within the loop)
                    raise Killed
                return call(*args, **options)

            return maybe

        with monkeypatch.context() as patched:
            for name in ("fsync", "replace", "rename", "open"):
                patched.setattr(f"os.{name}", dies(getattr(__import__("os"), name)))
            try:
                with staged(folder, 10, 1, alone):
                    write(folder, 10)
                survived = True
            except Killed:
                survived = False
        newest = newest_checkpoint(folder, 1)
        assert newest in (before, folder / "checkpoint-10")
        outcomes.add(newest == before)
        assert make(folder, 15) == newest_checkpoint(folder, 1)
        assert not (folder / STAGED / "checkpoint-10").exists()
        if survived:
            break
        shutil.rmtree(folder)
    assert at > 10
    assert outcomes == {True, False}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_that_is_not_finite_is_saved(bad: float) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(2)
    optimizer.step()
    check_finite(3, [weight], optimizer)
    optimizer.state[weight]["exp_avg_sq"][1] = bad
    with pytest.raises(RunError, match=r"step 3: 1 of the optimizer's states hold NaN"):
        check_finite(3, [weight], optimizer)
    with pytest.raises(RunError, match=r"step 3: 1 of the adapter's weights hold NaN"):
        check_finite(3, [torch.tensor([bad])], optimizer)


def test_a_seal_is_json_that_says_what_it_is_of(tmp_path: Path) -> None:
    path = make(tmp_path, 5, processes=2) / SEAL
    content = json.loads(path.read_text())
    assert (content["step"], content["processes"]) == (5, 2)
    assert content["sha256"].keys() == set(FILES)
    assert Seal.read(path).step == 5
