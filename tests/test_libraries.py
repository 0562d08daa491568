"""How the libraries behave under our scripts."""

from __future__ import annotations

import os

import pytest

from halfbyte.libraries import parallel_tokenisers, use_all_cores


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        (
            {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"},
            str(len(os.sched_getaffinity(0))),
        ),
        (
            {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no", "LOCAL_WORLD_SIZE": "64"},
            "1",
        ),
        ({"OMP_NUM_THREADS": "3", "ACCELERATE_MIXED_PRECISION": "no"}, "3"),
        ({"OMP_NUM_THREADS": "1"}, "1"),
    ],
)
def test_threads_set_by_accelerate_are_raised_to_the_share_of_cores(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], wanted: str
) -> None:
    """Any other number, and a 1 without accelerate, is a person's own and stays."""
    for name in ("OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    use_all_cores()
    assert os.environ["OMP_NUM_THREADS"] == wanted


@pytest.mark.parametrize("before", ["false", "true", None])
def test_parallel_tokenisers_leave_the_setting_as_they_found_it(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if before is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
    with parallel_tokenisers():
        assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before
