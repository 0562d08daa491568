"""Tests of placing a GGUF file: sizes as llama.cpp prints them, and as many layers in VRAM as fit."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.errors import PlanError
from halfbyte.llamacpp.gguf_file import read_gguf
from halfbyte.llamacpp.gguf_header import read_header
from halfbyte.llamacpp.model import GgufModel
from halfbyte.plan.devices import find_device
from halfbyte.plan.gguf_placement import plan, splits

MIB = 1 << 20
pytestmark = pytest.mark.real


@pytest.fixture
def small_gguf(exported_run: Path) -> Path:
    return exported_run / "export" / "gguf-q8_0" / "tiny-q8_0.gguf"


def test_header_agrees_with_the_package_gguf(small_gguf: Path) -> None:
    from gguf import GGUFReader

    header, reader = read_header(small_gguf), GGUFReader(small_gguf)
    expected = {tensor.name: -(-int(tensor.n_bytes) // 32) * 32 for tensor in reader.tensors}
    assert header.tensor_bytes == expected
    for key in ("llama.block_count", "general.architecture", "llama.rope.freq_base"):
        field = reader.get_field(key)
        assert field is not None
        assert header.metadata[key] == field.contents()


def test_sizes_are_those_that_llama_cpp_prints(small_gguf: Path) -> None:
    file = read_gguf(small_gguf)
    with GgufModel(small_gguf) as model:
        model.lib.lines.clear()
        model._ensure_context(1000)
        log = "".join(model.lib.lines)
    cache = float(_number(r"KV buffer size = +([\d.]+) MiB", log)) * MIB
    work = float(_number(r"compute buffer size = +([\d.]+) MiB", log)) * MIB
    assert sum(file.cache_bytes(1000)) == pytest.approx(cache, abs=0.005 * MIB)
    # An upper bound: llama.cpp lets temporaries share memory.
    assert work <= file.work_bytes + 0.005 * MIB <= 1.15 * work


def test_all_is_placed_once_and_most_layers_that_fit_are_in_vram(small_gguf: Path) -> None:
    file = read_gguf(small_gguf)
    num_layers = len(file.layer_bytes)
    on_t4 = splits(file, find_device("t4"))
    assert all(split.gpu_layers == num_layers + 1 for split in on_t4)
    on_cpu = splits(file, find_device("cpu-16"))
    for split, plain in zip(on_t4, on_cpu, strict=True):
        assert plain.vram_bytes == 0
        # Tied embeddings are looked up in RAM and multiplied in VRAM.
        assert split.vram_bytes + split.ram_bytes == plain.ram_bytes + file.tied_bytes
    (few,) = splits(file, find_device("t4"), gpu_layers=2)[:1]
    layer = file.layer_bytes[-1] + file.cache_bytes(few.context)[-1]
    assert few.vram_bytes == file.output_bytes + file.tied_bytes + file.work_bytes + layer


def test_fewer_layers_on_a_smaller_card(small_gguf: Path) -> None:
    file = read_gguf(small_gguf)
    whole = splits(file, find_device("t4"))[0].vram_bytes
    card = find_device("1gb")
    short_gib = (whole - file.layer_bytes[0] - file.cache_bytes(1024)[0]) / 2**30
    reserved_gib = (card.total_bytes - card.usable_bytes + card.workspace_bytes) / 2**30
    split = splits(file, find_device(f"{short_gib + reserved_gib:.6f}gb"))[0]
    assert split.gpu_layers == len(file.layer_bytes)
    assert splits(file, find_device("0.3gb"))[0].gpu_layers == 0


def test_layers_in_the_vram_of_a_cpu_are_refused(small_gguf: Path) -> None:
    with pytest.raises(PlanError, match="has no VRAM; name a card"):
        plan(small_gguf, find_device("cpu-16"), gpu_layers=2)


@pytest.mark.slow
def test_script_prints_the_split(small_gguf: Path) -> None:
    command = [sys.executable, "train/plan.py", str(small_gguf), "--device", "t4", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(result.stdout)
    assert report["llama_cpp"]["splits"][0]["fits"]
    assert report["llama_cpp"]["num_layers"] == len(read_gguf(small_gguf).layer_bytes)
    assert report["train"]["settings"]["precision"] == "nf4"


def test_broken_files_are_refused(small_gguf: Path, tmp_path: Path) -> None:
    content = small_gguf.read_bytes()
    broken = {
        "not a GGUF file": b"GGML" + content[4:64],
        "version 9": b"GGUF" + struct.pack("<I", 9) + content[8:64],
        "broken or cut short": content[:1000],
        "are not all there": content[: len(content) // 2],
    }
    for message, data in broken.items():
        path = tmp_path / "broken.gguf"
        path.write_bytes(data)
        with pytest.raises(PlanError, match=message):
            read_gguf(path)
    with pytest.raises(PlanError, match="No such file"):
        read_gguf(tmp_path / "none.gguf")


def _number(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, text
    return match[1]
