"""Owns the comparison: metrics, intervals, variants on the same prompts, the report."""
