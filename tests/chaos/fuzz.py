"""Configs and rows made by chance: each is taken, or refused with one error that names its place, in little time."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from chaos.farm import run
from chaos.outcome import Case
from chaos.scene import OFFLINE, Scene

CONFIGS, ROWS = "fuzzed configs", "fuzzed datasets"
A_CASE, SETS_A_CASE = 100, 20
MAX_SECONDS = 5.0
SCALARS = (
    "1", "-1", "0", "1e400", "-1e-400", ".nan", ".inf", "-.inf", "0x10", "0o7", "010", "1_000", "yes", "no", "null",
    "~", "true", '""', "'", "[]", "{}", "[1, [2]]", "{a: b}", "!!int x", "!!binary 4", "&a 1", "*a", "|\n    x", "> x",
    "2024-01-01", "12:30:45", "\u2028", "\U0001f600", "\x85", "é" * 50, "../../x", "/dev/null", "~root/x", "a b", "@x",
    "%x", "`x`", "- - x", "? x", ": x", "#", "auto", "nf4", "on", "off", "9" * 400, "1" * 5000, "1e5", "0.1", "\t1",
)  # fmt: skip
KEYS = (
    "",
    "name",
    "ſeed",
    "SEED",
    "model",
    "1",
    "null",
    "<<",
    "=",
    "a.b",
    "é",
    "?",
    "__class__",
    "x" * 300,
)


def cases(scene: Scene, scale: float) -> Iterator[Case]:
    """10,000 configs and 2,000 datasets, in batches."""
    for number in range(round(100 * scale) or 1):
        yield Case(CONFIGS, f"{A_CASE} from seed {number}", partial(_configs, scene, number))
    for number in range(round(100 * scale) or 1):
        yield Case(ROWS, f"{SETS_A_CASE} from seed {number}", partial(_datasets, scene, number))


def _configs(scene: Scene, seed: int) -> str:
    from halfbyte.config import load_run
    from halfbyte.config.read import keys_of
    from halfbyte.errors import ConfigError

    chance = random.Random(seed)
    folder = scene.folder(f"fuzz-{seed}")
    usual = json.loads(scene.config(folder).read_text())
    for number in range(A_CASE):
        text = _config(chance, usual, keys_of)
        path = folder / f"{number}.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        overrides = [_override(chance, keys_of) for _ in range(chance.choice((0, 0, 1, 2)))]
        begun = time.monotonic()
        try:
            load_run(path, overrides, {})
        except ConfigError as error:
            if not error.faults or not all(error.faults):
                return f"{path}: an error without a text"
        except Exception as error:
            return f"{path} {overrides}: {type(error).__name__}: {error}"[:400]
        if time.monotonic() - begun > MAX_SECONDS:
            return f"{path}: took {time.monotonic() - begun:.1f} s"
        path.unlink()
    return ""


def _config(chance: random.Random, usual: dict[str, Any], keys_of: Any) -> str:
    """Return the text of a working config with a few changes of keys, values or characters."""
    lines: list[str] = []
    for section, values in usual.items():
        if chance.random() < 0.05:
            continue
        if not isinstance(values, dict):
            lines.append(f"{section}: {json.dumps(values)}")
            continue
        lines.append(f"{section}:")
        known = keys_of((section,))
        for key, value in values.items():
            text = json.dumps(value) if chance.random() < 0.93 else chance.choice(SCALARS)
            lines.append(f"  {key if chance.random() < 0.97 else chance.choice(KEYS)}: {text}")
        if known and chance.random() < 0.5:
            lines.append(f"  {chance.choice(known)}: {chance.choice(SCALARS)}")
    text = "\n".join(lines) + "\n"
    for _ in range(chance.choice((0, 0, 0, 1, 3))):
        at = chance.randrange(len(text))
        junk = chance.choice(
            ["", "\0", "\t", "\n", "{", "}", "[", "&", "*", "!", "%", "\ud800", "\ufeff", text[:at]]
        )
        text = text[:at] + junk + text[at + chance.randrange(3) :]
    return text


def _override(chance: random.Random, keys_of: Any) -> str:
    section = chance.choice(keys_of(()))
    keys = keys_of((section,)) or [""]
    shape = chance.choice(
        ["{s}.{k}={v}", "{s}={v}", "{s}.{k}", "={v}", "{s}.{k}.x={v}", ".{k}={v}", "{s}..{k}={v}"]
    )
    return shape.format(s=section, k=chance.choice(keys), v=chance.choice(SCALARS))


def _datasets(scene: Scene, seed: int) -> str:
    chance = random.Random(seed)
    for number in range(SETS_A_CASE):
        folder = scene.folder(f"fuzz-rows-{seed}")
        suffix = chance.choice((".jsonl", ".jsonl", ".json", ".csv", ".tsv"))
        (folder / f"rows{suffix}").write_bytes(_rows(chance, suffix))
        config = scene.config(folder, data={"train": f"rows{suffix}"})
        ended = run("data/preview.py", config, log=folder / "log", environ=OFFLINE, timeout_s=20)
        if ended.crash or ended.code not in (0, 1, 2):
            return f"set {number}: {ended.crash or ended.code}"
        if ended.code and "error: " not in ended.text:
            return f"set {number}: no error: {ended.text[-200:]}"
        if ended.seconds > MAX_SECONDS:
            return f"set {number}: took {ended.seconds:.1f} s"
    return ""


def _rows(chance: random.Random, suffix: str) -> bytes:
    rows = [_row(chance) for _ in range(chance.choice((0, 1, 3, 12)))]
    if suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=chance.random() < 0.5) + "\n" for row in rows)
    elif suffix == ".json":
        text = json.dumps(rows if chance.random() < 0.8 else {"data": rows})
    else:
        mark = "," if suffix == ".csv" else "\t"
        cells = [
            [str(row.get("prompt")), str(row.get("completion"))]
            for row in rows
            if isinstance(row, dict)
        ]
        text = "\n".join(mark.join(line) for line in [["prompt", "completion"], *cells])
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(chance.choice((0, 0, 1, 4))):
        if content:
            at = chance.randrange(len(content))
            content[at : at + chance.randrange(4)] = chance.randbytes(chance.randrange(4))
    return bytes(content)


def _row(chance: random.Random) -> Any:
    odd: tuple[Any, ...] = (
        None, "", " ", 0, -1.5, True, [], {}, [None], {"a": 1}, "x" * 3000, "\0", "\ud800", "<|im_end|>", "é", 10**30,
        float("nan"), [[["deep"]]], "\u202e", {"role": "user"}, [{"role": "user", "content": "a"}],
    )  # fmt: skip
    text = f"diagnosis {chance.randrange(999)}"
    good: Any = {"prompt": text, "completion": "b"}
    kind = chance.randrange(6)
    if kind == 0:
        return chance.choice(odd)
    if kind == 1:
        return {**good, chance.choice(list(good)): chance.choice(odd)}
    if kind == 2:
        turns = [
            {
                "role": chance.choice(("user", "assistant", "system", "tool", "x", None)),
                "content": chance.choice((*odd, text)),
            }
            for _ in range(chance.randrange(4))
        ]
        return {"messages": turns}
    if kind == 3:
        return {**good, "weight": chance.choice(odd), "tools": chance.choice(odd)}
    return good
