"""Programs that a model may write: each is held, scored as a failure, and leaves nothing behind."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import psutil
import pytest

from halfbyte.errors import UserError
from halfbyte.eval import sandbox
from halfbyte.eval.sandbox import Outcome, run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Landlock and seccomp are Linux's")
RIGHT = """
import collections, functools, hashlib, heapq, itertools, json, math, random, re, string, typing
def solve(n):
    return sum(range(n))
def check(candidate):
    assert candidate(5) == 10
check(solve)
assert hashlib.md5(b"x").hexdigest() and re.findall("a", "banana") and math.isqrt(17) == 4
"""


def ends(source: str, seconds: float = 2) -> Outcome:
    return run_program(source, timeout_s=seconds)


def test_a_right_program_passes_with_the_standard_library() -> None:
    assert ends(RIGHT) == Outcome("passed")
    assert ends("print('é' * 10); x = 'ü'\nassert len(x) == 1").end == "passed"


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("def (", "SyntaxError"),
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("import os\nos._exit(0)", ""),
        ("def f(): return f()\nf()", "RecursionError"),
        ("import ctypes\nctypes.string_at(0)", ""),
        ("import halfbyte", "ModuleNotFoundError"),
    ],
    ids=["wrong", "no Python", "exit", "hard exit", "endless depth", "crash", "packages"],
)
def test_a_program_that_does_not_reach_its_end_fails(source: str, error: str) -> None:
    outcome = ends(source)
    assert outcome.end == "failed"
    assert error in outcome.error


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time\ntime.sleep(100)",
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "import signal\nsignal.alarm(0)\nwhile True:\n    try:\n        while True: pass\n"
        "    except BaseException: pass",
    ],
    ids=["loop", "sleep", "deaf", "stubborn"],
)
def test_a_program_without_end_is_ended(source: str) -> None:
    assert ends(source, 1).end == "timeout"


def test_memory_is_bounded() -> None:
    outcome = ends("block = bytearray(4 << 30)")
    assert outcome.end == "failed"
    assert "MemoryError" in outcome.error
    assert run_program("block = bytearray(200 << 20)", memory_bytes=1 << 30).end == "passed"


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.fork()",
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.run(['true'], check=True)",
        "import os\nassert os.system('true') == 0",
        "import os\nos.execv('/bin/true', ['true'])",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
        "import threading\nthreading.Thread(target=print).start()",
    ],
    ids=["fork", "bomb", "subprocess", "system", "exec", "multiprocessing", "thread"],
)
def test_no_other_process_is_started(source: str) -> None:
    before = set(psutil.Process().children(recursive=True))
    assert ends(source).end == "failed"
    assert set(psutil.Process().children(recursive=True)) <= before


def test_nothing_is_called_or_listened_to() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        for source in (
            f"import socket\nsocket.create_connection(('127.0.0.1', {port}))",
            f"import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}')",
            "import socket\nsocket.socket(socket.AF_UNIX)",
            "import socket\nsocket.socketpair()",
        ):
            outcome = ends(source)
            assert outcome.end == "failed"
            assert "not permitted" in outcome.error
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_file_is_read_written_or_changed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("kept")
    before = secret.stat()
    for source in (
        f"open({str(secret)!r}).read()",
        f"open({str(secret)!r}, 'a').write('more')",
        f"open({str(tmp_path / 'new')!r}, 'w').write('x')",
        "open('here', 'w').write('x')",
        f"import os\nos.unlink({str(secret)!r})",
        f"import os\nos.truncate({str(secret)!r}, 0)",
        f"import os\nos.rename({str(secret)!r}, {str(tmp_path / 'gone')!r})",
        f"import os\nos.chmod({str(secret)!r}, 0o777)",
        f"import os\nos.utime({str(secret)!r}, (0, 0))",
        f"import os\nos.symlink('/', {str(tmp_path / 'link')!r})",
        f"import os\nos.listdir({str(tmp_path)!r})",
        "open('/etc/passwd').read()",
        f"open({__file__!r}).read()",
    ):
        outcome = ends(source)
        assert outcome.end == "failed", source
        assert "PermissionError" in outcome.error, source
    after = secret.stat()
    assert secret.read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert (before.st_mode, before.st_mtime_ns) == (after.st_mode, after.st_mtime_ns)


def test_the_environment_and_other_processes_are_out_of_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("A_SECRET", "kept")
    assert ends("import os\nassert not set(os.environ) - {'LC_CTYPE'}, os.environ").end == "passed"
    for source in (
        "import os\nassert 'A_SECRET' in os.environ",
        "import os\nopen(f'/proc/{os.getppid()}/environ').read()",
        "open('/proc/self/environ').read()",
        "import os, signal\nos.kill(os.getppid(), signal.SIGTERM)",
        "import os, signal\nos.killpg(0, signal.SIGKILL)",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    ):
        assert ends(source).end == "failed", source


def test_the_verdict_cannot_be_written_by_the_program() -> None:
    flood = (
        "import os\nwhile True:\n    for n in range(3, 64):\n        try: os.write(n, b'passed' * 1000)\n"
        "        except OSError: pass"
    )
    outcome = ends(flood, 1)
    assert outcome.end != "passed"
    assert len(outcome.error) <= 2000


def test_a_system_that_cannot_hold_programs_runs_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker = tmp_path / "worker.py"
    text = sandbox.WORKER.read_text().replace("if version < 1:", "if True:")
    worker.write_text(text)
    monkeypatch.setattr(sandbox, "WORKER", worker)
    with pytest.raises(UserError, match=r"the kernel has no Landlock.*leave the benchmark out"):
        ends(RIGHT)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="only on Linux"):
        ends(RIGHT)
