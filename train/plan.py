"""Say what a model takes to load, to train and to run, before anything is downloaded.

python train/plan.py TARGET [section.key=value …] [--device NAME|auto] [--json]
TARGET: a config, a Hub id, or a folder that holds a config.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

from halfbyte.config import load_run, model_run
from halfbyte.errors import UntraceableError, exit_on_user_error


def main() -> None:
    """Config or model → bytes by name → verdict and settings that fit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", help="a .yaml config, a model's Hub id, folder or pypi: name")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--device", default="auto", help="t4, rtx4090, cpu-16, auto …")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--suggest", action="store_true", help="print only overrides that fit")
    parser.add_argument("--plot", type=Path, metavar="NAME", help="write NAME.png and NAME.html")
    parser.add_argument("--probe", action="store_true", help="load the model and measure a step")
    arguments = parser.parse_intermixed_args()
    is_config = arguments.target.endswith((".yaml", ".yml"))
    if arguments.probe and not is_config:
        parser.error("--probe needs a config, which names the rows to measure with")
    if arguments.probe and arguments.device != "auto":
        parser.error("--probe measures on this machine; leave --device out")
    if is_config:
        run = load_run(Path(arguments.target), arguments.overrides)
    else:
        run = model_run(arguments.target, arguments.overrides)

    from halfbyte.libraries import quiet_libraries

    quiet_libraries()
    from halfbyte.plan.catalogue import model_config
    from halfbyte.plan.devices import find_device
    from halfbyte.plan.report import as_json, as_text, load_text, make_plan
    from halfbyte.plan.shape import Lengths

    device = find_device(arguments.device)
    config, origin = model_config(run.model.name, run.model.revision)
    lengths = Lengths.up_to(run.data.max_length, run.train.batch_size, config)
    try:
        plan = make_plan(run, config, origin, device, lengths)
    except UntraceableError:
        print(load_text(config))  # what is known; the error says what is not
        raise
    report = as_json(plan)
    measured = None
    if arguments.probe:
        # transformers prints a line as it is imported with WANDB_MODE=offline.
        with contextlib.redirect_stdout(sys.stderr):
            from halfbyte.train.probe import probe_run

        measured = probe_run(run, device)
        report["probe"] = measured.as_json()
    if arguments.json:
        print(json.dumps(report))
    elif arguments.suggest:
        print("\n".join(plan.overrides()))
    else:
        print(as_text(report) + (f"\n\n{measured.as_text()}" if measured else ""))
    if arguments.plot:
        from halfbyte.plan.plots import write_plots

        for path in write_plots(plan, report, arguments.plot):
            print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    exit_on_user_error(main, exit_code=2)
