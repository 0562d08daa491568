"""Owns the check of halfbyte chat's options, which refuses options without effect."""

from __future__ import annotations

import argparse
from pathlib import Path

from halfbyte.config.section import FOUR_BIT
from halfbyte.errors import UserError

RUN_DECIDES = (
    "revision",
    "precision",
    "no_double_quant",
    "compute_dtype",
    "chat_template",
    "image",
)


def check_generate(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> bool:
    """Refuse options without effect; return whether the model is a run folder."""
    if arguments.image and not arguments.prompt:
        raise UserError("--image needs --prompt: say what you want to know of the picture")
    if arguments.chat and arguments.prompt is not None:
        raise UserError("--chat reads what you type, so --prompt has no effect; leave one out")
    in_llama_cpp = arguments.engine == "llama.cpp"
    if in_llama_cpp and not arguments.model.endswith(".gguf"):
        raise UserError("--engine llama.cpp reads a .gguf file; see halfbyte export --to gguf")
    if arguments.gpu_layers is not None and not in_llama_cpp:
        raise UserError("--gpu-layers has no effect without --engine llama.cpp")
    is_run = (Path(arguments.model) / "run.yaml").is_file()
    given = {flag for flag in RUN_DECIDES if getattr(arguments, flag) != parser.get_default(flag)}
    if (is_run or in_llama_cpp) and given:
        flag, what = min(given).replace("_", "-"), "run folder" if is_run else "GGUF in llama.cpp"
        raise UserError(f"--{flag} has no effect on a {what}, which says that itself; leave it out")
    precision = arguments.precision or "nf4"
    if arguments.no_double_quant and precision not in FOUR_BIT:
        raise UserError(f"--no-double-quant has no effect with --precision {precision}")
    plain = precision in ("fp32", "bf16", "fp16")
    if plain and arguments.compute_dtype not in ("auto", precision):
        raise UserError(
            f"--compute-dtype {arguments.compute_dtype} has no effect with --precision"
            f" {precision}: unquantised weights compute in the dtype they are stored in"
        )
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {arguments.max_new_tokens}; at least 1 is needed")
    if arguments.image and arguments.chat_template:
        raise UserError(
            "--chat-template has no effect with --image: the model's processor has its own"
        )
    return is_run
