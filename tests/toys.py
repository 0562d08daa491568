"""Small tokenizers and files, built in code, for tests to import."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from halfbyte.config.dataset import Data, DataSource
from halfbyte.config.source import sealed
from halfbyte.data.chat_template import load_template
from halfbyte.data.fields import Account, RowError
from halfbyte.data.leaks import near_duplicates
from halfbyte.data.raw import RawRow, Table
from halfbyte.data.rows import ParsedRows
from halfbyte.data.sources import open_table
from halfbyte.model.merged import MergeReport
from halfbyte.record import DIGEST, _digest
from halfbyte.run_dir import digests, file_sha256
from halfbyte.trained.manifest import Manifest

ROOT = Path(__file__).resolve().parents[1]
CORPUS = [
    "acute chronic heart attack myocardial infarction of the anterior wall",
    "The quick brown fox jumps over the lazy dog. 0123456789 (I21) I10 I95",
    "system user assistant model Question Answer Name the category of this diagnosis: title (code).",
    "def main():\n    return {'key': [1, 2, 3]}\n\n\nüöä é 東京 😀 <tag> | <| |> ###",
]
VOCABULARY = 480


# Its generation prompt opens the thoughts that each answer closes.
OPENS_THOUGHTS = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}<think>
{{ m.reasoning_content or '' }}</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML tokens; adds no BOS (as SmolLM2's)."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(
        CORPUS,
        BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=controls,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=load_template("chatml"),
    )


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer with Gemma's control tokens, spaces as ▁, and a BOS on every text."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    controls = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    core.train_from_iterator(
        CORPUS,
        BpeTrainer(vocab_size=VOCABULARY, special_tokens=controls + bytes_, show_progress=False),
    )
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def llama_config(vocab_size: int, **fields: Any) -> LlamaConfig:
    """The configuration of a Llama of two small layers."""
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    return LlamaConfig(vocab_size=vocab_size, **sizes | fields)


def save_tiny_llama(folder: Path) -> None:
    """Write a random Llama of two small layers with the ChatML tokenizer."""
    tokenizer = chatml_tokenizer()
    config = llama_config(
        len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def store(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the form that the suffix names."""
    if path.suffix == ".jsonl":
        return write_rows(path, rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        columns = dict.fromkeys(key for row in rows for key in row)
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(columns))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_config(folder: Path, base: Path, **sections: Any) -> Path:
    """Write a small working config with its data; ``sections`` update it."""
    rows = [
        {"prompt": f"diagnosis {n} of the heart", "completion": f"Heart attack (I{n % 7})"}
        for n in range(40)
    ]
    write_rows(folder / "train.jsonl", rows[:32])
    write_rows(folder / "test.jsonl", rows[32:])
    content: dict[str, Any] = {
        "runs_dir": "runs",
        "model": {"name": str(base), "precision": "nf4", "compute_dtype": "fp32"},
        "adapter": {"r": 4, "alpha": 8},
        "data": {"train": "train.jsonl", "test": "test.jsonl", "max_length": 128},
        "train": {
            "learning_rate": 1e-2,
            "max_steps": 4,
            "batch_size": 4,
            "micro_batch_size": 2,
            "log_steps": 1,
            "num_samples": 1,
            "sample_tokens": 4,
        },
        "eval": {"rows": 8, "max_new_tokens": 8, "fewshot": 2, "resamples": 200},
        "merge": {"rows": 4, "dtype": "fp32"},
        "track": {"wandb": "off"},
    }
    for section, values in sections.items():
        is_section = isinstance(values, dict)
        content[section] = {**content.get(section, {}), **values} if is_section else values
    path = folder / "tiny.yaml"
    # JSON is YAML 1.2.
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


def tool(name: str) -> dict[str, Any]:
    """A tool that tells something of a port."""
    properties = {"port": {"type": "string"}, "days": {"type": "integer"}}
    parameters = {"type": "object", "properties": properties, "required": ["port"]}
    function = {"name": name, "description": f"The {name} in a port", "parameters": parameters}
    return {"type": "function", "function": function}


def called(name: str, number: int = 1, **arguments: Any) -> dict[str, Any]:
    """A call of it."""
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"id": f"call0000{number}", "type": "function", "function": function}


PORT_TOOLS = [tool("tide"), tool("wind")]


def tool_rows(port: str) -> list[dict[str, Any]]:
    """Rows with thoughts, with one call, with two calls, and with an answer to a tool's output."""

    def user(text: str) -> dict[str, Any]:
        return {"role": "user", "content": text}

    def assistant(text: str, **fields: Any) -> dict[str, Any]:
        return {"role": "assistant", "content": text, **fields}

    thinks = assistant(
        "", reasoning_content=f"The port is {port}.", tool_calls=[called("tide", port=port)]
    )
    both = [called("tide", port=port), called("wind", 2, port=port, days=2)]
    output = {
        "role": "tool",
        "tool_call_id": "call00001",
        "name": "tide",
        "content": '{"metres": 5}',
    }
    tide = user(f"Tide in {port}?")
    is_port = assistant(f"{port} is a port.", reasoning_content=f"It is {port}.")
    return [
        {"messages": [tide, thinks], "tools": PORT_TOOLS},
        {
            "messages": [user(f"All of {port} now!"), assistant("Both.", tool_calls=both)],
            "tools": PORT_TOOLS,
        },
        {"messages": [tide, thinks, output, assistant("5 m.")], "tools": PORT_TOOLS},
        {"messages": [user(f"Is {port} a port?"), is_port]},
    ]


