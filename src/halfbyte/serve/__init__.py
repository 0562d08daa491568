"""Serving: one base with its adapters behind an OpenAI-compatible interface."""
