"""Owns reading the configs of other tools: what has a twin here becomes ours, what has none is named."""
