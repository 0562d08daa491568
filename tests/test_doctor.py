"""halfbyte doctor: known-bad versions, cards, what is printed, and a real trial."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halfbyte.doctor import checks
from halfbyte.doctor.checks import OK, WRONG, Check, run_checks
from halfbyte.doctor.known_bad import KNOWN_BAD, known_faults, libraries, oldest_driver
from halfbyte.doctor.trial import try_training
from halfbyte.errors import ModelError

GOOD = {"transformers": "5.20.0", "peft": "0.20.0", "torch": "2.13.0+cpu", "trl": "1.20.0"}


@pytest.mark.parametrize(
    ("installed", "text"),
    [
        ({"transformers": "4.45.2"}, "losses of micro-batches count alike"),
        ({"transformers": "4.48.0"}, "gradients are too large"),
        ({"peft": "0.17.1", "transformers": "5.0.0"}, "HybridCache is gone"),
        ({"peft": "0.19.0", "torchao": "0.15.0"}, "refuses any LoRA beside an old torchao"),
        ({"bitsandbytes": "0.45.0", "triton": "3.2.0"}, "triton.ops is gone"),
        ({"wandb": "0.26.0", "protobuf": "6.31.0"}, "newer protobuf"),
    ],
)
def test_a_known_bad_combination_is_named_with_its_source(
    installed: dict[str, str], text: str
) -> None:
    faults = [fault for fault in known_faults(installed) if "https://" in fault.fact]
    (fault,) = faults
    assert text in fault.fact
    assert all(f"{name} {version}" in fault.fact for name, version in installed.items())
    assert fault.remedy.startswith("pip ")


@pytest.mark.parametrize(
    "installed",
    [{}, GOOD, {"torchao": None, "peft": "0.19.0"}, {"torch": "a fork", "numpy": "2.3.0"}],
)
def test_other_versions_are_no_fault(installed: dict[str, str | None]) -> None:
    assert list(known_faults(installed)) == []


def test_what_halfbytes_own_requirements_refuse_is_named() -> None:
    (fault,) = known_faults({"trl": "1.2.0"})
    assert fault.fact == "trl 1.2.0; halfbyte needs trl<2,>=1.15"
    assert fault.remedy == 'pip install "trl<2,>=1.15"'


def test_each_combination_has_a_source_and_is_looked_up() -> None:
    assert len(KNOWN_BAD) >= 12
    assert all(bad.source.startswith("https://") for bad in KNOWN_BAD)
    assert {name for bad in KNOWN_BAD for name in bad.versions} <= set(libraries())


@pytest.mark.parametrize(("cuda", "driver"), [("12.8", 525), ("13.0", 580), ("14.0", None)])
def test_drivers(cuda: str, driver: int | None) -> None:
    assert oldest_driver(cuda) == driver


@pytest.mark.parametrize(
    ("code", "capability", "runs"),
    [
        ("sm_75", (7, 5), True),
        ("sm_80", (8, 6), True),
        ("sm_86", (8, 0), False),
        ("sm_90", (12, 0), False),
        ("compute_90", (12, 0), True),
        ("sm_120", (12, 0), True),
        ("sm_90a", (9, 0), True),
        ("gfx90a", (9, 0), False),
    ],
)
def test_which_cards_a_build_runs_on(code: str, capability: tuple[int, int], runs: bool) -> None:
    assert checks._runs_on(code, *capability) == runs


def test_a_check_that_fails_is_wrong_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> list[Check]:
        raise OSError(5, "Input/output error")

    def refused(name: str) -> list[Check]:
        raise ModelError("no such model")

    fine = Check("fine", OK, "all is well")
    table = {"broken": broken, "refused": refused, "fine": lambda name: [fine]}
    monkeypatch.setattr(checks, "CHECKS", table)
    first, second, third = run_checks()
    assert (first.state, second.state, third) == (WRONG, WRONG, fine)
    assert "Input/output error" in first.fact
    assert second.fact == "no such model"


def test_every_check_says_what_it_saw_and_no_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secret = "hf_" + "s" * 34
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("WANDB_API_KEY", secret)
    results = list(run_checks())
    assert {check.name for check in results} == set(checks.CHECKS)
    assert secret not in json.dumps([check.as_json() for check in results])
    wrong = [check for check in results if check.state == WRONG]
    assert wrong == []
    home = Check("cache", OK, f"{Path.home()}/x")
    assert home.as_json()["fact"] == "~/x"


def test_a_tiny_model_is_trained_and_learns() -> None:
    check = try_training()
    assert check.state == OK, check.fact
    assert "4 steps of a tiny 4-bit model" in check.fact
