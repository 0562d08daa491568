"""Tokens per second of served answers, alone and 16 at once, here and by ``transformers serve``.

python benchmarks/serve_throughput.py runs/quickstart --out benchmarks/results/serve_cpu_smollm2

All servers run one after the other in one sitting, with the same base, prompts and number of tokens.
transformers serve takes no adapter, so it serves the run's base folder; with --device cuda also in 4 bits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from halfbyte.config import read_run_folder
from halfbyte.model.resolve import resolve_base
from halfbyte.run_dir import provenance

SYSTEM = (
    "You assign ICD-10-CM categories. Answer with the title of the category and its code in brackets, and"
    " nothing else. Use the title as the classification prints it. When a description fits several"
    " categories, choose the most specific one. Never explain the choice."
)
WORDS = ("acute", "chronic", "recurrent", "congenital", "traumatic", "viral", "bacterial", "benign")
PARTS = ("heart", "lung", "kidney", "liver", "eye", "knee", "skin", "spine")
NUM_TOKENS = 48
PARALLEL = 16
START_S = 300


def main() -> None:
    """Each server in turn → a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    parser.add_argument("--only", nargs="*", help="names of servers")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    base = resolve_base(read_run_folder(arguments.run).model.name)
    servers = servers_on(arguments.device, arguments.run, base.path)
    results = {}
    for name, command in servers.items():
        if arguments.only and name not in arguments.only:
            continue
        own = name.startswith("halfbyte")
        results[name] = measure(command, None if own else base.path, both="adapter" in name)
        print(name, json.dumps(results[name]), flush=True)
    told = table(results)
    print(told)
    if arguments.out:
        record = {"command": sys.argv, "results": results, **provenance()}
        arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(told)


def servers_on(device: str, run: Path, base: str) -> dict[str, list[str]]:
    """Commands by name."""
    ours = [sys.executable, "eval/serve.py", str(run), "--port", "8131"]
    theirs = [sys.executable, "-m", "transformers.cli.transformers", "serve", base, "--device"]
    theirs += [device, "--port", "8131", "--host", "127.0.0.1"]
    bf16, batched = [*theirs, "--dtype", "bfloat16"], "--continuous-batching"
    both = {"halfbyte": ours, "halfbyte, half of them to the adapter": ours}
    if device == "cuda":
        return {
            **both,
            "transformers serve, bf16": bf16,
            "transformers serve, bf16, continuous batching": [*bf16, batched],
            "transformers serve, nf4": [*bf16, "--quantization", "bnb-4bit"],
        }
    fp32 = [*theirs, "--dtype", "float32"]
    return {
        **both,
        "halfbyte, fp32": [*ours, "--compute-dtype", "fp32"],
        "transformers serve, bf16": bf16,
        "transformers serve, fp32": fp32,
        "transformers serve, fp32, continuous batching": [*fp32, batched],
    }


def measure(command: list[str], model: str | None, *, both: bool) -> dict[str, float | str]:
    """Tokens per second alone and together.

    Args:
        command: starts the server.
        model: by its name there; None: the first one that it lists.
        both: every other request goes to the second one.
    """
    with tempfile.TemporaryDirectory() as scratch, serving(command, Path(scratch)) as (url, log):
        try:
            models = [model or ""]
            if model is None:
                listed = httpx.get(f"{url}/v1/models").json()["data"]
                models = [one["id"] for one in listed][: 1 + both]
            return speeds(url, models)
        except (httpx.HTTPError, KeyError, RuntimeError) as error:
            said = log.read_text(errors="replace").strip().splitlines()[-1:]
            return {"failed": f"{type(error).__name__}: {error}; {' '.join(said)}"[:300]}


def speeds(url: str, models: list[str]) -> dict[str, float | str]:
    """As ``measure``, of a server that answers."""
    for model in models:
        ask(url, model, 1)
    alone, start = 0, time.perf_counter()
    for number in range(2, 8):
        alone += ask(url, models[number % len(models)], number)
    alone_s = time.perf_counter() - start
    latencies: list[float] = []

    def timed(number: int) -> int:
        begun = time.perf_counter()
        tokens = ask(url, models[number % len(models)], number)
        latencies.append(time.perf_counter() - begun)
        return tokens

    start = time.perf_counter()
    with ThreadPoolExecutor(PARALLEL) as pool:
        together = sum(pool.map(timed, range(8, 8 + 4 * PARALLEL)))
    together_s = time.perf_counter() - start
    found: dict[str, float | str] = {
        "alone": alone / alone_s,
        "together": together / together_s,
        "median_s": statistics.median(latencies),
    }
    text = httpx.get(f"{url}/metrics").text
    totals = dict(re.findall(r"^halfbyte_(\w+)_total (\S+)$", text, re.MULTILINE))
    if "prompt_tokens" in totals:
        found["shared"] = float(totals["shared_tokens"]) / float(totals["prompt_tokens"])
    return found


def ask(url: str, model: str, number: int) -> int:
    """Generated tokens of one answer."""
    # The eight questions of a round differ from the first word on.
    asked = f"{WORDS[number % 8]} disease of the {PARTS[number // 8 % 8]}, case {number}; tell a long story"
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]
    body = {"model": model, "messages": messages, "max_tokens": NUM_TOKENS, "temperature": 0}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=600)
    if reply.status_code != httpx.codes.OK:
        raise RuntimeError(f"{reply.status_code}: {reply.text[:200]}")
    return int(reply.json()["usage"]["completion_tokens"])


def table(results: dict[str, dict[str, float | str]]) -> str:
    """Markdown."""
    lines = [
        f"| server | tokens/s, one at a time | tokens/s, {PARALLEL} at once | gain | median answer"
        f" of {PARALLEL} | prompt tokens computed before |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in results.items():
        if "failed" in found:
            lines.append(f"| {name} | failed: {found['failed']} | | | | |")
            continue
        alone, together = float(found["alone"]), float(found["together"])
        shared = f"{float(found['shared']):.0%}" if "shared" in found else "not told"
        lines.append(
            f"| {name} | {alone:.1f} | {together:.1f} | {together / alone:.1f}x |"
            f" {float(found['median_s']):.1f} s | {shared} |"
        )
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def serving(command: list[str], scratch: Path) -> Iterator[tuple[str, Path]]:
    """Start a server, wait until it is healthy, and end it; its address and its log."""
    url, log = "http://127.0.0.1:8131", scratch / "log"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(scratch)}
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, env=environment, stdout=stream, stderr=subprocess.STDOUT
        )
        try:
            until = time.monotonic() + START_S
            while time.monotonic() < until and process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health").status_code == httpx.codes.OK:
                        break
                time.sleep(0.5)
            yield url, log
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


if __name__ == "__main__":
    main()
