"""No browser: a skipped test on a newcomer's machine, a failure in CI."""

from __future__ import annotations

from pathlib import Path

import pytest
from browsing import find_browser


def test_missing_browser_fails_in_ci_and_skips_elsewhere(tmp_path: Path) -> None:
    nowhere = {"PATH": str(tmp_path)}
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        find_browser(nowhere | {"CI": "true"})
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"):
        find_browser(nowhere)


def test_browser_is_the_one_that_is_named_else_the_one_on_the_path(tmp_path: Path) -> None:
    program = tmp_path / "chromium"
    program.write_text("#!/bin/sh\n", encoding="utf-8")
    program.chmod(0o755)
    assert find_browser({"PATH": str(tmp_path)}) == str(program)
    assert find_browser({"PATH": str(tmp_path), "CHROMIUM": "/opt/x"}) == "/opt/x"
