"""Print the JSON Schema of a config, with which editors complete and check it.

halfbyte schema > config.schema.json
The first line of a config names it: # yaml-language-server: $schema=config.schema.json
"""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command line may say: nothing."""


def main(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Print the schema."""
    from halfbyte.config.reference import json_schema

    print(json.dumps(json_schema(), indent=1))
