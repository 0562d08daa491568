"""Owns chatting with one loaded model: a conversation, perhaps with an image, and the answer to it."""

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

from halfbyte.data.conversation import Message
from halfbyte.data.render import Renderer
from halfbyte.data.thoughts import split_thoughts
from halfbyte.errors import ModelError
from halfbyte.generate.batched import generate
from halfbyte.llamacpp.model import GgufModel
from halfbyte.model.footprint import (
    constants_bytes,
    num_parameters,
    parameter_groups,
    weights_bytes,
)
from halfbyte.model.load import Loaded

MIN_COLUMN = 30  # narrowest column, in characters, for answers side by side


@dataclass(frozen=True)
class Reply:
    """An answer and how fast it was generated.

    Attributes:
        text: the answer without its thoughts.
        thoughts: what it thought before it, None for nothing.
    """

    text: str
    num_tokens: int
    seconds: float
    finish_reason: str
    thoughts: str | None = None

    @property
    def tokens_per_s(self) -> float:
        """Return generated tokens per second; the time includes reading the prompt."""
        return self.num_tokens / self.seconds


def describe(loaded: Loaded) -> str:
    """Tabulate the dtype of each kind of parameter, and the footprint as counted and as it really is."""
    model = loaded.model
    lines = [f"{'kind':<24}{'stored as':<18}{'parameters':>16}{'bytes':>16}"]
    for kind in parameter_groups(model):
        lines.append(
            f"{kind.name:<24}{kind.stored_as:<18}{kind.num_parameters:>16,}{kind.num_bytes:>16,}"
        )
    counted, constants = int(model.get_memory_footprint()), constants_bytes(model)
    lines += [
        f"parameters:                        {num_parameters(model):>16,}",
        f"footprint, as transformers counts: {counted:>16,} bytes",
        f"footprint, true:                   {weights_bytes(model):>16,} bytes"
        f" (including {constants:,} bytes of quantisation constants)",
        f"compute: {loaded.compute.name} on {loaded.compute.device} ({loaded.compute.reason})",
    ]
    return "\n".join(lines)


def reply(
    loaded: Loaded, renderer: Renderer, messages: tuple[Message, ...], max_new_tokens: int
) -> Reply:
    """Generate the greedy answer to a conversation that ends with the user's message."""
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
    parsed = renderer.answer_format.parse(renderer.decode(answer.ids))
    return Reply(parsed.content, num_tokens, seconds, answer.finish_reason, parsed.thoughts)


def reply_from_gguf(model: GgufModel, messages: tuple[Message, ...], max_new_tokens: int) -> Reply:
    """Generate the greedy answer with a GGUF file in llama.cpp, by its own chat template and stop tokens."""
    start = time.perf_counter()
    _, ids = model.prompt([{"role": m.role, "content": m.content} for m in messages])
    (answer,) = model.answers([ids], stop_ids=None, max_new_tokens=max_new_tokens)
    seconds = time.perf_counter() - start
    num_tokens = len(answer.ids) + (answer.finish_reason == "stop")
    thoughts, text = split_thoughts(model.decode(answer.ids).strip())
    return Reply(text, num_tokens, seconds, answer.finish_reason, thoughts)


@torch.no_grad()
def reply_to_image(
    loaded: Loaded, processor: Any, messages: tuple[Message, ...], image: Path, max_new_tokens: int
) -> Reply:
    """Generate the greedy answer of an image-and-text model to a prompt that follows an image.

    Raises:
        ModelError: the image cannot be read, or Pillow is missing.
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
    prompt_tokens = inputs["input_ids"].shape[1]
    start = time.perf_counter()
    output: Any = loaded.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    ids = output[0, prompt_tokens:].tolist()
    text = str(processor.decode(ids, skip_special_tokens=True)).strip()
    reason = "length" if len(ids) == max_new_tokens else "stop"
    return Reply(text, len(ids), time.perf_counter() - start, reason)


Responder = Callable[[tuple[Message, ...]], Reply]


def chat(
    responders: Mapping[str, Responder],
    system: str | None,
    read: Callable[[str], str] = input,
    write: Callable[[str], None] = print,
) -> None:
    """Hold a conversation on the terminal until /quit or end of input.

    /reset forgets the turns so far; thoughts are folded, and /thoughts shows those of the last answers.

    Args:
        responders: who answers, by name; where there are two, each remembers its own answers, and they are
            shown side by side.
        system: the system message.
        read: reads a line from the user.
        write: shows a line.
    """
    opening = (Message("system", system),) if system else ()
    turns = dict.fromkeys(responders, opening)
    write("Type a message; /reset starts a new conversation, /quit exits.")
    replies: dict[str, Reply] = {}
    while True:
        try:
            text = read("you> ").strip()
        except EOFError:
            return
        if text == "/quit":
            return
        if text == "/reset":
            turns = dict.fromkeys(responders, opening)
            continue
        if text == "/thoughts":
            for name, reply in replies.items():
                write(f"{name}> {reply.thoughts or '(no thoughts)'}")
            continue
        if not text:
            continue
        replies = {}
        for name, respond in responders.items():
            messages = (*turns[name], Message("user", text))
            replies[name] = respond(messages)
            answer = Message("assistant", replies[name].text or " ", replies[name].thoughts)
            turns[name] = (*messages, answer)
        for line in reply_lines(replies, shutil.get_terminal_size().columns):
            write(line)


def reply_lines(replies: Mapping[str, Reply], columns: int) -> list[str]:
    """Lay out replies side by side where ``columns`` of a terminal leave room, else one below the other."""
    speeds = {
        name: f"({reply.num_tokens} tokens, {reply.tokens_per_s:.1f} tokens/s"
        + (f"; /thoughts shows its {len(reply.thoughts.split())} words)" if reply.thoughts else ")")
        for name, reply in replies.items()
    }
    width = (columns - 3 * (len(replies) - 1)) // len(replies)
    # Terminals differ in how many columns they give to wide and right-to-left characters.
    aligns = all(_has_narrow_characters(reply.text) for reply in replies.values())
    if len(replies) == 1 or width < MIN_COLUMN or not aligns:
        lines = []
        for name, reply in replies.items():
            lines += [f"{name}> {reply.text}", " " * (len(name) + 2) + speeds[name]]
        return lines
    blocks = []
    for name, reply in replies.items():
        paragraphs = [textwrap.wrap(part, width) or [""] for part in reply.text.split("\n")]
        blocks.append([f"{name}>", *(line for part in paragraphs for line in part), speeds[name]])
    height = max(map(len, blocks))
    filled = [[*block[:-1], *[""] * (height - len(block)), block[-1]] for block in blocks]
    return [
        " | ".join(line.ljust(width) for line in row).rstrip() for row in zip(*filled, strict=True)
    ]


def _has_narrow_characters(text: str) -> bool:
    """Return whether every character takes one column and is written from left to right."""
    return all(
        unicodedata.east_asian_width(char) not in "WF"
        and unicodedata.bidirectional(char) not in ("R", "AL")
        and not unicodedata.combining(char)
        for char in text
    )
