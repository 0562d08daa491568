"""Owns evaluation: intervals, the comparison of variants on the same prompts, the report."""
