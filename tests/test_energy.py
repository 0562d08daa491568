"""Power: from the kernel's counters where they can be read, from the config, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from halfbyte.eval import energy
from halfbyte.eval.energy import Meter

CPU = torch.device("cpu")


@pytest.fixture
def rapl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages, and a zone that holds both."""
    for zone, name in (
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:1", "package-1"),
        ("intel-rapl:2", "psys"),
    ):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(name + "\n")
        (tmp_path / zone / "energy_uj").write_text("1000000\n")
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    now = iter([10.0, 14.0, 18.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    return tmp_path


def test_power_is_the_packages_joules_by_the_time(rapl: Path) -> None:
    meter = Meter(CPU, 99.0)
    (rapl / "intel-rapl:0" / "energy_uj").write_text("31000000\n")
    (rapl / "intel-rapl:1" / "energy_uj").write_text("11000000\n")
    (rapl / "intel-rapl:2" / "energy_uj").write_text("900000000\n")
    assert meter.watts() == pytest.approx((30 + 10) / 4)


def test_a_counter_that_wrapped_around_counts_nothing(rapl: Path) -> None:
    meter = Meter(CPU, 99.0)
    (rapl / "intel-rapl:0" / "energy_uj").write_text("31000000\n")
    (rapl / "intel-rapl:1" / "energy_uj").write_text("5\n")
    assert meter.watts() == 99.0


def test_without_counters_the_config_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "RAPL", tmp_path / "none")
    assert Meter(CPU, 25.0).watts() == 25.0
    assert Meter(CPU, None).watts() is None
