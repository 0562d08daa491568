"""Owns asking one loaded model one thing: a conversation, perhaps with a picture, to an answer."""

from __future__ import annotations

import shutil
import textwrap
import time
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.data.render import Renderer
from halfbyte.data.rows import Message
from halfbyte.errors import ModelError
from halfbyte.generate.batched import generate
from halfbyte.llamacpp.model import GgufModel
from halfbyte.model.footprint import constants_bytes, kinds, num_parameters, weights_bytes
from halfbyte.model.load import Loaded

MIN_COLUMN = 30  # characters of an answer beside another


@dataclass(frozen=True)
class Reply:
    """An answer with its speed."""

    text: str
    num_tokens: int
    seconds: float
    finish_reason: str

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second, prompt processing included."""
        return self.num_tokens / self.seconds


def describe(loaded: Loaded) -> str:
    """The dtype of each kind of parameter, and the footprint as counted and as it truly is."""
    model = loaded.model
    lines = [f"{'kind':<24}{'stored as':<18}{'parameters':>16}{'bytes':>16}"]
    for kind in kinds(model):
        lines.append(
            f"{kind.name:<24}{kind.stored_as:<18}{kind.num_parameters:>16,}{kind.num_bytes:>16,}"
        )
    counted, constants = int(model.get_memory_footprint()), constants_bytes(model)
    lines += [
        f"parameters:                        {num_parameters(model):>16,}",
        f"footprint, as transformers counts: {counted:>16,} bytes",
        f"footprint, true:                   {weights_bytes(model):>16,} bytes"
        f" (with {constants:,} bytes of quantisation constants)",
        f"compute: {loaded.compute.name} on {loaded.compute.device} ({loaded.compute.reason})",
    ]
    return "\n".join(lines)


def reply(
    loaded: Loaded, renderer: Renderer, messages: tuple[Message, ...], max_new_tokens: int
) -> Reply:
    """The greedy answer to a conversation that ends with the user."""
    start = time.perf_counter()
    (answer,) = generate(
        loaded.model,
        [renderer.encode_prompt(messages)],
        stop_ids=renderer.stop_ids,
        pad_id=renderer.pad_id,
        max_new_tokens=max_new_tokens,
        batch_rows=1,
    )
    seconds = time.perf_counter() - start
    num_tokens = len(answer.ids) + (answer.finish_reason == "stop")
    return Reply(renderer.decode(answer.ids), num_tokens, seconds, answer.finish_reason)


def reply_from_gguf(model: GgufModel, messages: tuple[Message, ...], max_new_tokens: int) -> Reply:
    """The same from a GGUF file in llama.cpp, with the template and stop tokens inside it."""
    start = time.perf_counter()
    _, ids = model.prompt(messages)
    (answer,) = model.answers([ids], stop_ids=None, max_new_tokens=max_new_tokens)
    seconds = time.perf_counter() - start
    num_tokens = len(answer.ids) + (answer.finish_reason == "stop")
    return Reply(model.decode(answer.ids).strip(), num_tokens, seconds, answer.finish_reason)


@torch.no_grad()
def reply_to_image(
    loaded: Loaded, processor: Any, messages: tuple[Message, ...], image: Path, max_new_tokens: int
) -> Reply:
    """The greedy answer of an image-and-text model to a prompt with a picture before it.

    Raises:
        ModelError: the picture cannot be read, or Pillow is missing.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ModelError("--image needs Pillow: pip install 'halfbyte[image]'") from None
    try:
        picture = Image.open(image).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ModelError(f"--image {image}: cannot be read as a picture: {error}") from None
    turns: list[dict[str, Any]] = []
    for message in messages:
        content: list[dict[str, Any]] = [{"type": "text", "text": message.content}]
        if message is messages[-1]:
            content.insert(0, {"type": "image", "image": picture})
        turns.append({"role": message.role, "content": content})
    inputs = processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(loaded.compute.device, dtype=loaded.compute.dtype)
    length = inputs["input_ids"].shape[1]
    start = time.perf_counter()
    made: Any = loaded.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = made[0, length:].tolist()
    text = str(processor.decode(new, skip_special_tokens=True)).strip()
    reason = "length" if len(new) == max_new_tokens else "stop"
    return Reply(text, len(new), time.perf_counter() - start, reason)


Answer = Callable[[tuple[Message, ...]], Reply]


def chat(
    answers: Mapping[str, Answer],
    system: str | None,
    read: Callable[[str], str] = input,
    write: Callable[[str], None] = print,
) -> None:
    """A conversation on the terminal until /quit or end of input; /reset forgets the turns so far.

    Args:
        answers: who answers, by name; of two, each remembers its own answers, shown side by side.
        system: the system message.
        read: asks for a line.
        write: shows one.
    """
    opening = (Message("system", system),) if system else ()
    turns = dict.fromkeys(answers, opening)
    write("Type a message; /reset begins anew, /quit ends.")
    while True:
        try:
            text = read("you> ").strip()
        except EOFError:
            return
        if text == "/quit":
            return
        if text == "/reset":
            turns = dict.fromkeys(answers, opening)
            continue
        if not text:
            continue
        made = {}
        for name, answer in answers.items():
            asked = (*turns[name], Message("user", text))
            made[name] = answer(asked)
            turns[name] = (*asked, Message("assistant", made[name].text or " "))
        for line in shown(made, shutil.get_terminal_size().columns):
            write(line)


def shown(made: Mapping[str, Reply], columns: int) -> list[str]:
    """Answers beside each other where so many columns are wide enough, else one after the other."""
    told = {
        name: f"({reply.num_tokens} tokens, {reply.tokens_per_s:.1f} tokens/s)"
        for name, reply in made.items()
    }
    each = (columns - 3 * (len(made) - 1)) // len(made)
    # A terminal shows wide and right-to-left characters in columns of its own counting.
    aligns = all(_counts_as_written(reply.text) for reply in made.values())
    if len(made) == 1 or each < MIN_COLUMN or not aligns:
        lines = []
        for name, reply in made.items():
            lines += [f"{name}> {reply.text}", " " * (len(name) + 2) + told[name]]
        return lines
    blocks = []
    for name, reply in made.items():
        paragraphs = [textwrap.wrap(part, each) or [""] for part in reply.text.split("\n")]
        blocks.append([f"{name}>", *(line for part in paragraphs for line in part), told[name]])
    height = max(map(len, blocks))
    filled = [[*block[:-1], *[""] * (height - len(block)), block[-1]] for block in blocks]
    return [
        " | ".join(line.ljust(each) for line in row).rstrip() for row in zip(*filled, strict=True)
    ]


def _counts_as_written(text: str) -> bool:
    return all(
        unicodedata.east_asian_width(char) not in "WF"
        and unicodedata.bidirectional(char) not in ("R", "AL")
        and not unicodedata.combining(char)
        for char in text
    )
