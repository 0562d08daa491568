"""Files made to run code, to hang, to fill memory or to lead elsewhere: each refused within seconds, with one error."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import socket
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from chaos.farm import run
from chaos.outcome import Case
from chaos.scene import OFFLINE, Scene

KIND = "hostile files"
MAX_SECONDS, MAX_BYTES = 5.0, 1 << 30
CANARY = "canary"
Attack = Callable[[Path, Scene], tuple[str, list[object]]]
ATTACKS: dict[str, Attack] = {}


def cases(scene: Scene, scale: float) -> Iterator[Case]:
    """Every attack, whatever the scale; below 0.1 every fifth."""
    folder = scene.folder("hostile-none")
    usual = run("train/plan.py", scene.config(folder), log=folder / "log", environ=OFFLINE)
    for name in list(ATTACKS)[:: 1 if scale >= 0.1 else 5]:
        yield Case(KIND, name, partial(_refused, scene, name, usual.peak_bytes))


def _refused(scene: Scene, name: str, usual_bytes: int) -> str:
    folder = scene.folder("hostile-" + "".join(c if c.isalnum() else "-" for c in name))
    script, arguments = ATTACKS[name](folder, scene)
    ended = run(
        script,
        *arguments,
        log=folder / "log",
        environ=OFFLINE,
        before=lambda: _guard(folder),
        timeout_s=20,
    )
    if (folder / CANARY).exists():
        return "its code ran"
    if (folder / "socket").exists():
        return "a connection was made"
    if ended.crash:
        return ended.crash
    if ended.code not in (1, 2) or "error: " not in ended.text:
        return f"ended with {ended.code}: {ended.text[-300:]}"
    if ended.seconds > MAX_SECONDS:
        return f"took {ended.seconds:.1f} s"
    more = ended.peak_bytes - usual_bytes
    return f"took {more / 1e9:.1f} GB" if more > MAX_BYTES else ""


def _guard(folder: Path) -> None:
    """Let every connection out of the process leave a trace and fail."""

    def connect(self: socket.socket, address: Any) -> None:
        (folder / "socket").write_text(str(address))
        raise OSError("no connections here")

    setattr(socket.socket, "connect", connect)  # noqa: B010


def attack(name: str) -> Callable[[Attack], Attack]:
    """Register a function that builds an attack and returns the command that meets it."""

    def register(build: Attack) -> Attack:
        ATTACKS[name] = build
        return build

    return register


class Touch:
    """An object whose unpickling makes the canary."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.folder / CANARY}",)


# Configs


def config_attack(name: str, content: Callable[[Path], bytes | str]) -> None:
    """Register a config with this content."""

    def build(folder: Path, scene: Scene) -> tuple[str, list[object]]:
        path, written = folder / "c.yaml", content(folder)
        path.write_bytes(written if isinstance(written, bytes) else written.encode())
        return "train/sft.py", [path]

    ATTACKS[f"config: {name}"] = build


def _bomb(kind: str) -> str:
    lines = [f"a0: &a0 {'[x, x, x, x, x, x, x, x, x]' if kind == 'list' else '{k: x, l: x, m: x}'}"]
    for n in range(1, 12):
        parts = ", ".join([f"*a{n - 1}"] * 9)
        keyed = ", ".join(f"k{i}: *a{n - 1}" for i in range(9))
        lines.append(f"a{n}: &a{n} " + (f"[{parts}]" if kind == "list" else f"{{{keyed}}}"))
    return "\n".join(lines)


