"""The shape of the code: imports point one way, libraries stay where they belong, files stay readable.

A rule is a function from sources by path to faults. Each holds of the repository, and each is shown to
find a planted violation.
"""

from __future__ import annotations

import ast
import functools
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "src/halfbyte/"
# A part may import itself and the groups after its own; parts of one group do not know each other.
LAYERS = [
    ["__main__"],
    ["command_line"],
    ["commands"],
    ["doctor", "importing", "initial"],
    ["serve", "ship", "eval", "train"],
    ["plan"],
    ["llamacpp"],
    ["generate", "scoring", "trained"],
    ["forward"],
    ["model", "data"],
    ["kernels"],
    ["libraries", "tracking"],
    ["config"],
    ["record"],
    ["run_lock"],
    ["run_dir", "launch"],
    ["errors", "heap", "host"],
    ["bounds", "faults", "wandb_worker"],
]
# Which files may import a library; those in EVERYWHERE are what the code is written in.
EVERYWHERE = {"torch", "transformers", "numpy", "safetensors"}
LIBRARIES = {
    "PIL": {"eval/chat.py"},
    "accelerate": {
        "plan/gate.py",
        "train/checkpoints.py",
        "train/diagnosis.py",
        "train/held_out.py",
        "train/rehearsal.py",
        "train/source_losses.py",
    },
    "bitsandbytes": {"doctor/checks.py", "model/int8_linear.py", "model/quantised.py"},
    "compressed_tensors": {"ship/awq_worker.py"},
    "datasets": {"data/sources.py", "train/trainer.py"},
    "evaluate": {"eval/code_metric.py"},
    "fastapi": {"serve/api.py", "serve/refusal.py", "serve/replies.py"},
    "filelock": {"llamacpp/tools.py", "model/packaged.py", "run_lock.py"},
    "httpx": {"eval/judge.py", "model/resolve.py"},
    "huggingface_hub": {"doctor/checks.py", "model/resolve.py", "ship/hub.py"},
    "jinja2": {"data/template_analysis.py", "eval/pages.py", "plan/plots.py"},
    "jsonschema": {"scoring/metrics.py", "scoring/rows.py"},
    "llguidance": {"generate/grammar.py"},
    "llmcompressor": {"ship/awq_worker.py"},
    "lm_eval": {"eval/benchmarks.py", "eval/harness.py", "eval/harness_model.py", "libraries.py"},
    "matplotlib": {"eval/plots.py", "plan/plots.py"},
    "packaging": {"doctor/known_bad.py"},
    "peft": {
        "model/adapter.py",
        "model/new_tokens.py",
        "ship/measured_run.py",
        "train/rehearsal.py",
        "train/setup.py",
    },
    "prometheus_client": {"serve/metrics.py"},
    "psutil": {"host.py", "plan/devices.py"},
    "pyarrow": {"data/files.py", "data/sources.py"},
    "pydantic": {
        "config/dataset.py",
        "config/evaluation.py",
        "config/read.py",
        "config/reference.py",
        "config/schema.py",
        "config/section.py",
        "record.py",
        "serve/fields.py",
        "serve/reply_schema.py",
        "serve/response_schema.py",
        "serve/schema.py",
    },
    "pydantic_core": {"config/reference.py"},
    "pynvml": {"eval/energy.py"},
    "rouge_score": {"scoring/metrics.py"},
    "ruamel": {"config/read.py", "config/source.py", "importing/read.py", "initial/text.py"},
    "sacrebleu": {"scoring/metrics.py"},
    "scipy": {"data/leaks.py", "eval/intervals.py", "eval/likeness.py"},
    "sklearn": {"eval/likeness.py", "eval/opponents.py"},
    "shtab": {"commands/completion.py"},
    "simple_icd_10_cm": {"data/icd10.py"},
    "starlette": {"serve/api.py", "serve/limits.py", "serve/replies.py", "serve/submission.py"},
    "tokenizers": {"doctor/trial.py"},
    "tqdm": {"train/callbacks.py"},
    "trl": {"train/trainer.py"},
    "triton": {"kernels/triton_blocks.py", "kernels/triton_layers.py"},
    "uvicorn": {"serve/limits.py", "serve/server.py"},
    "wandb": {"tracking.py", "wandb_worker.py"},
    "wandb_workspaces": {"eval/dashboard.py"},
}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_MEDIAN_LINES, MAX_SCRIPT_LINES = 350, 60, 9, 135
BANNED_WORDS = {"told", "asked"}
MAX_FOUND = 20  # variables and arguments of this name
BANNED_TEXT = ("torch.load(", "pickle", "yaml.load(", "trust_remote_code=True", "eval(", "exec(")
ATTENTION_TABLES = {"AttentionInterface", "AttentionMaskInterface"}

