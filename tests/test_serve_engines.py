"""Engines that are not ours: GGUF files in llama.cpp behind our server, and the command for vLLM."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from serving import serving
from toys import ROOT, run_script

from halfbyte.llamacpp.model import GgufModel

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("llama_cpp")]
QUESTIONS = [f"diagnosis {n} of the heart" for n in range(6)]


def test_gguf_files_answer_beside_computations_in_bf16(exported_run: Path) -> None:
    """Where both have AMX, a decode on PyTorch's own thread dies of an illegal instruction."""
    file = next(exported_run.glob("export/gguf-q8_0/*.gguf"))
    layer = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    with GgufModel(file) as model:
        prompt = model.prompt([{"role": "user", "content": QUESTIONS[0]}])[1]
        answers = []
        for _ in range(3):
            answers += model.answers([prompt], stop_ids=None, max_new_tokens=4)
            model.logits(prompt, [0])  # the cache anew, in one batch
            layer(torch.randn(64, 64, dtype=torch.bfloat16)).sum().backward()
    assert answers == answers[:1] * 3


def test_gguf_files_answer_as_evaluation_does(exported_run: Path, tmp_path: Path) -> None:
    files = {
        kind: next(exported_run.glob(f"export/gguf-{kind}/*.gguf")) for kind in ("f16", "q8_0")
    }
    wanted = {}
    for kind, file in files.items():
        model = GgufModel(file)
        prompts = [model.prompt([{"role": "user", "content": text}])[1] for text in QUESTIONS]
        for text, prompt in zip(QUESTIONS, prompts, strict=True):
            (answer,) = model.answers([prompt], stop_ids=None, max_new_tokens=12)
            wanted[kind, text] = model.decode(answer.ids)
        del model
    arguments = [f"{kind}={file}" for kind, file in files.items()]
    with serving(tmp_path / "log", *arguments, "--max-context", 256, "--slots", 4) as server:
        client = openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120
        )
        assert [model.id for model in client.models.list()] == ["f16", "q8_0"]

        def ask(pair: tuple[str, str]) -> str:
            reply = client.chat.completions.create(
                model=pair[0], messages=[{"role": "user", "content": pair[1]}], max_tokens=12
            )
            return str(reply.choices[0].message.content)

        for pair, text in wanted.items():
            assert ask(pair).strip() == text.strip()
        with ThreadPoolExecutor(len(wanted)) as pool:
            together = list(pool.map(ask, wanted))
        assert [text.strip() for text in together] == [text.strip() for text in wanted.values()]
        completion = client.completions.create(
            model="f16", prompt="Hello", max_tokens=6, logprobs=2
        )
        assert completion.choices[0].logprobs is not None
        assert len(completion.choices[0].logprobs.token_logprobs or []) == 6


def start(path: Path, *arguments: object, key: str = "") -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(ROOT / "eval/serve.py"),
        *map(str, arguments),
        "--engine",
        "vllm",
    ]
    if "--" in command:
        command.remove("--engine")
        command.remove("vllm")
        command[3:3] = ["--engine", "vllm"]
    environment = os.environ | {"PATH": str(path), "HALFBYTE_API_KEYS": key}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=environment
    )


@pytest.mark.slow
def test_vllm_is_started_with_the_proven_adapter(exported_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(exported_run, run)
    done = start(tmp_path, run)
    assert done.returncode == 1
    assert "--to adapter" in done.stderr
    run_script("train/export.py", run, "--to", "adapter")
    done = start(tmp_path, run)
    assert done.returncode == 1
    assert "pip install vllm" in done.stderr
    fake_vllm = tmp_path / "vllm"  # prints its arguments
    fake_vllm.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps([sys.argv[1:], os.environ.get('VLLM_API_KEY')]))\n"
    )
    fake_vllm.chmod(0o755)
    more = ("--max-context", 2048, "--", "--tensor-parallel-size", "2")
    done = start(tmp_path, f"tuned={run}", *more, key="a-secret-key")
    assert done.returncode == 0, done.stderr
    assert "a-secret-key" not in done.stdout.splitlines()[0]
    arguments, key = json.loads(done.stdout.splitlines()[-1])
    assert key == "a-secret-key"
    adapter = run / "export" / "adapter"
    adapter_config = json.loads((adapter / "adapter_config.json").read_text())
    assert arguments[0] == "serve"
    assert arguments[arguments.index("--lora-modules") + 1] == f"tuned={adapter}"
    assert int(arguments[arguments.index("--max-lora-rank") + 1]) >= adapter_config["r"]
    assert arguments[arguments.index("--quantization") + 1] == "bitsandbytes"
    assert Path(arguments[arguments.index("--chat-template") + 1]).is_file()
    assert arguments[arguments.index("--max-model-len") + 1] == "2048"
    assert arguments[-2:] == ["--tensor-parallel-size", "2"]
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    assert "changed" in start(tmp_path, run).stderr
