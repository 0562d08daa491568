"""Tokens out of a model: in padded batches, or in slots that share a cache."""
