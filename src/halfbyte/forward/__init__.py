"""Everything that replaces a model's forward or attention, each proven by a probe."""