Sources = Mapping[str, str]
Rule = Callable[[Sources], list[str]]


def read_sources() -> dict[str, str]:
    """Every Python file of the package, the scripts and the tests, by its path in the repository."""
    globs = ("src/halfbyte/**/*.py", "train/*.py", "data/*.py", "eval/*.py", "tests/*.py")
    paths = [path for pattern in globs for path in ROOT.glob(pattern)]
    return {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in sorted(paths)}


SOURCES = read_sources()


# --- reading sources ---


@functools.cache
def parse(text: str) -> ast.Module:
    return ast.parse(text)


def package(sources: Sources) -> dict[str, str]:
    return {p.removeprefix(PACKAGE): text for p, text in sources.items() if p.startswith(PACKAGE)}


def scripts(sources: Sources) -> dict[str, str]:
    folders = ("train/", "data/", "eval/")
    return {path: text for path, text in sources.items() if path.startswith(folders)}


def shipped(sources: Sources) -> dict[str, str]:
    """Everything but the tests."""
    return {path: text for path, text in sources.items() if not path.startswith("tests/")}


def imports(text: str) -> Iterator[tuple[str, str]]:
    """Module and name of each import in a file, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


def module_name(path: str) -> str:
    return "halfbyte." + path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def functions(text: str) -> Iterator[tuple[str, int]]:
    """Name and number of lines of each function."""
    for node in ast.walk(parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or 0) - node.lineno + 1


def identifiers(text: str) -> Iterator[str]:
    """Every name that a file binds or uses."""
    for node in ast.walk(parse(text)):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg | ast.keyword):
            yield node.arg or ""
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name


def bindings(text: str) -> Iterator[str]:
    """Names of variables and arguments, once for each place that binds them."""
    for node in ast.walk(parse(text)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


# --- the rules ---


def upward_imports(sources: Sources) -> list[str]:
    """A part imports only itself and parts of the groups after its own."""
    rank = {part: number for number, group in enumerate(LAYERS) for part in group}
    faults = []
    for path, text in package(sources).items():
        own = path.split("/")[0].removesuffix(".py")
        if own == "__init__":
            continue
        for module, _ in imports(text):
            other = module.split(".")[1] if module.startswith("halfbyte.") else own
            if own != other and rank[own] >= rank[other]:
                faults.append(f"{path} imports {module}")
    return faults


def import_circles(sources: Sources) -> list[str]:
    """No module imports itself by way of others."""
    modules = {module_name(path): text for path, text in package(sources).items()}
    graph = {
        name: {
            f"{module}.{member}" if f"{module}.{member}" in modules else module
            for module, member in imports(text)
        }
        & modules.keys()
        for name, text in modules.items()
    }
    faults: list[str] = []
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        if name in way:
            faults.append(" → ".join((*way[way.index(name) :], name)))
        elif name not in done:
            for other in sorted(graph[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())
    return faults


def strange_libraries(sources: Sources) -> list[str]:
    """A library is imported by the files that are listed for it, and each of these imports it."""
    users: dict[str, set[str]] = {}
    for path, text in package(sources).items():
        for module, _ in imports(text):
            library = module.split(".")[0]
            if library not in sys.stdlib_module_names | EVERYWHERE | {"halfbyte"}:
                users.setdefault(library, set()).add(path)
    return [
        f"{library}: {path}"
        for library in users.keys() | LIBRARIES.keys()
        for path in users.get(library, set()) ^ LIBRARIES.get(library, set())
    ]


def replaced_forwards(sources: Sources) -> list[str]:
    """Only ``forward/`` replaces a module's forward or registers an attention; the plan's fakes may too."""
    faults = []
    for path, text in package(sources).items():
        if path.startswith("forward/") or path == "plan/fake.py":
            continue
        for node in ast.walk(parse(text)):
            targets: list[ast.expr] = []
            if isinstance(node, ast.Assign):
                targets = node.targets
            elif isinstance(node, ast.AnnAssign | ast.AugAssign):
                targets = [node.target]
            if any(isinstance(t, ast.Attribute) and t.attr == "forward" for t in targets):
                faults.append(f"{path}:{node.lineno} assigns to a forward")  # type: ignore[attr-defined]
            if isinstance(node, ast.Call) and ast.unparse(node).startswith("setattr("):
                names = map(ast.unparse, node.args)
                faults += [f"{path}:{node.lineno} sets a forward"] * ("'forward'" in names)
            if isinstance(node, ast.Name) and node.id in ATTENTION_TABLES:
                faults.append(f"{path}:{node.lineno} uses {node.id}")
    return faults


def long_files(sources: Sources) -> list[str]:
    return [
        f"{path}: {lines} lines"
        for path, text in package(sources).items()
        if (lines := len(text.splitlines())) > MAX_FILE_LINES
    ] + [
        f"{path}: {lines} lines"
        for path, text in scripts(sources).items()
        if (lines := len(text.splitlines())) > MAX_SCRIPT_LINES
    ]


def long_functions(sources: Sources) -> list[str]:
    """No function is long, and most are short."""
    sizes = [
        (path, name, lines)
        for path, text in package(sources).items()
        for name, lines in functions(text)
    ]
    median = statistics.median(lines for _, _, lines in sizes)
    return [f"{p}: {name} has {n} lines" for p, name, n in sizes if n > MAX_FUNCTION_LINES] + (
        [f"the median function has {median} lines"] if median > MAX_MEDIAN_LINES else []
    )


def riddles(sources: Sources) -> list[str]:
    """Names say what they hold."""
    faults = [
        f"{path}: {name}"
        for path, text in shipped(sources).items()
        for name in identifiers(text)
        if BANNED_WORDS & {word.lower() for word in re.split(r"_|(?<=[a-z])(?=[A-Z])", name)}
    ]
    num_found = sum(list(bindings(text)).count("found") for text in shipped(sources).values())
    return faults + ([f"found is bound {num_found} times"] if num_found > MAX_FOUND else [])


def repeated_classes(sources: Sources) -> list[str]:
    """A class name means one thing."""
    names = Counter(
        node.name
        for text in package(sources).values()
        for node in ast.walk(parse(text))
        if isinstance(node, ast.ClassDef)
    )
    return [name for name, count in names.items() if count > 1]


def nameless_modules(sources: Sources) -> list[str]:
    """Each module opens with one sentence that says what it owns, each script with what it does."""
    return [
        path
        for path, text in shipped(sources).items()
        if not (ast.get_docstring(parse(text)) or "").split("\n")[0].endswith(".")
    ]


def imported_scripts(sources: Sources) -> list[str]:
    """Scripts are run, never imported."""
    names = {path.removesuffix(".py").replace("/", ".") for path in scripts(sources)}
    return [
        f"{path} imports {module}"
        for path, text in shipped(sources).items()
        for module, _ in imports(text)
        if module in names
    ]


def shadowing_scripts(sources: Sources) -> list[str]:
    """A script's folder comes first on the path: its name must be no module's, and no other script's."""
    stems = [Path(path).stem for path in scripts(sources)]
    taken = set(sys.stdlib_module_names) | {"datasets", "evaluate", "tokenizers", "transformers"}
    return [stem for stem in stems if stem in taken or stems.count(stem) > 1]


