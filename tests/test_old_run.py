"""A run folder of the version before records had one (commit ac573e8): every later step still reads it.

``old_run/`` holds the records that version wrote for the tests' random Llama, without weights. Weights are
made anew here, and the records get their digests and the base's place, nothing else.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from toys import run_script

from halfbyte.data.ledger import Ledger
from halfbyte.model.identity import AdapterBase
from halfbyte.model.merged import MergeReport
from halfbyte.record import Record
from halfbyte.run_dir import RunDir, read_json, write_json
from halfbyte.trained.artefact import ExportReport, read_artefact
from halfbyte.trained.manifest import Manifest
from halfbyte.trained.run import read_trained_run

OLD = Path(__file__).parent / "old_run"
RECORDS: dict[str, type[Record]] = {
    "manifest.json": Manifest,
    "ledger.json": Ledger,
    "adapter/base.json": AdapterBase,
    "merged/merge_report.json": MergeReport,
    "export/adapter/export_report.json": ExportReport,
}
# What belongs to the weights and the place of the base, in any record.
OF_THE_WEIGHTS = ("fingerprint", "sha256", "weights_sha256", "chat_template_sha256")


def with_digests(old: Any, new: Any) -> Any:
    """The old record with the new one's digests and names of bases."""
    if not isinstance(old, dict):
        return old
    mixed = {key: with_digests(value, new.get(key, {})) for key, value in old.items()}
    mixed |= {key: new[key] for key in OF_THE_WEIGHTS if key in old and key in new}
    return mixed | {"name": new["name"]} if "fingerprint" in old else mixed


def holds(new: Any, old: Any) -> bool:
    """Whether a record has all values of an old one; it may have further keys."""
    if isinstance(new, dict) and isinstance(old, dict):
        return all(key in new and holds(new[key], value) for key, value in old.items())
    return bool(new == old)


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory, trained_run: Path) -> Path:
    """A trained, merged and exported run whose records are the old version's."""
    run = tmp_path_factory.mktemp("old") / "runs" / "tiny"
    shutil.copytree(trained_run, run)
    run_script("train/merge.py", run)
    run_script("train/export.py", run, "--to", "adapter", "export.rows=4")
    for name in RECORDS:
        old, new = read_json(OLD / name), read_json(run / name)
        assert "version" not in old
        assert new["version"] == RECORDS[name].NEWEST
        write_json(run / name, with_digests(old, new))
    shutil.copytree(OLD / "eval", run / "eval")
    settings = (OLD / "run.yaml").read_text(encoding="utf-8")
    base = read_json(run / "manifest.json")["base"]["name"]
    settings = settings.replace("/old/tiny-llama", base).replace("/old", str(run.parents[1]))
    (run / "run.yaml").write_text(settings, encoding="utf-8")
    return run


@pytest.mark.parametrize("name", RECORDS)
def test_old_record_is_read_whole(name: str) -> None:
    """Each field of the old file has its value, under the name that it has now."""
    content, record = read_json(OLD / name), RECORDS[name].read(OLD / name)
    assert record.version == 0
    written = record.as_json()
    lost = {key for key, value in content.items() if not holds(written.get(key), value)}
    assert lost <= {"asked"}  # the merge.base of the config, which nothing reads


def test_old_run_is_read_with_its_settings(old_run: Path) -> None:
    trained = read_trained_run(old_run)
    assert trained.manifest.version == 0
    assert trained.manifest.steps == 4
    assert trained.run.model.attention == "sdpa"


def test_old_run_is_merged_again(old_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tiny"
    shutil.copytree(old_run, copy)
    run_script("train/merge.py", copy)
    assert MergeReport.read(copy / "merged" / "merge_report.json").version == 2


def test_old_run_is_compared(old_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_script("eval/compare.py", old_run, "eval.rows=2", "eval.variants=[adapter,merged]")
    assert "| merged |" in capsys.readouterr().out


def test_old_run_is_exported_and_its_artefact_known(old_run: Path, tmp_path: Path) -> None:
    assert read_artefact(RunDir(old_run), "adapter").version == 0
    copy = tmp_path / "tiny"
    shutil.copytree(old_run, copy)
    run_script("train/export.py", copy, "--to", "adapter", "export.rows=4")
    assert read_artefact(RunDir(copy), "adapter").version == 2


def test_old_runs_are_compared_with_each_other(
    old_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copies = [tmp_path / name for name in ("a", "b")]
    for copy in copies:
        shutil.copytree(old_run, copy)
        shutil.rmtree(copy / "eval")
        shutil.copytree(OLD / "eval", copy / "eval")
    run_script("eval/compare.py", *copies)
    assert "tiny" in capsys.readouterr().out


def test_old_run_and_its_merge_are_served(
    old_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_script("eval/serve.py", f"old={old_run}", f"old-merged={old_run / 'merged'}", "--check")
    assert "verified: " in capsys.readouterr().out