def run_script(script: str, *arguments: object) -> None:
    """Run one of the project's scripts in this process; a UserError ends in SystemExit."""
    before = sys.argv
    sys.argv = [script, *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv = before


# Two layers of thirty predict badly, so that small errors show more than in a whole model.
LENIENT = ("export.rows=8", "export.max_quantised_kl=2", "export.min_quantised_top1=0.3")


def make_manifest(**fields: Any) -> Manifest:
    """A whole manifest, with fields that are given."""
    content = {
        "name": "tiny",
        "base": {"name": "org/model", "revision": None, "origin": "drawn", "fingerprint": "f" * 64},
        "model_class": "LlamaForCausalLM",
        "precision": "nf4",
        "compute_dtype": {"name": "fp32", "why": "test"},
        "device": "cpu",
        "chat_template_sha256": "0" * 64,
        "stop_ids": [2],
    }
    return Manifest.model_validate(content | fields)


def edit_settings(run: Path, old: str, new: str) -> None:
    """Change a text in a run's resolved config, and seal it again."""
    path = run / "run.yaml"
    body = path.read_text(encoding="utf-8").split("\n", 2)[2]
    assert old in body
    path.write_text(sealed(body.replace(old, new)), encoding="utf-8")


def edit_record(path: Path, **fields: Any) -> None:
    """Change fields of a sealed record, and seal it again."""
    content = json.loads(path.read_text(encoding="utf-8")) | fields
    content.pop(DIGEST, None)
    path.write_text(json.dumps(content | {DIGEST: _digest(content)}), encoding="utf-8")


def edit_rows(run: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Change the rows that a run keeps, with the digests of them."""
    write_rows(run / "data" / name, rows)
    edit_record(run / "ledger.json", files_sha256=digests(run / "data"))
    edit_record(run / "manifest.json", ledger_sha256=file_sha256(run / "ledger.json"))


def unfinish(run: Path) -> None:
    """Let a run's manifest say that its training has not finished."""
    path = run / "manifest.json"
    fields = {"finished": False, "adapter_sha256": None, "ledger_sha256": None}
    Manifest.read(path).model_copy(update=fields).write(path)


def forget_digests(run: Path) -> None:
    """Leave a run as versions before digests of all files wrote it, for the checks that look deeper."""
    path = run / "manifest.json"
    Manifest.read(path).model_copy(update={"adapter_sha256": None}).write(path)
    path = run / "merged" / "merge_report.json"
    if path.is_file():
        MergeReport.read(path).model_copy(update={"other_sha256": {}}).write(path)


def make_merge_report(kept: str, trained: str, dtype: str = "fp16", **fields: Any) -> MergeReport:
    """A whole merge report, with fields that are given."""
    merge = {"base": kept, "dtype": dtype, "weights_bytes": 1, "kl_nats_per_token": 0.0}
    merge |= {"top1_agreement": 1.0, "loss": 1.0, "num_positions": 1}
    content = {
        "base": make_manifest().base.as_json(),
        "kept": merge,
        "trained": {"precision": trained, "loss": 1.0},
        "sha256": {},
    }
    return MergeReport.model_validate(content | fields)


# --- sources, read as a whole ---


@dataclass(frozen=True)
class Read:
    """Everything that a source holds."""

    name: str
    columns: list[str]
    fingerprint: str
    rows: list[Any]
    malformed: list[RowError]


def source_at(path: Path | str, **keys: Any) -> DataSource:
    """The source at a path, with every key that the section would give it."""
    [(_, source)] = Data(train=[DataSource(path=str(path), **keys)]).sources()
    return source


def table_of(*values: dict[str, Any], name: str = "t.jsonl") -> Table:
    rows = [RawRow(f"{name}:{n}", value) for n, value in enumerate(values, start=1)]
    return Table(name, lambda: iter(rows))


def read_table(path: Path | str, **keys: Any) -> Read:
    """The rows of a source as they are stored."""
    table = open_table(source_at(path, **keys))
    return _read(table, list(table))


def parse_rows(
    table: Table,
    format_name: str = "auto",
    columns: dict[str, str] | None = None,
    system: str | None = None,
    repairs: tuple[str, ...] = (),
) -> tuple[Read, ParsedRows]:
    """The rows of a table, parsed."""
    source = source_at(table.name, format=format_name, columns=columns or {}, system=system)
    parsed = ParsedRows(table, source, Account(repairs))
    return _read(table, list(parsed)), parsed


def _read(table: Table, found: list[Any]) -> Read:
    rows = [row for row in found if not isinstance(row, RowError)]
    malformed = [row for row in found if isinstance(row, RowError)]
    return Read(table.name, table.columns, table.fingerprint, rows, malformed)


def near_pairs(
    train: Sequence[str], held_out: Sequence[str], threshold: float
) -> list[tuple[int, int, float]]:
    """All nearly equal pairs, the most similar first."""
    pairs, total = near_duplicates(train, held_out, threshold, limit=10**6)
    assert len(pairs) == total
    assert near_duplicates(train, held_out, threshold, limit=2) == (pairs[:2], total)
    return pairs
