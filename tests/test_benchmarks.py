"""Benchmarks of lm-evaluation-harness: its official tasks on a hub-shaped folder, asked of our own models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.config import Run, read_run_folder
from halfbyte.eval.harness import Asked, ask, load_benchmarks
from halfbyte.model.load import load_model, load_tokenizer
from halfbyte.model.passes import add_token_loss
from halfbyte.model.precision import Compute
from halfbyte.model.resolve import resolve_base
from halfbyte.run_dir import read_jsonl

pytestmark = pytest.mark.real
CPU32 = Compute(torch.device("cpu"), torch.float32, "test")
SUBJECTS = ("anatomy", "virology", "astronomy")
ORGANS = ["heart", "lung", "liver", "kidney", "brain", "skin", "bone", "eye", "ear", "tongue"]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets as the Hub holds them, small: the official tasks find them by the names of their folders."""
    hub = tmp_path_factory.mktemp("hub")
    for subject in SUBJECTS:
        rows = [
            {
                "question": f"Which of these belongs to {subject} number {n}?",
                "choices": [f"the {ORGANS[(n + shift) % 10]}" for shift in range(4)],
                "answer": n % 4,
                "subject": subject,
            }
            for n in range(10)
        ]
        for split, count in (("test", 10), ("dev", 5), ("validation", 5)):
            write_rows(hub / "cais/mmlu" / subject / f"{split}.jsonl", rows[:count])
    described = "".join(
        f"- config_name: {subject}\n  data_files:\n"
        + "".join(
            f"  - split: {split}\n    path: {subject}/{split}.jsonl\n"
            for split in ("test", "dev", "validation")
        )
        for subject in SUBJECTS
    )
    (hub / "cais/mmlu/README.md").write_text(f"---\nconfigs:\n{described}---\n")
    truths = [
        {
            "question": f"What is said of the {organ}?",
            "mc1_targets": {
                "choices": [f"It is part of the body, as the {organ} is.", "It is made of cheese."],
                "labels": [1, 0],
            },
            "mc2_targets": {
                "choices": [
                    f"The {organ} is part of the body.",
                    "It is part of the body.",
                    "It is made of cheese.",
                ],
                "labels": [1, 1, 0],
            },
        }
        for organ in ORGANS
    ]
    write_rows(hub / "truthfulqa/truthful_qa/validation.jsonl", truths)
    (hub / "truthfulqa/truthful_qa/README.md").write_text(
        "---\nconfigs:\n- config_name: multiple_choice\n  data_files:\n"
        "  - split: validation\n    path: validation.jsonl\n---\n"
    )
    sums = [
        {"question": f"What is {n} plus {n}?", "answer": f"It is the sum.\n#### {n + n}"}
        for n in range(12)
    ]
    for split in ("train", "test"):
        write_rows(hub / "openai/gsm8k/main" / f"{split}.jsonl", sums)
    (hub / "openai/gsm8k/README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: main/{s}.jsonl\n" for s in ("train", "test"))
        + "---\n"
    )
    programs = [
        {
            "task_id": f"HumanEval/{n}",
            "prompt": f"def add_{n}(x):\n    return x + {n}\n",
            "canonical_solution": "",
            "test": f"def check(candidate):\n    assert candidate(1) == {n + 1 - n % 2}\n",
            "entry_point": f"add_{n}",
        }
        for n in range(4)
    ]
    write_rows(hub / "openai/openai_humaneval/test.jsonl", programs)
    (hub / "openai/openai_humaneval/README.md").write_text(
        "---\nconfigs:\n- config_name: openai_humaneval\n  data_files:\n"
        "  - split: test\n    path: test.jsonl\n---\n"
    )
    return hub


@pytest.fixture(scope="module")
def small_run(merged_run: Path) -> Path:
    return merged_run


def run_with(folder: Path, hub: Path, *benchmarks: str, **settings: Any) -> Run:
    given = [f"eval.{key}={json.dumps(value)}" for key, value in settings.items()]
    return read_run_folder(
        folder,
        [f"eval.benchmarks=[{', '.join(benchmarks)}]", f"eval.benchmark_data={hub}", *given],
    )


def harness_itself(
    base: Path, hub: Path, asked: list[Asked], out: Path, *options: str
) -> tuple[dict[str, Any], dict[tuple[str, int], dict[str, Any]]]:
    """Results and samples of the harness's own command line on the same questions."""
    samples: dict[str, list[int]] = {}
    for benchmark in asked:
        for task, number in benchmark.questions:
            samples.setdefault(task, []).append(number)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf"),
        *("--model_args", f"pretrained={base},dtype=float32", "--device", "cpu"),
        *("--tasks", ",".join(samples), "--samples", json.dumps(samples), "--batch_size", "4"),
        *("--output_path", str(out), "--log_samples", *options),
    ]
    done = subprocess.run(command, cwd=hub, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (told,) = out.rglob("results_*.json")
    found = {}
    for path in out.rglob("samples_*.jsonl"):
        task = path.name.removeprefix("samples_").rpartition("_")[0]
        for row in read_jsonl(path):
            found[task, row["doc_id"]] = row
    results: dict[str, Any] = json.loads(told.read_text())["results"]
    return results, found


def test_official_tasks_score_as_the_harness_command_line_does(
    small_run: Path, small_base: Path, hub: Path, tmp_path: Path
) -> None:
    run = run_with(
        small_run,
        hub,
        "{task: truthfulqa_mc1, limit: 8}",
        "{task: truthfulqa_mc2, limit: 8}",
        "{task: mmlu_anatomy, limit: 6, fewshot: 2}",
        batch_size=4,
    )
    asked = load_benchmarks(run)
    base = resolve_base(str(small_base))
    loaded = load_model(base, "fp32", compute=CPU32)
    assert add_token_loss(loaded.model) == ""
    ours = [ask(benchmark, loaded.model, load_tokenizer(base), run) for benchmark in asked]
    for number, fewshot in ((slice(0, 2), "0"), (slice(2, 3), "2")):
        results, samples = harness_itself(
            small_base, hub, asked[number], tmp_path / fewshot, "--num_fewshot", fewshot
        )
        for benchmark, answered in zip(asked[number], ours[number], strict=True):
            (task,) = benchmark.tasks
            for key, value in answered.harness[task].items():
                assert value == pytest.approx(results[task][key], abs=1e-5), key
            for at, question in enumerate(benchmark.questions):
                theirs = samples[question]
                assert answered.scores["acc,none"][at] == pytest.approx(theirs["acc"], abs=1e-5)
                logged = [float(told[0][0]) for told in theirs["resps"]]
                own = [told[0][0] for told in answered.samples[at]["answers"]]
                assert own == pytest.approx(logged, abs=1e-3)