def unsafe_loading(sources: Sources) -> list[str]:
    """Pickles, unsafe YAML and remote code are not reachable."""
    faults = []
    for path, text in shipped(sources).items():
        text = text.replace(".eval(", "")
        if path.endswith("sandbox_worker.py"):  # what it is for, once it has given up its rights
            text = text.replace("exec(code", "")
        faults += [f"{path}: {word}" for word in BANNED_TEXT if word in text]
    return faults


def sleeping_tests(sources: Sources) -> list[str]:
    """Tests wait for a condition with a deadline, and hold no assertion about the clock."""
    faults = []
    for path, text in sources.items():
        if not path.startswith("tests/") or path == "tests/waiting.py":
            continue
        for node in ast.walk(parse(text)):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name.endswith("sleep") and ast.unparse(node) != "asyncio.sleep(0)":
                    faults.append(f"{path}:{node.lineno} sleeps")
            if isinstance(node, ast.Assert) and re.search(
                r"perf_counter|monotonic|time\.time\(", ast.unparse(node.test)
            ):
                faults.append(f"{path}:{node.lineno} asserts wall-clock time")
    return faults


PLANTED: dict[Rule, dict[str, str]] = {
    upward_imports: {"data/rows.py": "def f():\n    from halfbyte.train.trainer import x\n"},
    import_circles: {
        "data/one.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from halfbyte.data import two\n",
        "data/two.py": "def f():\n    from halfbyte.data.one import g\n",
    },
    strange_libraries: {"data/rows.py": "def f():\n    import wandb\n"},
    replaced_forwards: {"model/patch.py": "def f(layer, g):\n    layer.forward = g\n"},
    long_files: {"data/long.py": "x = 1\n" * (MAX_FILE_LINES + 1)},
    long_functions: {"data/long.py": "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES},
    riddles: {"data/told.py": "def f(num_told):\n    return num_told\n"},
    repeated_classes: {"data/again.py": "class Renderer: ...\n"},
    nameless_modules: {"data/silent.py": "x = 1\n"},
    imported_scripts: {"data/rows.py": "import train.sft\n"},
    unsafe_loading: {"data/rows.py": "import pickle\n"},
}
PLANTED_ELSEWHERE: dict[Rule, dict[str, str]] = {
    shadowing_scripts: {"eval/statistics.py": ""},
    sleeping_tests: {"tests/test_x.py": "import time\ndef test_x():\n    time.sleep(1)\n"},
}
# Rules with more than one way to be broken.
ALSO_PLANTED: list[tuple[Rule, str, str]] = [
    (upward_imports, "src/halfbyte/train/x.py", "from halfbyte.eval.report import write_report\n"),
    (replaced_forwards, "src/halfbyte/eval/x.py", "setattr(layer, 'forward', g)\n"),
    (replaced_forwards, "src/halfbyte/eval/x.py", "AttentionInterface.register('x', f)\n"),
    (strange_libraries, "src/halfbyte/eval/x.py", "import brand_new_library\n"),
    (riddles, "src/halfbyte/eval/x.py", "found = 1\n" * (MAX_FOUND + 1)),
    (riddles, "src/halfbyte/eval/x.py", "class AskedModel: ...\n"),
    (long_files, "train/x.py", "x = 1\n" * (MAX_SCRIPT_LINES + 1)),
    (sleeping_tests, "tests/test_x.py", "assert time.perf_counter() - start < 3\n"),
]


def planted() -> list[tuple[Rule, dict[str, str]]]:
    inside = [(rule, {PACKAGE + p: t for p, t in v.items()}) for rule, v in PLANTED.items()]
    also = [(rule, {path: text}) for rule, path, text in ALSO_PLANTED]
    return [*inside, *PLANTED_ELSEWHERE.items(), *also]


@pytest.mark.parametrize("rule", [*PLANTED, *PLANTED_ELSEWHERE], ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule) -> None:
    assert len(package(SOURCES)) > 100
    assert len(scripts(SOURCES)) >= 8
    assert rule(SOURCES) == []


@pytest.mark.parametrize(("rule", "violation"), planted())
def test_rule_finds_a_planted_violation(rule: Rule, violation: dict[str, str]) -> None:
    assert set(rule({**SOURCES, **violation})) - set(rule(SOURCES))


def test_layers_in_the_docs_are_those_of_the_code() -> None:
    line = " > ".join(", ".join(group) for group in LAYERS)
    assert f"`{line}`" in (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    parts = {path.split("/")[0].removesuffix(".py") for path in package(SOURCES)} - {"__init__"}
    assert parts == {part for group in LAYERS for part in group}
