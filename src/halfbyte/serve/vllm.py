"""Owns the way past one machine: vLLM's own server, started with the flags that a run needs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from halfbyte.config import read_run_folder
from halfbyte.config.section import FOUR_BIT
from halfbyte.errors import RunError, UserError
from halfbyte.model.merged import check_keeps_training
from halfbyte.model.resolve import Base
from halfbyte.run_dir import RunDir, read_json
from halfbyte.serve.targets import ServeTarget
from halfbyte.trained.artefact import read_artefact, vllm_rank
from halfbyte.trained.run import trained_base

OURS = ("--host", "--port", "--api-key")
KEY_VARIABLE = "VLLM_API_KEY"  # in the environment it is not seen by every user, as a flag would be


def vllm_command(
    asked: list[ServeTarget], host: str, port: int, max_context: int | None, more: list[str]
) -> list[str]:
    """The command line of ``vllm serve`` for a plain model, or for runs on one base.

    The run's adapter is the vLLM-clean folder that ``train/export.py RUN --to adapter`` has proven.

    Raises:
        RunError: an adapter is not exported, or runs have different bases.
        UserError: models that vLLM cannot serve together.
        ModelError: vLLM would quantise a merge whose training that takes back.
    """
    ours = [flag for flag in more if flag.partition("=")[0] in OURS]
    if ours:
        raise UserError(
            f"{' '.join(ours)} behind --: give it before --, so that an address that others reach needs a key"
        )
    runs = [one for one in asked if one.is_run]
    if not runs and len(asked) > 1:
        raise UserError("--engine vllm serves one model, or runs on one base; start one for each")
    if runs and len(runs) < len(asked):
        raise UserError("--engine vllm: give runs alone; their base is served with them")
    command = ["vllm", "serve"]
    if runs:
        command += _with_adapters(runs)
    else:
        if any("bitsandbytes" in flag for flag in more):
            check_keeps_training(Path(asked[0].target), "nf4")
        command += [
            asked[0].target,
            "--served-model-name",
            asked[0].name or Path(asked[0].target).name,
        ]
    command += ["--host", host, "--port", str(port)]
    if max_context is not None:
        command += ["--max-model-len", str(max_context)]
    return command + more


def start_vllm(command: list[str], api_keys: tuple[str, ...]) -> None:
    """Become vLLM; does not return.

    Raises:
        UserError: it is not installed, or has no way to take several keys.
    """
    path = shutil.which(command[0])
    if path is None:
        raise UserError(
            "--engine vllm: no vllm is on the PATH. Install it in an environment of its own (it pins torch):"
            " pip install vllm vllm-bnb-plugin (the plugin reads 4-bit bases). The command would be:\n  "
            + " ".join(command)
        )
    if len(api_keys) > 1:
        raise UserError(f"--engine vllm takes one API key; {len(api_keys)} were given")
    environment = dict(os.environ)
    if api_keys:
        environment[KEY_VARIABLE] = api_keys[0]
    print(" ".join(command), flush=True)
    os.execve(path, command, environment)


def _with_adapters(runs: list[ServeTarget]) -> list[str]:
    bases: dict[str, Base] = {}
    precisions, modules, ranks = set(), [], []
    templates = set()
    for one in runs:
        folder, run = RunDir(Path(one.target)), read_run_folder(Path(one.target))
        base = trained_base(folder, run)
        check_keeps_training(Path(base.path), run.model.precision)
        bases[base.fingerprint] = base
        precisions.add(run.model.precision)
        read_artefact(folder, "adapter")  # proven, and unchanged since
        adapter = folder.export / "adapter"
        templates.add(read_json(folder.manifest)["chat_template_sha256"])
        ranks.append(int(read_json(adapter / "adapter_config.json")["r"]))
        modules.append(f"{one.name or run.name}={adapter}")
    if len(bases) > 1 or len(precisions) > 1 or len(templates) > 1:
        raise RunError(
            "--engine vllm: the runs differ in base, precision or chat template; start one for each"
        )
    (base,) = bases.values()
    command = [base.path, "--served-model-name", base_name(base)]
    if precisions & set(FOUR_BIT):
        command += [
            "--quantization",
            "bitsandbytes",
        ]  # the 4-bit base that the adapter was trained on
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
    """The last part of a base's name: of a Hub id, a path or a package."""
    return Path(base.name.rpartition(":")[2]).name