config_attack("aliases of lists", lambda folder: _bomb("list"))
config_attack("aliases of mappings", lambda folder: _bomb("mapping"))
config_attack(
    "merge keys",
    lambda folder: (
        "a: &a {x: 1}\nb: &b {<<: [*a, *a, *a]}\n"
        + "\n".join(
            f"c{n}: &c{n} {{<<: [{', '.join([f'*c{n - 1}' if n else '*b'] * 9)}]}}"
            for n in range(12)
        )
    ),
)
config_attack("an alias of itself", lambda folder: "model: &m {name: *m}\n")
config_attack("two million keys", lambda folder: "".join(f"k{n}: 1\n" for n in range(2_000_000)))
config_attack("a comment of 100 MB", lambda folder: "#" * 100_000_000 + "\nmodel: {name: x}\n")
config_attack("a text of 50 MB", lambda folder: "name: " + "x" * 50_000_000)
config_attack("lists nested 100,000 deep", lambda folder: "[" * 100_000)
config_attack("mappings nested 20,000 deep", lambda folder: "{a: " * 20_000)
config_attack("blocks nested deep", lambda folder: "".join(" " * n + "a:\n" for n in range(3_000)))
config_attack(
    "os.system", lambda f: f"model: !!python/object/apply:os.system ['touch {f / CANARY}']\n"
)
config_attack("a Python name", lambda folder: "model: !!python/name:os.system\n")
config_attack("a Python module", lambda folder: "model: !!python/module:antigravity\n")
config_attack("a number of 5,000 digits", lambda folder: "seed: " + "9" * 5_000)
config_attack("a number of 100,000 digits", lambda folder: "seed: 0x" + "f" * 100_000)
config_attack("an exponent of a billion", lambda folder: "train: {learning_rate: 1e999999999}")
config_attack("random bytes", lambda folder: bytes(range(256)) * 400)
config_attack("NUL", lambda folder: "model: \0\n")
config_attack("UTF-16", lambda folder: "model: {name: x}".encode("utf-16"))
config_attack("many documents", lambda folder: "---\na: 1\n" * 10_000)
config_attack("anchors without end", lambda folder: "a: " + "&x " * 50_000)
config_attack("quotes without end", lambda folder: 'a: "' + "\\u0041" * 20_000)


@attack("config: a fifo")
def _config_fifo(folder: Path, scene: Scene) -> tuple[str, list[object]]:
    os.mkfifo(folder / "c.yaml")
    return "train/sft.py", [folder / "c.yaml"]


@attack("config: /dev/zero")
def _config_zero(folder: Path, scene: Scene) -> tuple[str, list[object]]:
    return "train/sft.py", ["/dev/zero"]


# Chat templates


def template_attack(name: str, source: Callable[[Path], str]) -> None:
    """Register a chat template."""

    def build(folder: Path, scene: Scene) -> tuple[str, list[object]]:
        (folder / "t.jinja").write_text(source(folder))
        data = {"chat_template": "t.jinja"}
        return "train/sft.py", [scene.config(folder, data=data)]

    ATTACKS[f"template: {name}"] = build


USUAL = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
template_attack(
    "nested loops",
    lambda f: (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999)"
        " %}{% endfor %}{% endfor %}{% endfor %}" + USUAL
    ),
)
template_attack("a power", lambda f: "{% set x = 10 ** (10 ** 8) %}" + USUAL)
template_attack("a power of a power", lambda f: "{% set x = 9 ** (9 ** (9 ** 9)) %}" + USUAL)
template_attack("a text of 10 GB", lambda f: "{% set x = 'aaaaaaaaaa' * 10 ** 9 %}" + USUAL)
template_attack("a list of 10 GB", lambda f: "{% set x = [0] * 10 ** 10 %}" + USUAL)
template_attack("a format of 10 GB", lambda f: "{% set x = '%10000000000d' % 1 %}" + USUAL)
template_attack("ljust", lambda f: "{% set x = 'a'.ljust(10 ** 10) %}" + USUAL)
template_attack("center", lambda f: "{% set x = 'a' | center(10 ** 10) %}" + USUAL)
template_attack(
    "doubling",
    lambda f: (
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x"
        " %}{% endfor %}" + USUAL
    ),
)
template_attack(
    "output of 10 GB", lambda f: "{% for a in range(99999) %}{{ 'a' * 100000 }}{% endfor %}" + USUAL
)
template_attack(
    "a macro of itself", lambda f: "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}" + USUAL
)
template_attack(
    "brackets nested deep", lambda f: "{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}" + USUAL
)
template_attack(
    "blocks nested deep", lambda f: "{% if true %}" * 5_000 + "{% endif %}" * 5_000 + USUAL
)
template_attack("50 MB", lambda f: "{# " + "x" * 50_000_000 + " #}" + USUAL)
template_attack("classes", lambda f: f"{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}{USUAL}")
template_attack(
    "globals",
    lambda f: "{{ lipsum.__globals__.os.system('touch " + str(f / CANARY) + "') }}" + USUAL,
)
template_attack(
    "cycler",
    lambda f: (
        "{{ cycler.__init__.__globals__.os.system('touch " + str(f / CANARY) + "') }}" + USUAL
    ),
)
template_attack(
    "a format with attributes",
    lambda f: "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}" + USUAL,
)
template_attack("include", lambda f: "{% include '/etc/passwd' %}" + USUAL)
template_attack("import", lambda f: "{% import 'os' as os %}{{ os.system('true') }}" + USUAL)
template_attack("a change of the messages", lambda f: "{{ messages.append(messages) }}" + USUAL)
template_attack(
    "a sort of all pairs",
    lambda f: (
        "{% for a in range(9999) %}{% set x = range(99999) | list | sort %}{% endfor %}" + USUAL
    ),
)


