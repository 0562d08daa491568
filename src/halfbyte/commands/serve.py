"""Serve runs, models and GGUF files with an OpenAI-compatible API and a page to compare base and tuned model.

halfbyte serve runs/quickstart                        (its base and its adapter)
halfbyte serve runs/a runs/b                          (two adapters share one base in memory)
halfbyte serve base=model.gguf tuned=runs/a/export/gguf-q8_0/a-q8_0.gguf
halfbyte serve runs/quickstart --engine vllm -- --tensor-parallel-size 2
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import get_args

from halfbyte.config.section import ComputeDtype, Precision
from halfbyte.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command line may say."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="[NAME=]MODEL",
        help="run folder, model folder, .gguf file, Hub id or pypi:PACKAGE",
    )
    parser.add_argument("--host", default="127.0.0.1", help="needs a key unless it is loopback")
    parser.add_argument("--port", type=int, default=8000, help="0 picks a free port")
    parser.add_argument("--engine", choices=("auto", "vllm"), default="auto")
    parser.add_argument("--check", action="store_true", help="load, verify and exit")
    load = parser.add_argument_group("model")
    load.add_argument("--slots", type=int, help="concurrent answers (default: what fits, up to 16)")
    load.add_argument("--max-context", type=int, help="tokens of prompt and answer (default: 4096)")
    load.add_argument(
        "--precision", choices=get_args(Precision), help="of plain models (default: nf4)"
    )
    load.add_argument("--compute-dtype", choices=get_args(ComputeDtype), default="auto")
    load.add_argument("--weights", choices=("auto", "packed", "unpacked"), default="auto")
    load.add_argument(
        "--gpu-layers", type=int, default=0, help="GGUF layers on the GPU; -1 for all"
    )
    load.add_argument("--no-graphs", action="store_true", help="CUDA: launch each step of decoding")
    bounds = parser.add_argument_group("limits")
    bounds.add_argument(
        "--api-key-file", type=Path, help="one key per line; or set HALFBYTE_API_KEYS"
    )
    bounds.add_argument("--origin", action="append", default=[], help="allow pages of this origin")
    bounds.add_argument("--max-waiting", type=int, default=256, help="answers in the queue")
    bounds.add_argument("--max-connections", type=int, default=512)
    bounds.add_argument("--max-body-bytes", type=int, default=1 << 20)
    bounds.add_argument("--max-answer-seconds", type=float, default=600.0)
    bounds.add_argument("--grace-seconds", type=float, default=30.0, help="after SIGTERM")


def main(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Load and verify the models, then answer requests until SIGTERM."""
    _check(arguments)

    from halfbyte.serve.targets import read_keys, read_targets, require_keys

    targets = read_targets(arguments.models)
    keys = read_keys(arguments.api_key_file, os.environ.get("HALFBYTE_API_KEYS"))
    require_keys(arguments.host, keys)

    from halfbyte.libraries import quiet_libraries

    quiet_libraries()
    if arguments.engine == "vllm":
        from halfbyte.serve.vllm import start_vllm, vllm_command

        command = vllm_command(
            targets, arguments.host, arguments.port, arguments.max_context, arguments.passed_on
        )
        start_vllm(command, keys)

    try:
        from halfbyte.serve.limits import Limits
        from halfbyte.serve.server import bind, serve
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install 'halfbyte[serve]'") from None
    from halfbyte.serve.loading import Options, open_models
    from halfbyte.serve.service import Service

    options = Options(
        slots=arguments.slots,
        max_context=arguments.max_context,
        precision=arguments.precision,
        compute_dtype=arguments.compute_dtype,
        packed={"auto": None, "packed": True, "unpacked": False}[arguments.weights],
        gpu_layers=arguments.gpu_layers,
        max_waiting=arguments.max_waiting,
        graphs=not arguments.no_graphs,
    )
    sock = None if arguments.check else bind(arguments.host, arguments.port)
    served = open_models(targets, options, lambda line: print(line, flush=True))
    if sock is None:
        print("verified: " + ", ".join(model.name for model in served))
        return
    limits = Limits(
        body_bytes=arguments.max_body_bytes,
        answer_seconds=arguments.max_answer_seconds,
        max_waiting=arguments.max_waiting,
        max_connections=arguments.max_connections,
        api_keys=keys,
        origins=tuple(arguments.origin),
    )
    serve(Service(served, limits), sock, arguments.grace_seconds)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.passed_on and arguments.engine != "vllm":
        raise UserError(
            f"{' '.join(arguments.passed_on)}: flags after -- are only for --engine vllm"
        )
    for name in ("slots", "max_context", "max_waiting", "max_connections", "max_body_bytes"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value} but must be at least 1")
    for name in ("max_answer_seconds", "grace_seconds"):
        value = getattr(arguments, name)
        if not 0 <= value < float("inf"):
            raise UserError(
                f"--{name.replace('_', '-')} is {value} but must be finite and at least 0"
            )
