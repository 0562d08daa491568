"""Bounds on files from elsewhere: what is larger, deeper or slower than any of its kind is refused at once."""

from __future__ import annotations

import json
import os
import struct
import threading
import time
from pathlib import Path

import pytest
from toys import chatml_tokenizer

from halfbyte.bounds import BoundError, bounded, read_bounded_json, read_text
from halfbyte.config import load_run
from halfbyte.data.chat_template import MAX_TEMPLATE_CHARS, ChatTemplate
from halfbyte.data.conversation import Message
from halfbyte.data.files import MAX_ROW_CHARS, lines_of
from halfbyte.errors import ConfigError, DataError, ModelError, PlanError
from halfbyte.llamacpp.gguf_header import read_header
from halfbyte.model.untrusted import check_config, check_tokenizer_files, check_weights

TURNS = (Message("user", "a"), Message("assistant", "b"))


def test_a_file_of_the_allowed_size_is_read_and_a_larger_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("12345")
    assert read_text(path, 5) == "12345"
    with pytest.raises(BoundError, match=r"x has 5 bytes; allowed: 4"):
        read_text(path, 4)


def test_a_pipe_and_a_device_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(BoundError, match="a pipe or a device, not a file"):
            read_text(path, 100)


def test_deep_json_is_an_error_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a":' * 100_000)
    with pytest.raises(BoundError, match=r"x\.json is nested too deep"):
        read_bounded_json(path, 1 << 20)


def test_time_and_memory_of_a_block_are_bounded_and_given_back() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)

    @bounded(0.2, 1 << 30)
    def endless() -> None:
        while True:
            pass

    @bounded(5, 1 << 28)
    def large() -> bytearray:
        return bytearray(1 << 29)

    with pytest.raises(BoundError, match=r"takes more than 0\.2 s"):
        endless()
    with pytest.raises(BoundError, match=r"takes more than 0\.26\d* GB"):
        large()
    with bounded(0.05, 1 << 28):
        pass
    until = time.process_time() + 0.2
    while time.process_time() < until:  # no alarm is left
        pass
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_bound_in_another_thread_lets_the_work_go_on() -> None:
    done = []

    def work() -> None:
        with bounded(1, 1 << 20):
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set x = 10 ** (10 ** 9) %}",
        "{% set x = 'a' * 10 ** 11 %}",
        "{% set x = 'a'.ljust(10 ** 11) %}",
    ],
)
def test_a_template_without_end_is_an_error_within_seconds(source: str) -> None:
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = source + "{{ messages }}"
    begun = time.process_time()
    with pytest.raises(DataError, match=r"here: the chat template takes more than"):
        ChatTemplate(tokenizer).render(TURNS, "here")
    assert time.process_time() - begun < 4


def test_a_long_template_is_refused() -> None:
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = "{#" + "x" * MAX_TEMPLATE_CHARS + "#}"
    with pytest.raises(DataError, match=r"the chat template has 500,004 characters; allowed"):
        ChatTemplate(tokenizer)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# " + "x" * 200_000, "has 200,002 bytes; allowed: 131,072"),
        (
            "a0: &a0 [x, x, x, x, x, x, x, x]\n"
            + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 9)),
            "more than 10,000 values",
        ),
        ("seed: 0x" + "f" * 5000, "seed is .*, which is no tag:yaml"),
    ],
    ids=["size", "aliases", "digits"],
)
def test_a_config_that_grows_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_run(path, [])
    assert len(str(caught.value)) < 5000


def test_a_line_longer_than_any_row_is_refused_before_it_is_whole() -> None:
    read = 0

    def chunks() -> object:
        nonlocal read
        for _ in range(1000):
            read += 1
            yield "x" * (1 << 20)

    with pytest.raises(DataError, match=r"r\.jsonl: a line has more than"):
        list(lines_of(Path("r.jsonl"), chunks()))  # type: ignore[arg-type]
    assert read <= MAX_ROW_CHARS / (1 << 20) + 2


def _gguf(path: Path, values: int, rest: bytes) -> Path:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, values) + rest)
    return path


@pytest.mark.parametrize(
    "rest",
    [
        struct.pack("<Q", 2**60),  # a key
        struct.pack("<Q1sIIQ", 1, b"a", 9, 0, 2**60),  # an array of numbers
        struct.pack("<Q1sIIQ", 1, b"a", 9, 8, 2**60),  # an array of texts
        struct.pack("<Q1sI", 1, b"a", 9) + struct.pack("<IQ", 9, 1) * 5000,  # arrays of arrays
    ],
    ids=["key", "numbers", "texts", "nested"],
)
def test_a_gguf_header_that_claims_more_than_the_file_has_is_broken(
    tmp_path: Path, rest: bytes
) -> None:
    with pytest.raises(PlanError, match="its header is broken or cut short"):
        read_header(_gguf(tmp_path / "m.gguf", 1, rest))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (struct.pack("<Q", 10**10) + b"{}", "its header is said to have 10,000,000,000 bytes"),
        (b"", "is no whole safetensors file"),
        (struct.pack("<Q", 4) + b"{}xx", "is no whole safetensors file"),
    ],
)
def test_weights_that_are_not_whole_are_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        check_weights(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 10**9), ("vocab_size", 2**40), ("num_attention_heads", -1)],
)
def test_a_size_beyond_any_model_is_refused(tmp_path: Path, key: str, value: int) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"text_config": {key: value}}))
    with pytest.raises(ModelError, match=rf"{key} is {value}; allowed: 0 to"):
        check_config(path)


def test_a_tokenizer_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ModelError, match="is no tokenizer's file"):
        check_tokenizer_files(tmp_path)
