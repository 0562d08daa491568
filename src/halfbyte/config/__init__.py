"""Owns the config of a run: the strict schema, and the reader of YAML files and overrides."""

from halfbyte.config.read import load_run, model_run, read_run_folder, run_as_yaml
from halfbyte.config.schema import Run

__all__ = ["Run", "load_run", "model_run", "read_run_folder", "run_as_yaml"]
