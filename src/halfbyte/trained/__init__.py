"""A trained run read back, and the measures of a copy of it."""