# Weights and models


def base_attack(name: str, spoil: Callable[[Path, Path], object]) -> None:
    """Register a base model that ``spoil(folder of the base, folder of the case)`` changes."""

    def build(folder: Path, scene: Scene) -> tuple[str, list[object]]:
        base = folder / "base"
        base.mkdir()
        for file in scene.base.iterdir():
            (base / file.name).write_bytes(file.read_bytes())
        spoil(base, folder)
        return "train/sft.py", [scene.config(folder, model={"name": str(base)})]

    ATTACKS[f"model: {name}"] = build


def weights(content: bytes) -> Callable[[Path, Path], object]:
    """Replace the weights."""
    return lambda base, folder: (base / "model.safetensors").write_bytes(content)


def header(tensors: Any, data: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


def config_of(**fields: Any) -> Callable[[Path, Path], object]:
    """Change the config of the base."""

    def spoil(base: Path, folder: Path) -> None:
        path = base / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return spoil


def tensor(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    """An entry of a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


NAME = "model.embed_tokens.weight"
base_attack("a header of 10 GB", weights(struct.pack("<Q", 10_000_000_000) + b"{}"))
base_attack("a header beyond the file", weights(struct.pack("<Q", 90_000) + b"{}"))
base_attack("a header of 2^64", weights(b"\xff" * 8 + b"{}"))
base_attack("a header that is no JSON", weights(header(b"x" * 100)))
base_attack("a header nested deep", weights(header(b'{"a":' * 100_000)))
base_attack("a header that is a list", weights(header([])))
base_attack(
    "overlapping tensors",
    weights(header({"a": tensor([2], [0, 8]), "b": tensor([2], [4, 12])}, b"\0" * 12)),
)
base_attack("a tensor beyond the file", weights(header({NAME: tensor([2], [0, 8])}, b"\0" * 4)))
base_attack(
    "an overflowing shape", weights(header({NAME: tensor([2**40, 2**40], [0, 8])}, b"\0" * 8))
)
base_attack("a negative shape", weights(header({NAME: tensor([-2], [0, 8])}, b"\0" * 8)))
base_attack("an unknown dtype", weights(header({NAME: tensor([2], [0, 8], "X9")}, b"\0" * 8)))
base_attack("no byte of weights", weights(b""))
base_attack("weights of another model", weights(header({"x": tensor([2], [0, 8])}, b"\0" * 8)))
base_attack("a billion layers", config_of(num_hidden_layers=10**9))
base_attack("a width of 2^40", config_of(hidden_size=2**40))
base_attack("a vocabulary of 2^40", config_of(vocab_size=2**40))
base_attack("negative layers", config_of(num_hidden_layers=-3))
base_attack("layers in words", config_of(num_hidden_layers="many"))
base_attack("a billion heads", config_of(num_attention_heads=10**9))
base_attack("no model type", config_of(model_type=None))
base_attack("an unknown model type", config_of(model_type="../../evil"))
base_attack("a list for a config", lambda base, f: (base / "config.json").write_text("[]"))
base_attack(
    "a config nested deep",
    lambda base, f: (base / "config.json").write_text('{"a":' * 100_000),
)
base_attack(
    "a config of 200 MB",
    lambda base, f: (base / "config.json").write_text('{"a": "' + "x" * 200_000_000 + '"}'),
)
base_attack(
    "a tokenizer that is no JSON",
    lambda base, f: (base / "tokenizer.json").write_text("{"),
)
base_attack(
    "a tokenizer nested deep",
    lambda base, f: (base / "tokenizer.json").write_text('{"a":' * 100_000),
)
base_attack("an empty tokenizer", lambda base, f: (base / "tokenizer.json").write_text("{}"))
base_attack(
    "a tokenizer config of junk",
    lambda base, f: (base / "tokenizer_config.json").write_bytes(b"\xff\xfe"),
)


def _pickled(base: Path, case: Path) -> None:
    (base / "model.safetensors").unlink()
    torch.save({NAME: Touch(case)}, base / "pytorch_model.bin")


base_attack("a pickle for weights", _pickled)


def _bare_pickle(base: Path, case: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(case)))


base_attack("a bare pickle for weights", _bare_pickle)


def _auto_map(base: Path, case: Path) -> None:
    code = f"import os\nos.system('touch {case / CANARY}')\nclass C: pass\n"
    (base / "modeling_evil.py").write_text(code)
    own = {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.C"}
    config_of(auto_map=own, model_type="evil")(base, case)


base_attack("code of its own", _auto_map)


def _tokenizer_code(base: Path, case: Path) -> None:
    (base / "evil.py").write_text(f"import os\nos.system('touch {case / CANARY}')\nclass T: pass\n")
    own = {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "T"}
    (base / "tokenizer_config.json").write_text(json.dumps(own))
    (base / "tokenizer.json").unlink()


base_attack("a tokenizer with code of its own", _tokenizer_code)


base_attack(
    "kernels from elsewhere",
    config_of(_attn_implementation_internal="evil/kernels", model_type="x"),
)


def _base_fifo(base: Path, case: Path) -> None:
    (base / "config.json").unlink()
    os.mkfifo(base / "config.json")


base_attack("a fifo for its config", _base_fifo)


# GGUF


def gguf_attack(name: str, content: bytes) -> None:
    """Register a GGUF file to plan."""

    def build(folder: Path, scene: Scene) -> tuple[str, list[object]]:
        (folder / "m.gguf").write_bytes(content)
        return "train/plan.py", [folder / "m.gguf", "--device", "t4"]

    ATTACKS[f"gguf: {name}"] = build


def gguf(num_tensors: int, num_values: int, rest: bytes, version: int = 3) -> bytes:
    """A GGUF file that begins like this."""
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_values) + rest


def text(value: str) -> bytes:
    """A text in a GGUF file."""
    return struct.pack("<Q", len(value)) + value.encode()


gguf_attack("another magic", b"GGML" + b"\0" * 100)
gguf_attack("version 99", gguf(0, 0, b"", 99))
gguf_attack("2^60 values", gguf(0, 2**60, text("a") + struct.pack("<IB", 0, 1)))
gguf_attack("2^60 tensors", gguf(2**60, 0, b""))
gguf_attack("a text of 2^60", gguf(0, 1, struct.pack("<Q", 2**60)))
gguf_attack("a text of 2^63", gguf(0, 1, struct.pack("<Q", 2**63)))
gguf_attack("an array of 2^60 numbers", gguf(0, 1, text("a") + struct.pack("<IIQ", 9, 0, 2**60)))
gguf_attack(
    "an array of 2^60 texts",
    gguf(0, 1, text("a") + struct.pack("<IIQ", 9, 8, 2**60) + b"\0" * 4096),
)
gguf_attack(
    "arrays nested deep",
    gguf(0, 1, text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100_000),
)
gguf_attack("an unknown type", gguf(0, 1, text("a") + struct.pack("<I", 77)))
gguf_attack("2^31 dimensions", gguf(1, 0, text("a") + struct.pack("<I", 2**31)))
gguf_attack(
    "an alignment of 0",
    gguf(
        1,
        1,
        text("general.alignment")
        + struct.pack("<II", 4, 0)
        + text("t")
        + struct.pack("<IQIQ", 1, 8, 0, 0),
    ),
)
gguf_attack(
    "an alignment in words",
    gguf(
        1,
        1,
        text("general.alignment")
        + struct.pack("<I", 8)
        + text("x")
        + text("t")
        + struct.pack("<IQIQ", 1, 8, 0, 0),
    ),
)
gguf_attack("an endless offset", gguf(1, 0, text("t") + struct.pack("<IQIQ", 1, 8, 0, 2**63)))
gguf_attack(
    "text that is no UTF-8",
    gguf(0, 1, struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<IB", 0, 1)),
)


# Rows


def rows_attack(name: str, file: str, write: Callable[[Path], object]) -> None:
    """Register a data file."""

    def build(folder: Path, scene: Scene) -> tuple[str, list[object]]:
        write(folder / file)
        return "train/sft.py", [scene.config(folder, data={"train": file})]

    ATTACKS[f"rows: {name}"] = build


ROW = '{"prompt": "a", "completion": "b", "n": %s}\n'
rows_attack("a number of 5,000 digits", "r.jsonl", lambda p: p.write_text(ROW % ("9" * 5_000)))
rows_attack("nested deep", "r.jsonl", lambda p: p.write_text(ROW % ("[" * 100_000)))
rows_attack("a list nested deep", "r.json", lambda p: p.write_text("[" * 200_000))
rows_attack(
    "a gzip of 10 GB in a list",
    "r.json.gz",
    lambda p: p.write_bytes(gzip.compress(b"[") + _bomb_of(10_000)),
)
rows_attack("a gzip of 10 GB in a table", "r.csv.gz", lambda p: p.write_bytes(_bomb_of(10_000)))
rows_attack("a gzip of 10 GB", "r.jsonl.gz", lambda p: p.write_bytes(_bomb_of(10_000)))
rows_attack(
    "a table that is none", "r.parquet", lambda p: p.write_bytes(b"PAR1" + b"\xff" * 100 + b"PAR1")
)
rows_attack("a pickle", "r.pkl", lambda p: p.write_bytes(pickle.dumps(Touch(p.parent))))
rows_attack(
    "a script of the datasets library",
    "r.py",
    lambda p: p.write_text(f"open({str(p.parent / CANARY)!r}, 'w')"),
)
rows_attack("a fifo", "r.jsonl", lambda p: os.mkfifo(p))
rows_attack("a link to /dev/zero", "r.jsonl", lambda p: p.symlink_to("/dev/zero"))


def _bomb_of(megabytes: int) -> bytes:
    """A gzip file of one endless line: members of 100 MB each."""
    member = gzip.compress(b"x" * 100_000_000, compresslevel=9)
    return member * (megabytes // 100)


@attack("rows: an archive")
def _zip(folder: Path, scene: Scene) -> tuple[str, list[object]]:
    with zipfile.ZipFile(folder / "r.zip", "w") as archive:
        archive.writestr(f"../{CANARY}", "x")
    return "train/sft.py", [scene.config(folder, data={"train": "r.zip"})]


@attack("rows: a tar archive")
def _tar(folder: Path, scene: Scene) -> tuple[str, list[object]]:
    with tarfile.open(folder / "r.tar", "w") as archive:
        (folder / "x").write_text("x")
        archive.add(folder / "x", f"../{CANARY}")
    return "train/sft.py", [scene.config(folder, data={"train": "r.tar"})]


# Links


@attack("link: the run folder")
def _linked_run(folder: Path, scene: Scene) -> tuple[str, list[object]]:
    config = scene.config(folder)
    (folder / "elsewhere" / "checkpoint-1").mkdir(parents=True)
    (folder / "runs" / "tiny").mkdir(parents=True)
    (folder / "runs" / "tiny" / "checkpoints").symlink_to(folder / "elsewhere")
    return "train/sft.py", [config]


@attack("link: the place of the adapter")
def _linked_adapter(folder: Path, scene: Scene) -> tuple[str, list[object]]:
    config = scene.config(folder)
    (folder / "elsewhere").mkdir()
    (folder / "runs" / "tiny").mkdir(parents=True)
    (folder / "runs" / "tiny" / ".adapter").symlink_to(folder / "elsewhere")
    return "train/sft.py", [config]


@attack("name: out of its folder")
def _name(folder: Path, scene: Scene) -> tuple[str, list[object]]:
    return "train/sft.py", [scene.config(folder, name="../../evil")]
