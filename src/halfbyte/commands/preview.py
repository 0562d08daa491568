"""Show the data of a config as it is trained on: coloured tokens, lengths, duplicates, the ledger.

halfbyte preview configs/quickstart.yaml [section.key=value …] [--rows 3] [--html rows.html] [--check]
                       [--opponents]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from halfbyte.config import load_run
from halfbyte.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command line may say."""
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--rows", type=int, default=3, help="rows to show in full")
    parser.add_argument("--colour", choices=("auto", "always", "never"), default="auto")
    parser.add_argument("--html", type=Path, help="write a page with the rows to this file")
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit with 1 if rows are malformed, dropped or too long",
    )
    parser.add_argument(
        "--opponents",
        action="store_true",
        help="also say what a comparison will hold the tuned model against, and what that costs",
    )


def main(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Print a config's rendered rows, labels and ledger; no model is loaded."""
    run = load_run(arguments.config, arguments.overrides)

    from halfbyte.libraries import quiet_libraries

    quiet_libraries()
    from halfbyte.data.prepare import prepare
    from halfbyte.data.preview import faults_of, show_preview
    from halfbyte.data.preview_page import preview_page
    from halfbyte.data.render import renderer_of
    from halfbyte.model.resolve import resolve_base
    from halfbyte.model.tokenizer import load_tokenizer
    from halfbyte.run_dir import write_text

    base = resolve_base(run.model.name, run.model.revision, run.data.new_tokens, weights=False)
    renderer = renderer_of(run.data, load_tokenizer(base))
    # Show every row at its full length; the histogram says what max_length would cut.
    unlimited = run.data.model_copy(update={"max_length": sys.maxsize})
    prepared = prepare(unlimited, renderer, run.seed)
    colour = arguments.colour == "always" or (arguments.colour == "auto" and sys.stdout.isatty())
    print(show_preview(prepared, renderer, run.data, arguments.rows, colour=colour))
    if arguments.opponents:
        from halfbyte.eval.base_opponents import context_of
        from halfbyte.eval.expected_opponents import expected_opponents

        print("\nOPPONENTS\n" + expected_opponents(prepared, renderer, run, context_of(base)))
    if arguments.html:
        write_text(arguments.html, preview_page(prepared, renderer, run.data, arguments.rows))
    if arguments.check and (faults := faults_of(prepared, run.data)):
        raise DataError("\n".join(["check: failed", *faults]))
