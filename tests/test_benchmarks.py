"""Benchmarks of lm-evaluation-harness: its official tasks on a hub-shaped folder, asked of our own models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from serving import serving
from toys import run_script

from benchmarks.against_harness import command_line
from halfbyte.config import Run, read_run_folder
from halfbyte.errors import ConfigError
from halfbyte.eval import code_metric, harness_model
from halfbyte.eval.benchmarks import ask, load_benchmarks
from halfbyte.eval.harness import collect_scores, evaluate_tasks
from halfbyte.eval.harness_model import SharedPrefixLM
from halfbyte.eval.sandbox import run_program
from halfbyte.forward.packed import add_token_loss
from halfbyte.generate.continuous import SlotGenerator
from halfbyte.model.cpu_speed import unpack_for_speed
from halfbyte.model.load import load_model
from halfbyte.model.precision import Compute
from halfbyte.model.resolve import resolve_base
from halfbyte.model.tokenizer import load_tokenizer
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


@pytest.mark.slow
def test_official_tasks_score_as_the_harness_command_line_does(
    small_run: Path, small_base: Path, hub: Path
) -> None:
    run = run_with(
        small_run,
        hub,
        "{task: truthfulqa_mc1, limit: 8}",
        "{task: truthfulqa_mc2, limit: 8}",
        "{task: mmlu_anatomy, limit: 6}",
        "{task: gsm8k, limit: 5, max_new_tokens: 12}",
        batch_size=4,
    )
    asked = load_benchmarks(run)
    base = resolve_base(str(small_base))
    loaded = load_model(base, "fp32", compute=CPU32)
    assert add_token_loss(loaded.model) == ""
    ours = [ask(benchmark, loaded.model, load_tokenizer(base), run) for benchmark in asked]
    questions = [question for benchmark in asked for question in benchmark.questions]
    results, samples, _ = command_line(
        str(small_base), hub, questions, batch_size=4, max_new_tokens=12
    )
    for benchmark, answered in zip(asked[:3], ours[:3], strict=True):
        (task,) = benchmark.tasks
        assert "acc_stderr,none" in answered.harness[task]
        for key, value in answered.harness[task].items():
            assert value == pytest.approx(results[task][key], abs=1e-5), key
        for at, question in enumerate(benchmark.questions):
            theirs = samples[*question, "none"]
            assert answered.scores["acc,none"][at] == pytest.approx(theirs["acc"], abs=1e-5)
            logged = [float(told[0][0]) for told in theirs["resps"]]
            own = [told[0][0] for told in answered.samples[at]["answers"]]
            assert own == pytest.approx(logged, abs=1e-3)
            greedy = [told[0][1] for told in theirs["resps"]]
            assert [str(told[0][1]) for told in answered.samples[at]["answers"]] == greedy
    generated = ours[3]
    assert set(generated.scores) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert generated.harness["gsm8k"] == {
        key: results["gsm8k"][key] for key in generated.harness["gsm8k"]
    }
    for sample in generated.samples:
        for kept in ("strict-match", "flexible-extract"):
            assert sample["answers"] == samples["gsm8k", sample["doc_id"], kept]["resps"]
        assert sample["answers"][0][0]


def test_answers_of_a_batch_end_each_at_its_own_stop(small_base: Path) -> None:
    base = resolve_base(str(small_base))
    loaded = load_model(base, "fp32", compute=CPU32)
    add_token_loss(loaded.model)
    tokenizer = load_tokenizer(base)
    theirs, ours, again, padded = (
        kind(pretrained=loaded.model, tokenizer=tokenizer, batch_size=size)
        for kind, size in ((HFLM, 1), (SharedPrefixLM, 4), (SharedPrefixLM, 4), (HFLM, 4))
    )
    # With the head of its embedding, to which the harness ties it, so short a model repeats its last token.
    torch.manual_seed(0)
    loaded.model.lm_head.weight = torch.nn.Parameter(torch.randn(loaded.model.lm_head.weight.shape))
    texts = [f"the {'big ' * n}patient has {organ}" for n, organ in enumerate(ORGANS[:6])]

    def asked(until: list[str]) -> list[Instance]:
        settings = {"until": until, "max_gen_toks": 16, "do_sample": False}
        return [Instance("generate_until", {}, (text, settings), n) for n, text in enumerate(texts)]

    free = theirs.generate_until(asked(["never said"]), disable_tqdm=True)
    stops = [free[0][4:7], free[3][9:11]]
    wanted = theirs.generate_until(asked(stops), disable_tqdm=True)
    assert wanted != free
    assert any(wanted)
    with mock.patch.object(harness_model, "SlotGenerator", side_effect=SlotGenerator) as in_slots:
        assert ours.generate_until(asked(stops), disable_tqdm=True) == wanted
        assert in_slots.call_count == 2
        # A stop token that is no text of the task's, as Llama 3 and Gemma have several.
        said = tokenizer.encode(free[4])[2]
        loaded.model.generation_config.eos_token_id = [tokenizer.eos_token_id, said]
        sooner = theirs.generate_until(asked(stops), disable_tqdm=True)
        assert ours.generate_until(asked(stops), disable_tqdm=True) == sooner != wanted
        assert in_slots.call_count == 4
        loaded.model.generation_config.suppress_tokens = list(range(0, 49_000, 2))
        changed = padded.generate_until(asked(stops), disable_tqdm=True)
        assert again.generate_until(asked(stops), disable_tqdm=True) == changed != wanted
        assert in_slots.call_count == 4


def test_programs_run_in_the_sandbox_alone(
    small_run: Path, small_base: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs: list[str] = []

    def noted(source: str, **options: Any) -> Any:
        programs.append(source)
        return run_program(source, **options)

    monkeypatch.setattr(code_metric, "run_program", noted)
    # The prompts of these questions are whole functions, right for the even ones: what follows them is
    # cut to nothing.
    run = run_with(small_run, hub, "{task: humaneval, max_new_tokens: 1}", run_code=True)
    (asked,) = load_benchmarks(run)
    assert asked.metric == "pass@1,create_test"
    assert programs  # the rehearsal's
    programs.clear()
    base = resolve_base(str(small_base))
    loaded = load_model(base, "fp32", compute=CPU32)
    add_token_loss(loaded.model)
    tokenizer = load_tokenizer(base)
    decode = tokenizer.decode

    def say_nothing(*given: Any, **options: Any) -> Any:
        ids = [*given, *options.values()][0]
        return "" if isinstance(ids, list) else decode(*given, **options)

    monkeypatch.setattr(tokenizer, "decode", say_nothing)
    told = ask(asked, loaded.model, tokenizer, run)
    assert told.scores[asked.metric] == [1, 0, 1, 0]
    assert len(programs) == 4
    assert all("check(add_" in program for program in programs)


def test_a_group_is_drawn_from_all_its_tasks_and_always_alike(small_run: Path, hub: Path) -> None:
    tag = "{task: mmlu_stem_tasks, limit: 7}"
    with pytest.raises(
        ConfigError, match="cannot be loaded"
    ):  # 18 subjects, of which two are there
        load_benchmarks(run_with(small_run, hub, tag))
    alone = run_with(small_run, hub, "{task: mmlu_anatomy, limit: 4}")
    first, second = (load_benchmarks(alone)[0].questions for _ in range(2))
    assert first == second
    assert len(first) == 4
    assert first != [("mmlu_anatomy", number) for number in range(4)]
    seeded = alone.model_copy(update={"seed": 7})
    assert load_benchmarks(seeded)[0].questions != first


@pytest.mark.parametrize(
    ("benchmark", "settings", "wanted"),
    [
        ("{task: no_such_task}", {}, "has no such task"),
        ("{task: humaneval}", {}, r"allow it with eval\.run_code=true"),
        ("{task: truthfulqa_mc1, fewshot: 2}", {}, "asks without examples"),
        ("{task: mmlu_anatomy, max_new_tokens: 5}", {}, "generates nothing"),
        ("{task: mmlu_anatomy, metric: f1}", {}, "there are: acc,none"),
        ("{task: hellaswag}", {}, r"has no .*hellaswag"),
        ("{task: score_robustness_math}", {}, "runs them as Python"),
    ],
)
def test_what_cannot_be_asked_is_said_before_a_model_is_loaded(
    small_run: Path, hub: Path, benchmark: str, settings: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(ConfigError, match=wanted):
        load_benchmarks(run_with(small_run, hub, benchmark, **settings))


def test_programs_without_the_sandbox_are_refused() -> None:
    class Task:
        UNSAFE_CODE = True

        class config:  # noqa: N801  as the harness has it
            metric_list = ({"metric": lambda **_: 0},)

    assert not code_metric.is_sandboxed(Task())
    Task.UNSAFE_CODE = False
    assert code_metric.is_sandboxed(Task())


@pytest.fixture(scope="module")
def compared(small_run: Path, hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("benchmarked") / "run"
    shutil.copytree(small_run, copy)
    tasks = "[{task: mmlu_anatomy, limit: 6}, {task: truthfulqa_mc2, limit: 5}]"
    run_script(
        "eval/compare.py",
        *(copy, f"eval.benchmarks={tasks}", f"eval.benchmark_data={hub}", "eval.rows=4"),
        "eval.variants=[base-full, base-full-fewshot, base-nf4, adapter, merged]",
    )
    return copy


def test_the_report_has_each_benchmark_of_each_model(compared: Path) -> None:
    report = json.loads((compared / "eval" / "report.json").read_text())
    anatomy, truth = report["benchmarks"]
    assert (anatomy["task"], anatomy["n"], truth["n"]) == ("mmlu_anatomy", 6, 5)
    asked = {"base-full", "base-nf4", "adapter", "merged"}
    assert set(anatomy["variants"]) == set(truth["variants"]) == asked
    assert set(anatomy["differences"]) == asked - {"adapter"}
    rows = list(read_jsonl(compared / "eval" / "benchmarks.jsonl"))
    assert len(rows) == 4 * (6 + 5)
    for entry in report["benchmarks"]:
        for name, told in entry["variants"].items():
            mine = [
                row["scores"][entry["metric"]]
                for row in rows
                if (row["benchmark"], row["variant"]) == (entry["task"], name)
            ]
            assert told["value"] == pytest.approx(sum(mine) / len(mine))
            figures = told["harness"][entry["task"]]
            assert figures["acc,none"] == pytest.approx(told["value"])
            assert figures["acc_stderr,none"] >= 0
    (note,) = (one for one in report["notes"] if "not run on the benchmarks" in one)
    assert note.startswith("base-full-fewshot, base-full-retrieval")
    text = (compared / "eval" / "report.md").read_text()
    assert "General benchmarks, compared with base-full" in text
    assert "| truthfulqa_mc2 (acc,none) | 5 |" in text
    page = (compared / "eval" / "report.html").read_text()
    assert "<h2>General benchmarks</h2>" in page


def test_adapter_off_answers_as_the_4_bit_base_alone(
    compared: Path, small_base: Path, hub: Path
) -> None:
    run = run_with(
        compared, hub, "{task: mmlu_anatomy, limit: 6}", "{task: truthfulqa_mc2, limit: 5}"
    )
    loaded = load_model(resolve_base(str(small_base)), "nf4", compute=CPU32)
    add_token_loss(loaded.model)
    unpack_for_speed(loaded.model)
    tokenizer = load_tokenizer(resolve_base(str(small_base)))
    rows = list(read_jsonl(compared / "eval" / "benchmarks.jsonl"))
    for benchmark in load_benchmarks(run):
        alone = ask(benchmark, loaded.model, tokenizer, run).samples
        task = benchmark.settings.task
        told = {
            name: [
                row["answers"] for row in rows if (row["benchmark"], row["variant"]) == (task, name)
            ]
            for name in ("base-nf4", "adapter")
        }
        assert json.loads(json.dumps([sample["answers"] for sample in alone])) == told["base-nf4"]
        assert told["adapter"] != told["base-nf4"]


@pytest.mark.slow
def test_the_harness_gets_the_same_figures_from_the_server(
    small_run: Path, small_base: Path, hub: Path, tmp_path: Path
) -> None:
    """lm-evaluation-harness's own clients of completions and chats, 20 questions of two tasks."""
    from lm_eval.api.registry import get_model

    run = run_with(
        small_run,
        hub,
        "{task: truthfulqa_mc1, limit: 10}",
        "{task: gsm8k, limit: 10, max_new_tokens: 12, fewshot: 2}",
    )
    choices, sums = load_benchmarks(run)
    base = resolve_base(str(small_base))
    loaded = load_model(base, "fp32", compute=CPU32)
    assert add_token_loss(loaded.model) == ""
    lm = SharedPrefixLM(pretrained=loaded.model, tokenizer=load_tokenizer(base), batch_size=4)

    def asked(benchmark: Any, model: Any, *, chat: bool = False) -> Any:
        results = evaluate_tasks(benchmark.tasks, benchmark.questions, model, run, chat=chat)
        return collect_scores(benchmark.tasks, results, benchmark.questions, 0)

    options = (
        "--precision",
        "fp32",
        "--compute-dtype",
        "fp32",
        "--max-context",
        2048,
        "--slots",
        4,
    )
    with serving(tmp_path / "log", f"small={small_base}", *options) as server:
        client: dict[str, Any] = {"model": "small", "num_concurrent": 1, "max_retries": 1}
        texts = get_model("local-completions")(base_url=f"{server.url}/v1/completions", **client)
        assert texts.tokenizer_backend == "remote"  # no tokenizer need be named
        chats = get_model("local-chat-completions")(
            base_url=f"{server.url}/v1/chat/completions", **client
        )
        for benchmark, model, chat in (
            (choices, texts, False),
            (sums, texts, False),
            (sums, chats, True),
        ):
            ours, theirs = asked(benchmark, lm, chat=chat), asked(benchmark, model, chat=chat)
            assert theirs.scores == ours.scores
            for mine, other in zip(ours.samples, theirs.samples, strict=True):
                if benchmark is choices:
                    scores = [
                        [float(one[0][0]) for one in sample["answers"]] for sample in (mine, other)
                    ]
                    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
                    greedy = [
                        [str(one[0][1]) for one in sample["answers"]] for sample in (mine, other)
                    ]
                    assert greedy[0] == greedy[1]
                else:
                    assert mine["answers"] == other["answers"]
                    assert mine["answers"][0][0]
