"""How the libraries behave under our scripts."""

from __future__ import annotations

import os
import subprocess
import sys

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


PRODUCTS = """
from halfbyte.libraries import keep_few_kernels
keep_few_kernels()
import psutil, torch
layer = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
layer(torch.ones(8, 64, dtype=torch.bfloat16))
before = psutil.Process().memory_info().rss
for length in range(100, 1100):
    layer(torch.ones(length, 64, dtype=torch.bfloat16))
print(psutil.Process().memory_info().rss - before)
"""


def test_products_of_many_lengths_do_not_fill_the_memory() -> None:
    """With oneDNN's default of 1,024 kernels these take 700 MB on a processor with AMX."""
    names = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", PRODUCTS], env=environment, capture_output=True, text=True
    )
    assert int(done.stdout) < 350e6, done.stderr
