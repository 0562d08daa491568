"""Serving: the engine with which many requests share one model and its adapters."""
