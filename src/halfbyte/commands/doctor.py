"""Say what is wrong with this machine, and what mends it.

halfbyte doctor                     (machine, versions, logins, disk, and a few real steps of a tiny model)
halfbyte doctor --json              (for a bug report; it holds no secrets)
halfbyte doctor --get llama.cpp     (fetch what --to gguf needs: its source and checksum are shown)
"""

from __future__ import annotations

import argparse
import json

TOOLS = ("llama.cpp", "awq")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command line may say."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="leave out the steps of a tiny model")
    parser.add_argument(
        "--get", nargs="+", choices=TOOLS, metavar="TOOL", help=f"fetch: {', '.join(TOOLS)}"
    )


def main(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Run the checks; the exit code is 1 if one found something wrong."""
    if arguments.get and (arguments.json or arguments.quick):
        parser.error("--get fetches tools, and checks nothing")

    from halfbyte.libraries import quiet_libraries

    quiet_libraries()
    if arguments.get:
        _get(arguments.get)
        return
    from halfbyte import __version__
    from halfbyte.doctor.checks import WRONG, run_checks, versions
    from halfbyte.doctor.trial import try_training

    results = []
    for check in run_checks():
        results.append(check)
        if not arguments.json:
            print(check.as_text(), flush=True)
    if not arguments.quick:
        results.append(try_training())
        if not arguments.json:
            print(results[-1].as_text())
    if arguments.json:
        checks = [check.as_json() for check in results]
        report = {"halfbyte": __version__, "versions": versions(), "checks": checks}
        print(json.dumps(report, indent=1))
    if any(check.state == WRONG for check in results):
        raise SystemExit(1)


def _get(tools: list[str]) -> None:
    from halfbyte.llamacpp.tools import get_llama_cpp
    from halfbyte.ship.awq import get_awq

    fetch = {"llama.cpp": get_llama_cpp, "awq": get_awq}
    for tool in tools:
        fetch[tool](print)
