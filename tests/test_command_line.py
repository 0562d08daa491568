"""The command line: names, help without heavy libraries, exit codes, and the scripts as the same commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.commands.table import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "train/sft.py": "train",
    "train/merge.py": "merge",
    "train/export.py": "export",
    "train/curve.py": "curve",
    "eval/compare.py": "compare",
    "eval/ladder.py": "ladder",
    "eval/serve.py": "serve",
    "eval/generate.py": "chat",
}
HELP = """
import io, sys, contextlib
from halfbyte import command_line
out = io.StringIO()
sys.argv = ["halfbyte", *sys.argv[1:], "--help"]
with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
    command_line.main()
heavy = {"torch", "transformers", "peft", "trl", "datasets", "accelerate", "matplotlib", "scipy"}
print(sorted(heavy & set(sys.modules)), "usage:" in out.getvalue())
"""


def halfbyte(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "halfbyte", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_help_lists_every_command_and_no_command_is_an_error_with_the_list() -> None:
    shown = halfbyte("--help")
    assert shown.returncode == 0
    assert all(f"  {name} " in shown.stdout for name in COMMANDS)
    bare = halfbyte()
    assert bare.returncode == 2
    assert bare.stdout == shown.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_imports_nothing_heavy(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP, name], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[] True"


def test_a_command_that_is_none_is_an_error_with_the_one_that_is_near() -> None:
    done = halfbyte("trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert "has no command 'trian'; did you mean train?" in done.stderr
    assert "allowed: init, plan" in halfbyte("xyz").stderr


def test_a_fault_of_the_user_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    done = halfbyte("train", str(tmp_path / "none.yaml"))
    assert done.returncode != 0
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_its_command(script: str) -> None:
    text = (ROOT / script).read_text(encoding="utf-8")
    assert f'run_script("{SCRIPTS[script]}")' in text


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_shell_completes_commands_and_options(shell: str) -> None:
    done = halfbyte("completion", shell)
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("compare", "--require", "doctor", "--quick"))


def test_schema_is_json_with_the_keys_of_a_config() -> None:
    schema = json.loads(halfbyte("schema").stdout)
    assert {"model", "data", "train", "eval"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False


def test_version_is_that_of_the_package() -> None:
    from importlib import metadata

    assert halfbyte("--version").stdout.strip() == f"halfbyte {metadata.version('halfbyte')}"
