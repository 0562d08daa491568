"""Serving: the engine by which many requests share one model and its adapters."""
