"""The Colab notebook: run from the top with the small model, and its promise about torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from toys import ROOT

NOTEBOOK = ROOT / "notebooks" / "colab_t4.ipynb"
FEW_STEPS = (
    "train.max_steps=3 train.eval_steps=3 train.save_steps=3 train.num_samples=0"
    " eval.rows=4 eval.max_new_tokens=8"
    " merge.rows=4 export.rows=4 export.max_quantised_kl=1"
)


RUNNER = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
try:
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
finally:
    nbformat.write(notebook, sys.argv[2])
"""


def environment_like_ours(folder: Path) -> Path:
    """The python of a new environment that sees our packages, and installs into itself."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    ours = sysconfig.get_path("purelib")
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "ours.pth").write_text(f"{ours}\n")
    return folder / "bin" / "python"


def executed(folder: Path) -> Any:
    """The notebook after a run in ``folder``, with this checkout as the source."""
    import nbformat

    python = environment_like_ours(folder / "environment")
    written = folder / "executed.ipynb"
    done = subprocess.run(
        [python, "-c", RUNNER, str(NOTEBOOK), str(written)],
        cwd=folder,
        env={**os.environ, "HALFBYTE_SOURCE": str(ROOT), "HALFBYTE_OVERRIDES": FEW_STEPS},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return nbformat.read(written, as_version=4)


def outputs(notebook: Any) -> str:
    """All that the cells printed."""
    return "".join(
        output.get("text", "") or output.get("data", {}).get("text/plain", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )


@pytest.mark.real
@pytest.mark.slow
def test_notebook_runs_from_the_top(tmp_path: Path) -> None:
    said = outputs(executed(tmp_path))
    assert "No GPU here" in said
    import torch

    assert f"torch {torch.__version__}, as it was" in said
    assert "configs/quickstart.yaml name=colab" in said
    assert "trained: " in said
    assert "kept the dequantised base" in said
    assert "| gguf-q8_0 |" in said
    assert "in llama.cpp" in said
    runs = tmp_path / "runs" / "colab"
    assert (runs / "adapter" / "adapter_model.safetensors").is_file()
    assert (runs / "eval" / "report.html").is_file()
    assert list((runs / "export" / "gguf-q8_0").glob("*.gguf"))


def test_notebook_is_stored_without_outputs() -> None:
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.get("outputs")]


OTHER_TORCH = "2.12.0"


@pytest.mark.slow
def test_install_cell_keeps_another_supported_torch(tmp_path: Path) -> None:
    import nbformat

    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    # Gigabytes where the package index has CUDA's build alone; PIP_EXTRA_INDEX_URL can name another.
    subprocess.run([python, "-m", "pip", "install", "-q", f"torch=={OTHER_TORCH}"], check=True)
    cells = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells]
    script = tmp_path / "cell.py"
    install = next(source for source in cells if "pip = [" in source)
    script.write_text("import subprocess\n" + install)
    done = subprocess.run(
        [python, str(script)],
        cwd=tmp_path,
        env={**os.environ, "HALFBYTE_SOURCE": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(rf"torch {re.escape(OTHER_TORCH)}\S*, as it was", done.stdout)
