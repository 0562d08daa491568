"""Owns serving beyond one machine: vLLM's own server, started with the flags that a run needs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from halfbyte.config.section import FOUR_BIT
from halfbyte.errors import RunError, UserError
from halfbyte.model.merged import check_keeps_training
from halfbyte.model.resolve import Base
from halfbyte.run_dir import read_json
from halfbyte.serve.targets import ServeTarget
from halfbyte.trained.artefact import read_artefact, vllm_rank
from halfbyte.trained.run import read_trained_run

RESERVED_FLAGS = ("--host", "--port", "--api-key")
KEY_VARIABLE = "VLLM_API_KEY"  # unlike a flag, the environment is not visible to every user


def vllm_command(
    targets: list[ServeTarget],
    host: str,
    port: int,
    max_context: int | None,
    extra_flags: list[str],
) -> list[str]:
    """Return the command line of ``vllm serve`` for a plain model, or for runs on one base.

    A run's adapter is the folder that ``halfbyte export RUN --to adapter`` wrote for vLLM and verified.

    Raises:
        RunError: an adapter is not exported, or the runs have different bases.
        UserError: vLLM cannot serve these models together.
        ModelError: vLLM would quantise a merged model, which would undo its training.
    """
    reserved = [flag for flag in extra_flags if flag.partition("=")[0] in RESERVED_FLAGS]
    if reserved:
        raise UserError(
            f"{' '.join(reserved)}: pass this before --, so that an address others can reach requires a key"
        )
    runs = [target for target in targets if target.is_run]
    if not runs and len(targets) > 1:
        raise UserError(
            "--engine vllm serves one model, or runs on one base; start one server for each"
        )
    if runs and len(runs) < len(targets):
        raise UserError("--engine vllm: pass only the runs; their base is served with them")
    command = ["vllm", "serve"]
    if runs:
        command += _with_adapters(runs)
    else:
        (model,) = targets
        if any("bitsandbytes" in flag for flag in extra_flags):
            check_keeps_training(Path(model.target), "nf4")
        command += [model.target, "--served-model-name", model.name or Path(model.target).name]
    command += ["--host", host, "--port", str(port)]
    if max_context is not None:
        command += ["--max-model-len", str(max_context)]
    return command + extra_flags


def start_vllm(command: list[str], api_keys: tuple[str, ...]) -> None:
    """Replace this process with vLLM; this does not return.

    Raises:
        UserError: vLLM is not installed, or there are several keys, of which it takes only one.
    """
    path = shutil.which(command[0])
    if path is None:
        raise UserError(
            "--engine vllm: vllm is not on the PATH. Install it in a separate environment (it pins torch):"
            " pip install vllm vllm-bnb-plugin (the plugin reads 4-bit bases). The command would be:\n  "
            + " ".join(command)
        )
    if len(api_keys) > 1:
        raise UserError(f"--engine vllm accepts one API key, not {len(api_keys)}")
    environment = dict(os.environ)
    if api_keys:
        environment[KEY_VARIABLE] = api_keys[0]
    print(" ".join(command), flush=True)
    os.execve(path, command, environment)


def _with_adapters(runs: list[ServeTarget]) -> list[str]:
    bases: dict[str, Base] = {}
    precisions, modules, ranks = set(), [], []
    templates = set()
    for target in runs:
        trained = read_trained_run(Path(target.target))
        folder, run, base = trained.folder, trained.run, trained.base
        check_keeps_training(Path(base.path), run.model.precision)
        bases[base.fingerprint] = base
        precisions.add(run.model.precision)
        read_artefact(folder, "adapter")  # raises unless it was verified and is unchanged since
        adapter = folder.export / "adapter"
        templates.add(trained.manifest.chat_template_sha256)
        ranks.append(int(read_json(adapter / "adapter_config.json")["r"]))
        modules.append(f"{target.name or run.name}={adapter}")
    if len(bases) > 1 or len(precisions) > 1 or len(templates) > 1:
        raise RunError(
            "--engine vllm: the runs differ in base, precision or chat template; start one server for each"
        )
    (base,) = bases.values()
    command = [base.path, "--served-model-name", base_name(base)]
    if precisions & set(FOUR_BIT):
        # The adapter was trained on the 4-bit base.
        command += ["--quantization", "bitsandbytes"]
    template = Path(runs[0].target) / "export" / "adapter" / "chat_template.jinja"
    if template.is_file():
        command += ["--chat-template", str(template)]
    return [
        *command,
        "--enable-lora",
        "--max-loras",
        str(len(runs)),
        "--max-lora-rank",
        str(vllm_rank(max(ranks))),
        "--lora-modules",
        *modules,
    ]


def base_name(base: Base) -> str:
    """Return the last part of a base's name, which is a Hub id, a path or a package."""
    return Path(base.name.rpartition(":")[2]).name
