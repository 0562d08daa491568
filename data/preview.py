"""Show the data of a config as it is trained on: coloured tokens, lengths, duplicates, the ledger.

python data/preview.py configs/quickstart.yaml [section.key=value …] [--rows 3]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from halfbyte.config import load_run
from halfbyte.errors import exit_on_user_error


def main() -> None:
    """Print a config's rendered rows, labels and ledger; no model is loaded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--rows", type=int, default=3, help="rows to show in full")
    parser.add_argument("--colour", choices=("auto", "always", "never"), default="auto")
    arguments = parser.parse_intermixed_args()
    run = load_run(arguments.config, arguments.overrides)

    from halfbyte.libraries import quiet_libraries

    quiet_libraries()
    from halfbyte.data.prepare import prepare
    from halfbyte.data.preview import show_preview
    from halfbyte.data.render import renderer_of
    from halfbyte.model.load import load_tokenizer
    from halfbyte.model.resolve import resolve_base

    base = resolve_base(run.model.name, run.model.revision)
    renderer = renderer_of(run.data, load_tokenizer(base))
    # Show every row at its full length; the histogram says what max_length would cut.
    unlimited = run.data.model_copy(update={"max_length": sys.maxsize})
    prepared = prepare(unlimited, renderer)
    colour = arguments.colour == "always" or (arguments.colour == "auto" and sys.stdout.isatty())
    print(show_preview(prepared, renderer, run.data, arguments.rows, colour=colour))


if __name__ == "__main__":
    exit_on_user_error(main)
