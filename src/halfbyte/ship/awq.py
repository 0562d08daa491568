"""Owns the AWQ artefact: it runs llm-compressor in a process with separate packages and reads the result.

llm-compressor pins an older transformers than ours, so its packages are installed separately and come
first on the path of that process only; torch is the environment's own. It writes compressed-tensors'
W4A16, which transformers and vLLM can read. AWQ: arXiv 2306.00978.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from halfbyte.data.questions import training_examples
from halfbyte.errors import ModelError, RunError, last_line
from halfbyte.generate.batched import Answer, generate
from halfbyte.llamacpp.tools import cached_tool, tool_folder
from halfbyte.model.tokenizer import read_tokenizer, save_tokenizer
from halfbyte.ship.integrity import linear_widths
from halfbyte.ship.measured_run import MeasuredRun
from halfbyte.trained.fidelity import torch_predict
from halfbyte.trained.run import TrainedRun

PACKAGES = (
    "llmcompressor==0.14.0.1",
    "compressed-tensors==0.19.0",
    "transformers==5.17.0",
    "huggingface-hub==1.33.0",
    "loguru==0.7.3",
    "nvidia-ml-py==13.615.71",
    "pillow==13.0.0",
)
SITE = "awq-" + PACKAGES[0].replace("==", "-")
GROUPS = (128, 64, 32)
WORKER = Path(__file__).with_name("awq_worker.py")


def make_awq(trained: TrainedRun, folder: Path) -> dict[str, Any]:
    """Write the merged model in 4 bits with AWQ's scales, calibrated on training rows.

    Raises:
        RunError: the widths of its layers are not multiples of any group size.
        ModelError: llm-compressor was not fetched, or fails.
    """
    site = awq_packages()
    rows = training_examples(trained.folder)
    ids = [row.ids for row in trained.renderer.encode_rows(rows)]
    group = _group(trained.folder.merged)
    job = {
        "merged": str(trained.folder.merged),
        "out": str(folder),
        "ids": ids,
        "group_size": group,
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    environment = os.environ | {
        "PYTHONPATH": str(site),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, str(WORKER), str(path)], capture_output=True, text=True, env=environment
    )
    path.unlink()
    if done.returncode:
        raise ModelError(
            f"{trained.folder.merged}: llm-compressor failed: {last_line(done.stderr)}"
        )
    save_tokenizer(trained.renderer.tokenizer, folder)
    return {
        "library": PACKAGES[0],
        "calibration_rows": len(ids),
        "calibration_tokens": sum(map(len, ids)),
        "group_size": group,
    }


class FolderModel:
    """A transformers model with the tokenizer and the chat template of a folder."""

    def __init__(self, model: nn.Module, folder: Path, measured: MeasuredRun) -> None:
        self._model, self._pad_id = model, measured.pad_id
        self._tokenizer = read_tokenizer(folder, str(folder))
        self._batch_rows = measured.trained.run.eval.batch_size
        settings = folder / "generation_config.json"
        self._stops = _stops(settings) if settings.is_file() else None
        self.predict = torch_predict(model, self._pad_id)

    def answers(
        self, prompts: list[list[int]], *, stop_ids: list[int], max_new_tokens: int
    ) -> list[Answer]:
        """Generate greedy answers; see ``EngineModel``."""
        return generate(
            self._model,
            prompts,
            stop_ids=stop_ids,
            pad_id=self._pad_id,
            max_new_tokens=max_new_tokens,
            batch_rows=self._batch_rows,
        )

    def prompt(
        self, turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> tuple[str, list[int]]:
        """Return a prompt as in ``EngineModel``, tokenising the whole text at once as a server does."""
        text: Any = self._tokenizer.apply_chat_template(
            turns, tools=tools, tokenize=False, add_generation_prompt=True
        )
        bos = self._tokenizer.bos_token
        starts = bool(bos) and str(text).startswith(str(bos))
        ids = self._tokenizer(str(text), add_special_tokens=not starts).input_ids
        return str(text), list(ids)

    def ends(self, token: int) -> bool:
        """Check a stop token as in ``EngineModel``; True for an adapter, whose base has the stop tokens."""
        return self._stops is None or token in self._stops


def _stops(path: Path) -> set[int]:
    stops = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return set(stops) if isinstance(stops, list) else {stops}


def _group(merged: Path) -> int:
    """Return the largest group that divides the width of every linear layer."""
    widths = linear_widths(merged)
    for group in GROUPS:
        if all(width % group == 0 for width in widths):
            return group
    odd = sorted(width for width in widths if width % GROUPS[-1])
    raise RunError(
        f"{merged}: AWQ cuts the width of each linear layer into groups of {', '.join(map(str, GROUPS))},"
        f" and {odd[:3]} is no multiple. Use --to gguf"
    )


def awq_packages() -> Path:
    """Return the folder with llm-compressor and its packages.

    Raises:
        ModelError: they were not fetched yet.
    """
    folder = tool_folder(SITE)
    if not folder.is_dir():
        raise ModelError(f"--to awq needs {PACKAGES[0]}. Get it with: halfbyte doctor --get awq")
    return folder


def get_awq(say: Callable[[str], None]) -> None:
    """Fetch llm-compressor with its packages, apart from the environment.

    Args:
        say: gets a line for what is fetched, and one for where it lies.

    Raises:
        ModelError: pip cannot install it.
    """
    say(f"of the package index, apart from this environment: {', '.join(PACKAGES)}")
    say(f"{cached_tool(SITE, _install)}")


def _install(target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    done = subprocess.run([*command, str(target), *PACKAGES], capture_output=True, text=True)
    if done.returncode:
        raise ModelError(
            f"--to awq: pip could not install {', '.join(PACKAGES)}: {last_line(done.stderr)}"
        )
