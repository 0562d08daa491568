"""Try faults of every kind on real runs of a small model, and report what became of them.

python -m chaos [--scale 0.1] [--only kills] [--out FILE]      (from tests/; `make chaos` does it)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from toys import save_tiny_llama

from chaos import farm
from chaos.outcome import Case, Outcome
from chaos.scene import OFFLINE, Scene

CAMPAIGNS = ("kills", "flips", "stops", "cuts", "disks", "numerics", "hostile", "fuzz", "trackers")
ALONE = ("trackers",)  # campaigns that measure time
WORKERS = 2


def main() -> None:
    """Prepare, fork workers that try the cases, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=float, default=1.0, help="0.1 tries a tenth")
    parser.add_argument("--only", nargs="+", choices=CAMPAIGNS, default=CAMPAIGNS)
    parser.add_argument("--out", type=Path, help="also write the report here")
    arguments = parser.parse_args()
    library = _preloaded()
    root = Path(tempfile.mkdtemp(prefix="chaos-"))
    os.environ.update(OFFLINE, HALFBYTE_CACHE=str(root / "cache"))
    begun = time.monotonic()
    try:
        farm.load_libraries()
        scene = Scene(root)
        save_tiny_llama(scene.base)
        farm.warm_up(scene.config(scene.folder("warm-up")))
        outcomes: list[Outcome] = []
        for name in arguments.only:
            cases = list(import_module(f"chaos.{name}").cases(scene, arguments.scale))
            outcomes += _try(cases, root, 1 if name in ALONE else WORKERS)
            print(f"{name}: {len(cases)} tried", file=sys.stderr, flush=True)
            # W&B's process may still write there.
            shutil.rmtree(root / "cases", ignore_errors=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(library.parent)
    report = as_markdown(outcomes, time.monotonic() - begun)
    print(report)
    if arguments.out:
        arguments.out.write_text(report, encoding="utf-8")
    raise SystemExit(any(outcome.why for outcome in outcomes))


def _preloaded() -> Path:
    """Return the library that puts faults into calls; start again with it if it is not loaded yet."""
    if library := os.environ.pop("CHAOS_LIBRARY", ""):
        del os.environ["LD_PRELOAD"]  # of this process alone
        return Path(library)
    path = Path(tempfile.mkdtemp(prefix="chaos-library-")) / "fault.so"
    source = Path(__file__).with_name("fault.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", path, source, "-ldl"], check=True)
    environ = {**os.environ, "LD_PRELOAD": str(path), "CHAOS_LIBRARY": str(path)}
    os.execve(sys.executable, [sys.executable, "-m", "chaos", *sys.argv[1:]], environ)


def _try(cases: Sequence[Case], root: Path, workers: int) -> list[Outcome]:
    """Try cases in forked workers, and return what became of them."""
    files = [root / f"outcomes-{number}" for number in range(workers)]
    children = []
    for number, file in enumerate(files):
        child = os.fork()
        if not child:
            with file.open("w", encoding="utf-8") as stream:
                for case in cases[number::workers]:
                    outcome = _one(case)
                    print(json.dumps(vars(outcome)), file=stream, flush=True)
                    if outcome.why:
                        print(f"lost: {case.kind}: {case.name}: {outcome.why}", file=sys.stderr)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    outcomes = [Outcome(**json.loads(line)) for line in lines]
    assert len(outcomes) == len(cases), "a worker died"
    return outcomes


def _one(case: Case) -> Outcome:
    begun = time.monotonic()
    try:
        why = case.attempt()
    except Exception as error:
        traceback.print_exc()
        why = f"the campaign itself failed: {error!r}"
    return Outcome(case.kind, case.name, why, round(time.monotonic() - begun, 1))


def as_markdown(outcomes: Sequence[Outcome], seconds: float) -> str:
    """Return the table of faults by kind, and a line for each that was lost."""
    lines = ["| faults | tried | survived | lost |", "| --- | --- | --- | --- |"]
    for kind in dict.fromkeys(outcome.kind for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.kind == kind]
        lost = sum(bool(outcome.why) for outcome in own)
        lines.append(f"| {kind} | {len(own)} | {len(own) - lost} | {lost} |")
    lost = sum(bool(outcome.why) for outcome in outcomes)
    lines += [f"| all | {len(outcomes)} | {len(outcomes) - lost} | {lost} |", ""]
    lines += [f"- {o.kind}, {o.name}: {o.why}" for o in outcomes if o.why]
    lines.append(f"{len(outcomes)} faults in {seconds / 60:.0f} minutes.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
