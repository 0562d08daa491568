"""Devices: the table is plausible, names are forgiving but never guessed, this machine is read."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from halfbyte.errors import PlanError
from halfbyte.host import GIB_BYTES as GIB
from halfbyte.host import attempt, cgroup_limit, memory_limit, ram_bytes
from halfbyte.plan.devices import (
    CARDS,
    CONTEXT_MIB,
    DEVICES,
    MIB_BYTES,
    PROCESS_BYTES,
    Card,
    Device,
    context_bytes,
    find_device,
    this_machine,
    workspace_bytes,
)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_table_row_is_plausible(card: Card) -> None:
    device = DEVICES[card.name]
    assert 0.9 * card.sold_gib <= card.total_gib <= card.sold_gib
    assert device.total_bytes == pytest.approx(card.total_gib * GIB, abs=1)
    assert 0 < device.usable_bytes == device.total_bytes - device.context_bytes
    assert device.kind == "cuda"
    assert device.in_use_bytes == 0
    assert 0 < device.workspace_bytes < device.context_bytes
    assert device.has_bf16 == device.has_flash == (card.capability[0] >= 8)
    assert card.source


def test_table_names_each_card_once() -> None:
    assert len(DEVICES) == len(CARDS) >= 27
    assert len({card.title for card in CARDS}) == len(CARDS)
    assert all(find_device(card.name) is DEVICES[card.name] for card in CARDS)
    assert all(find_device(card.title) is DEVICES[card.name] for card in CARDS)


def test_context_and_workspaces_follow_the_generation() -> None:
    assert context_bytes((8, 6)) == CONTEXT_MIB[8, 6] * MIB_BYTES
    assert context_bytes((8, 7)) == context_bytes((8, 6))
    assert context_bytes((10, 0)) == context_bytes((9, 0))
    assert context_bytes((5, 2)) == context_bytes((6, 0))
    assert workspace_bytes((7, 5)) == workspace_bytes((8, 9)) == 2 * (8 << 20 | 128 << 10)
    assert workspace_bytes((9, 0)) == workspace_bytes((12, 0)) == 64 * MIB_BYTES
    assert workspace_bytes((9, 4)) == 256 * MIB_BYTES


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("T4", "t4"),
        ("tesla t4", "t4"),
        ("RTX 4090", "rtx4090"),
        ("4090", "rtx4090"),
        ("NVIDIA GeForce RTX_4090", "rtx4090"),
        ("rtx-3060-12gb", "rtx3060"),
        ("3060 Ti", "rtx3060ti"),
        ("v100-16gb", "v100"),
        ("A100 80GB", "a100-80gb"),
        ("h100-80gb", "h100"),
        ("rtx a6000", "a6000"),
        ("gtx 1080 ti", "gtx1080ti"),
    ],
)
def test_name_is_found_however_it_is_written(name: str, key: str) -> None:
    assert find_device(name) is DEVICES[key]


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("a100", "a100-40gb or a100-80gb"),
        ("RTX 4060 Ti", "rtx4060ti-8gb or rtx4060ti-16gb"),
        ("rtx3050", "rtx3050-6gb or rtx3050-8gb"),
    ],
)
def test_ambiguous_name_is_refused_with_its_choices(name: str, choices: str) -> None:
    with pytest.raises(PlanError, match=choices) as error:
        find_device(name)
    assert name in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("rtx4091", "the nearest is rtx4090"),
        ("a100-60gb", "the nearest is a100-"),
        ("rtx4090-48gb", "the nearest is rtx4090"),
        ("toaster", ""),
        ("", ""),
        ("16", ""),
        ("0gb", ""),
        ("cpu-0", ""),
        ("cpu-lots", ""),
    ],
)
def test_unknown_name_is_refused_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(PlanError) as error:
        find_device(name)
    message = str(error.value)
    assert repr(name) in message
    assert hint in message
    assert ("the nearest is" in message) == bool(hint)
    assert all(key in message for key in (*DEVICES, "auto", "cpu-16gb", "24gb"))


@pytest.mark.parametrize("name", ["cpu-16", "CPU 16 GB", "ram-16gb", "ram_16GiB", "cpu16g"])
def test_ram_of_a_size_is_a_device(name: str) -> None:
    device = find_device(name)
    assert (device.name, device.kind) == ("cpu-16gb", "cpu")
    assert device.total_bytes == 16 * GIB
    assert device.usable_bytes == 16 * GIB - PROCESS_BYTES
    assert device.workspace_bytes == 0
    assert device.capability is None
    assert not device.has_bf16
    assert not device.has_flash


def test_card_of_a_size_is_a_device() -> None:
    device = find_device("24GB")
    assert (device.name, device.kind, device.capability) == ("24gb", "cuda", (8, 0))
    assert device.total_bytes == 24 * GIB
    assert device.context_bytes == context_bytes((8, 0))
    assert "assumed" in device.facts[0]
    assert find_device("7.5 GiB").total_bytes == 7.5 * GIB


def test_cpu_is_this_machine_s_ram() -> None:
    device = find_device("cpu")
    limit = memory_limit()
    total = psutil.virtual_memory().total
    assert device.total_bytes == (min(total, limit[0]) if limit else total)
    assert (device.name, device.kind) == ("cpu", "cpu")
    assert device.context_bytes == PROCESS_BYTES
    assert 0 <= device.in_use_bytes < device.total_bytes
    assert device.title


def test_own_tensors_are_not_in_use_by_others() -> None:
    before = find_device("cpu").in_use_bytes
    kept = torch.ones(512 << 20, dtype=torch.uint8)
    assert find_device("cpu").in_use_bytes < before + kept.nbytes / 2


def test_facts_tell_of_cores_ram_and_disk() -> None:
    facts = find_device("cpu").facts
    for word in ("vector units: ", "cores: ", "RAM: ", "disk: "):
        assert [line for line in facts if line.startswith(word)], word
    assert all(line == line.strip() and "\n" not in line for line in facts)


def test_this_machine_is_what_auto_finds() -> None:
    assert find_device(" Auto ").name == this_machine().name


def test_this_machine_is_the_cpu_when_accelerate_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert this_machine().kind == "cpu"


def test_usable_is_below_zero_when_others_hold_the_memory() -> None:
    full = Device("cpu", "full", "cpu", 4 * GIB, PROCESS_BYTES, 0, None, in_use_bytes=4 * GIB)
    assert full.usable_bytes == -PROCESS_BYTES


def write_group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_cgroup_version_2_is_read_without_the_file_cache(tmp_path: Path) -> None:
    write_group(
        tmp_path,
        memory__max=str(8 * GIB),
        memory__current=str(3 * GIB),
        memory__stat=f"anon 5\ninactive_file {GIB}\nactive_file 7",
    )
    assert cgroup_limit(tmp_path, "0::/") == (8 * GIB, 2 * GIB)
    assert cgroup_limit(tmp_path, "") == (8 * GIB, 2 * GIB)
    assert cgroup_limit(tmp_path, "0::/not/seen/from/inside") == (8 * GIB, 2 * GIB)


def test_cgroup_version_1_is_read_without_the_file_cache(tmp_path: Path) -> None:
    write_group(
        tmp_path / "memory" / "job",
        memory__limit_in_bytes=str(8 * GIB),
        memory__usage_in_bytes=str(3 * GIB),
        memory__stat=f"inactive_file 1\ntotal_inactive_file {GIB}",
    )
    write_group(tmp_path / "memory", memory__limit_in_bytes=str(2**63 - 4096))
    assert cgroup_limit(tmp_path, "5:cpu:/x\n4:memory:/job\n0::/") == (8 * GIB, 2 * GIB)


def test_cgroup_takes_the_narrowest_limit_above_a_process(tmp_path: Path) -> None:
    write_group(tmp_path / "a" / "b", memory__max="max", memory__current="1")
    write_group(tmp_path / "a", memory__max=str(4 * GIB), memory__current=str(GIB))
    write_group(tmp_path, memory__max=str(8 * GIB), memory__current=str(3 * GIB))
    assert cgroup_limit(tmp_path, "0::/a/b") == (4 * GIB, GIB)


def test_cgroup_is_none_where_nothing_limits(tmp_path: Path) -> None:
    assert cgroup_limit(tmp_path / "absent", "") is None
    write_group(tmp_path, memory__max="max", memory__current="1")
    assert cgroup_limit(tmp_path, "0::/") is None


def test_ram_available_is_within_ram() -> None:
    total, available = ram_bytes()
    assert 0 <= available <= total <= psutil.virtual_memory().total


def test_fact_that_cannot_be_read_is_none() -> None:
    def fails() -> str:
        raise NotImplementedError

    assert attempt(fails) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_this_machine_is_its_cuda_device() -> None:
    device = this_machine()
    properties = torch.cuda.get_device_properties(0)
    assert device.kind == "cuda"
    assert device.total_bytes == properties.total_memory
    assert device.capability == (properties.major, properties.minor)
    assert device.title == properties.name
    held = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    assert this_machine().in_use_bytes < device.in_use_bytes + held.nbytes / 2
    assert any(line.startswith("driver: ") for line in device.facts)
    assert any("compute capability" in line for line in device.facts)
