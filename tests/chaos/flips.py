"""Bits that flip, files that are cut short, go or are swapped: each is named before anything is made of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from chaos.farm import run
from chaos.outcome import Case
from chaos.scene import OFFLINE, Scene, difference, learnt, train

KIND = "damaged files"
BITS = 20  # places of a file
# What reads each part of a run, and would build on it.
READERS: dict[str, tuple[str, Sequence[str]]] = {
    "run.yaml": ("train/merge.py", ()),
    "manifest.json": ("train/merge.py", ()),
    "ledger.json": ("train/merge.py", ()),
    "data": ("eval/compare.py", ()),
    "adapter": ("train/merge.py", ()),
    "merged": ("train/export.py", ("--to", "adapter")),
    "export": ("eval/serve.py", ("--check",)),
}
UNREAD = {
    "README.md",  # for people
    "validation.jsonl",  # empty here
    "train.jsonl",  # for the opponents, in the comparison
}
Damage = Callable[[bytes], bytes | None]


def cases(scene: Scene, scale: float) -> Iterator[Case]:
    """Each file of a finished run, of its base and of an unfinished run's checkpoint."""
    ready = scene.folder("flip-ready")
    config = scene.config(ready)
    run_folder = ready / "runs" / "tiny"
    assert train(config).code == 0
    wanted = learnt(run_folder)
    for script, *options in (("train/merge.py",), ("train/export.py", "--to", "adapter")):
        ended = run(script, run_folder, *options, log=ready / "log", environ=OFFLINE)
        assert ended.code == 0, ended.text
    bits = max(1, round(BITS * scale))
    for part in READERS:
        for path in _files(run_folder / part):
            name = str(path.relative_to(run_folder))
            for what, damage in _damages(path.read_bytes(), bits):
                attempt = partial(_is_named, scene, ready, part, name, damage)
                yield Case(KIND, f"{name}: {what}", attempt)
    unfinished = scene.folder("flip-unfinished")
    _leave_unfinished(scene, ready, unfinished)
    newest = unfinished / "runs" / "tiny" / "checkpoints" / "checkpoint-4"
    for path in _files(newest):
        for what, damage in _damages(path.read_bytes(), max(1, bits // 4)):
            attempt = partial(_falls_back, scene, unfinished, path.name, damage, wanted)
            yield Case(KIND, f"checkpoint-4/{path.name}: {what}", attempt)
    # Its tokenizer is not read again: the adapter has its own.
    for path in (scene.base / "config.json", scene.base / "model.safetensors"):
        for what, damage in _damages(path.read_bytes(), max(1, bits // 4)):
            attempt = partial(_base_is_named, scene, ready, path.name, damage)
            yield Case(KIND, f"base/{path.name}: {what}", attempt)


def _files(part: Path) -> list[Path]:
    files = [part] if part.is_file() else sorted(p for p in part.rglob("*") if p.is_file())
    return [path for path in files if path.name not in UNREAD and path.stat().st_size]


def _damages(content: bytes, bits: int) -> Iterator[tuple[str, Damage]]:
    for number in range(bits):
        at = (8 * len(content) - 1) * number // max(1, bits - 1)
        yield f"bit {at}", partial(_flip, at)
    yield "cut to half", lambda whole: whole[: len(whole) // 2]
    yield "without its last bytes", lambda whole: whole[:-2]  # of JSON, the last is a line end
    yield "empty", lambda whole: b""
    yield "gone", lambda whole: None
    yield "zeros", lambda whole: bytes(len(whole))


def _flip(bit: int, content: bytes) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _harm(path: Path, damage: Damage) -> None:
    content = damage(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)


def _is_named(scene: Scene, ready: Path, part: str, name: str, damage: Damage) -> str:
    folder = scene.folder(f"flip-{abs(hash((part, name, damage)))}")
    shutil.copytree(ready / "runs", folder / "runs")
    path = folder / "runs" / "tiny" / name
    _harm(path, damage)
    script, options = READERS[part]
    subject = folder / "runs" / "tiny"
    if part == "export":
        subject = subject / "export" / "adapter"
    ended = run(script, subject, *options, log=folder / "log", environ=OFFLINE)
    shutil.rmtree(folder / "runs")
    if ended.crash or ended.code not in (1, 2):
        return ended.crash or f"{script} ended with {ended.code}: {ended.text[-200:]}"
    return ended.says("error: ", *([part] if part in ("data", "adapter", "merged") else []))


def _leave_unfinished(scene: Scene, ready: Path, folder: Path) -> None:
    """Train, and be killed after the checkpoint of step 4."""
    from chaos.disks import fault

    shutil.copytree(ready, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "runs")
    config = scene.config(folder)
    calls = folder / "calls"
    train(config, environ=fault(folder / "runs", "log", log=calls))
    shutil.rmtree(folder / "runs")
    at = next(
        n for n, line in enumerate(calls.read_text().splitlines(), 1) if "checkpoint-6" in line
    )
    train(config, environ=fault(folder / "runs", "kill", at))


def _falls_back(
    scene: Scene, ready: Path, name: str, damage: Damage, wanted: tuple[str, list[Any]]
) -> str:
    folder = scene.folder(f"flip-back-{abs(hash((name, damage)))}")
    shutil.copytree(ready / "runs", folder / "runs")
    _harm(folder / "runs" / "tiny" / "checkpoints" / "checkpoint-4" / name, damage)
    log = folder / "log"
    runs_dir = f"runs_dir={folder / 'runs'}"
    ended = run("train/sft.py", ready / "tiny.yaml", runs_dir, log=log, environ=OFFLINE)
    if ended.crash or ended.code != 0:
        return ended.crash or f"ended with {ended.code}: {ended.text[-200:]}"
    said = ended.says("checkpoint-4 is passed over: ")
    return said or difference(learnt(folder / "runs" / "tiny"), wanted)


def _base_is_named(scene: Scene, ready: Path, name: str, damage: Damage) -> str:
    folder = scene.folder(f"flip-base-{abs(hash((name, damage)))}")
    shutil.copytree(scene.base, folder / "base")
    shutil.copytree(ready / "runs", folder / "runs")
    own = Scene(folder)
    run_folder = folder / "runs" / "tiny"
    from toys import edit_settings

    edit_settings(run_folder, str(scene.base), str(own.base))
    _harm(own.base / name, damage)
    ended = run("train/merge.py", run_folder, log=folder / "log", environ=OFFLINE)
    shutil.rmtree(folder / "runs")
    if ended.crash or ended.code not in (1, 2):
        return ended.crash or f"merge ended with {ended.code}: {ended.text[-200:]}"
    return ended.says("error: ")
