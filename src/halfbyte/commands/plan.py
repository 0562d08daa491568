"""Plan the memory that a model needs to load, train and run, before anything is downloaded.

halfbyte plan TARGET [section.key=value …] [--device NAME|auto] [--json]
TARGET: a config, a Hub id, a folder with a config.json, or a .gguf file. For a .gguf file the plan also
says how many layers fit in VRAM in llama.cpp.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.config import load_run, model_run
from halfbyte.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from halfbyte.config.schema import Run
    from halfbyte.plan.devices import Device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command line may say."""
    parser.add_argument(
        "target", help="a .yaml config, a .gguf file, or a model's Hub id, folder or pypi: name"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--device", default="auto", help="t4, rtx4090, cpu-16, auto …")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--suggest", action="store_true", help="print only the overrides that fit")
    parser.add_argument("--plot", type=Path, metavar="NAME", help="write NAME.png and NAME.html")
    parser.add_argument("--probe", action="store_true", help="also load and measure a real step")
    parser.add_argument("--gpu-layers", type=int, help="of a .gguf file in VRAM; -1: all")


def main(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Plan a config or a model: bytes by term, a verdict, and settings that fit."""
    is_config = arguments.target.endswith((".yaml", ".yml"))
    if arguments.gpu_layers is not None and not arguments.target.endswith(".gguf"):
        parser.error("--gpu-layers needs a .gguf file")
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
    from halfbyte.model.load import stored_method
    from halfbyte.model.merged import check_keeps_training
    from halfbyte.plan import gguf_placement
    from halfbyte.plan.catalogue import model_config
    from halfbyte.plan.devices import find_device
    from halfbyte.plan.report import quantised_json
    from halfbyte.plan.report_text import quantised_text

    device = find_device(arguments.device)
    placement = None
    if run.model.name.endswith(".gguf"):
        placement = gguf_placement.plan(Path(run.model.name), device, arguments.gpu_layers)
        if not arguments.json and not arguments.suggest:
            print(gguf_placement.as_text(placement) + "\n")
    config, origin = model_config(run.model.name, run.model.revision)
    method = stored_method(config)
    check_keeps_training(Path(run.model.name), run.model.precision)
    if method in (None, "bitsandbytes"):
        _plan_training(arguments, run, device, config, origin, placement)
    elif is_config or arguments.suggest:
        raise ModelError(
            f"{run.model.name} is already quantised ({method}), so it cannot be trained; name the"
            " unquantised checkpoint"
        )
    else:
        report = quantised_json(run, config, origin, device, method)
        print(json.dumps(report) if arguments.json else quantised_text(report))


def _plan_training(
    arguments: argparse.Namespace,
    run: Run,
    device: Device,
    config: PretrainedConfig,
    origin: str,
    placement: dict[str, Any] | None,
) -> None:
    """Print what loading, training and running take; ``placement`` is the plan for llama.cpp."""
    from halfbyte.plan.report import as_json, make_plan
    from halfbyte.plan.report_text import as_text, load_text
    from halfbyte.plan.shape import Lengths

    lengths = Lengths.up_to(run.data.max_length, run.train.batch_size, config)
    try:
        plan = make_plan(run, config, origin, device, lengths)
    except ModelError:
        if not arguments.json and not arguments.suggest:
            print(load_text(config))  # the part that is known; the error names the other
        raise
    report = as_json(plan, longest=arguments.json or not arguments.suggest)
    if placement is not None:
        report["llama_cpp"] = placement
    measured = None
    if arguments.probe:
        with contextlib.redirect_stdout(sys.stderr):  # transformers prints at import
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
