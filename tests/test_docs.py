"""The documents tell the truth: files exist, commands exist, keys and versions agree."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import get_args

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import SchedulerType
from transformers.training_args import OptimizerNames

import halfbyte
from halfbyte.config import load_run
from halfbyte.config.reference import reference
from halfbyte.config.schema import Optimizer, Scheduler, Speed

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/evaluate.md",
    "docs/export.md",
    "docs/serve.md",
    "data/README.md",
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_key_reference_is_what_the_schema_says() -> None:
    assert text_of("docs/config.md") == reference()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_a_document_names_exist(name: str) -> None:
    pattern = r"(?:train|data|eval|configs|docs|tests|src)/[\w./-]*\w\.(?:py|yaml|md)"
    named = set(re.findall(pattern, text_of(name)))
    named -= {"configs/my.yaml"}  # the reader's own
    assert named
    places = (ROOT, ROOT / "src" / "halfbyte")
    assert not [path for path in named if not any((place / path).exists() for place in places)]


def test_make_targets_that_documents_name_exist() -> None:
    targets = set(re.findall(r"^(\w[\w-]*):", text_of("Makefile"), re.MULTILINE))
    named = {t for name in DOCUMENTS for t in re.findall(r"make ([a-z][\w-]*)", text_of(name))}
    assert {"quickstart", "test", "check", "fix", "test-slow"} <= named & targets
    commands = {
        t for line in text_of("README.md").splitlines() for t in re.findall(r"^make ([\w-]+)", line)
    }
    assert commands <= targets


def test_every_script_is_in_the_readme() -> None:
    scripts = [p for folder in ("train", "data", "eval") for p in (ROOT / folder).glob("*.py")]
    assert len(scripts) >= 6
    assert not [p for p in scripts if f"{p.parent.name}/{p.name}" not in text_of("README.md")]


def test_shipped_configs_load_and_are_in_the_readme() -> None:
    configs = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(configs) >= 3
    for path in configs:
        assert load_run(path, [], {}).name == path.stem
        assert f"configs/{path.name}" in text_of("README.md")


def test_readme_results_come_from_a_committed_report() -> None:
    """The table is the one of the report that `make quickstart` wrote."""
    report = text_of("docs/quickstart_report.md")
    rows = [line for line in report.splitlines() if line.startswith("| ") and "[" in line]
    names = {row.split("|")[1].split(" (")[0].strip() for row in rows}
    models = {"base-full", "base-full-fewshot", "base-nf4", "adapter", "merged"}
    assert names >= models | {"majority", "nearest", "base-full-retrieval"}
    for row in rows:
        variant, exact_match = (cell.strip() for cell in row.split("|")[1:3])
        assert f"| {variant} | {exact_match} |" in text_of("README.md")


def test_version_agrees_everywhere() -> None:
    assert PROJECT["version"] == halfbyte.__version__ == metadata.version("halfbyte")
    assert f"## [{halfbyte.__version__}]" in text_of("CHANGELOG.md")


def test_constraints_lie_within_the_ranges_of_pyproject() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", text_of("constraints.txt"), re.MULTILINE))
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    lines = [
        *PROJECT["dependencies"],
        *(r for e in PROJECT["optional-dependencies"].values() for r in e),
    ]
    wanted = [Requirement(line) for line in lines if not line.startswith("halfbyte")]
    assert len(wanted) > 20
    for requirement in wanted:
        assert (
            Version(pins[re.sub(r"[-_.]+", "-", requirement.name).lower()]) in requirement.specifier
        )


def test_ranges_admit_the_versions_that_are_promised() -> None:
    ranges = {r.name: r.specifier for r in map(Requirement, PROJECT["dependencies"])}
    for name, version in (
        ("torch", "2.11.0"),
        ("torch", "2.13.0"),
        ("transformers", "5.17.0"),
        ("trl", "1.15.0"),
    ):
        assert version in ranges[name]
    assert PROJECT["requires-python"] == ">=3.11,<3.14"


def test_every_optimizer_and_scheduler_is_one_of_transformers() -> None:
    optimizers, schedulers = get_args(Optimizer), get_args(Scheduler)
    assert len(optimizers) >= 5
    assert len(schedulers) >= 5
    assert set(optimizers) <= {name.value for name in OptimizerNames}
    assert set(schedulers) <= {name.value for name in SchedulerType}


def test_project_speaks_of_itself_alone() -> None:
    tracked = [p for p in ROOT.rglob("*") if p.suffix in (".py", ".md", ".yaml", ".toml", ".txt")]
    tracked = [p for p in tracked if not {".venv", ".bench", "runs", "node_modules"} & set(p.parts)]
    assert len(tracked) > 50
    outside = re.compile(r"(?<![\w.])/(?:work|root|tmp/w)/")
    assert not [
        p for p in tracked if p.name != "test_docs.py" and outside.search(p.read_text("utf-8"))
    ]


def test_performance_page_has_the_figures_of_the_benchmark() -> None:
    page = text_of("docs/performance.md")
    table = re.compile(
        r"^\| (?:trl|unsloth|llamafactory|halfbyte)\S* \| [\d.]+ \|.*$", re.MULTILINE
    )
    shown = table.findall(page)
    assert len(shown) >= 3
    results = ROOT.glob("benchmarks/results/speed_*.md")
    measured = {line for path in results for line in table.findall(path.read_text("utf-8"))}
    assert set(shown) <= measured


def test_every_lever_is_explained() -> None:
    page = text_of("docs/performance.md")
    assert all(f"`speed.{name}`" in page for name in Speed.model_fields)


def test_serving_page_has_the_figures_of_the_benchmark() -> None:
    page = text_of("docs/serve.md")
    measured = text_of("benchmarks/results/serve_cpu_smollm2.md").strip()
    assert len(measured.splitlines()) == 8
    assert measured in page
    load = json.loads(text_of("benchmarks/results/serve_load_cpu_smollm2.json"))
    assert load["faults"] == []
    asked = {kind: count for kind, count in load["requests"].items() if "health" not in kind}
    words = " ".join(page.split())
    for count in (sum(asked.values()), *asked.values(), load["requests"]["health: 200"]):
        assert f"{count:,}" in words
    median, slow = load["health_ms"]["median"], load["health_ms"]["p99"]
    assert f"a median of {median:.1f} ms and {slow:.1f} ms at the 99th" in words
    first, last = load["rss_mb"].values()
    assert f"{first:,.0f} MB in the first tenth of the time and {last:,.0f} MB in the last" in words


def test_evaluation_page_has_the_figures_of_its_report_and_benchmarks() -> None:
    page = text_of("docs/evaluate.md")
    words = " ".join(page.split())
    lines = text_of("docs/benchmark_report.md").splitlines()
    for name in ("adapter", "gemma-3-270m"):
        scores, costs = (
            [cell.strip() for cell in line.split("|")[1:-1]]
            for line in lines
            if line.startswith(f"| {name} |")
        )
        assert f"{costs[2]} is right on {scores[1]}" in words or (
            f"one of {costs[2]} on {scores[1]}" in words
        )
        assert f"{costs[5]} tokens/s" in words or f"that one has {costs[5]}" in words
        assert f"{costs[6]} s for 1,000 rows" in words or f"that one needs {costs[6]}" in words
    for name in (
        "eval_speed_cpu_smollm2",
        "eval_speed_cpu_avx2_smollm2",
        "ladder_smollm2",
        "ladder_gemma270m",
        "ladder_cuda_smollm2",
    ):
        measured = text_of(f"benchmarks/results/{name}.md")
        table = [line for line in measured.splitlines() if line.startswith("|")]
        assert len(table) >= 4
        assert "\n".join(table) in page
    compared = json.loads(text_of("benchmarks/results/against_harness_smollm2.json"))
    asked = {task: found["n"] for task, found in compared["tasks"].items()}
    assert list(asked.values()) == [60, 20, 20, 20, 10]
    assert compared["faults"] == []
    for name in ("report_phone.png", "report_desktop.png", "wandb_view.png"):
        assert f"({name})" in page
        assert (ROOT / "docs" / name).stat().st_size > 10_000


def test_picture_and_index_of_the_code_are_current() -> None:
    command = [sys.executable, str(ROOT / "docs/architecture_picture.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_guarantees_list_every_mutant_and_name_tests_that_are_there() -> None:
    import mutants

    page = text_of("docs/guarantees.md")
    assert mutants.as_markdown() in page
    for name in re.findall(r"`(tests/test_\w+\.py)`", page):
        assert (ROOT / name).is_file(), name
    for mutant in mutants.MUTANTS:
        source = (ROOT / "src" / "halfbyte" / mutant.file).read_text(encoding="utf-8")
        assert source.count(mutant.old) == 1, mutant.guard
        file, _, test = mutant.test.partition("::")
        tests = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"def {test.partition('[')[0]}(" in tests, mutant.guard
